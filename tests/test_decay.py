"""Weight decay: properties of each mode and its mistakes."""

import functools

import hypothesis as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optimizers.adamw import adamw
from optimizers.parts import decay, decay_masks, roles
from optimizers.parts.decay import descend

FLOAT32 = st.floats(-4, 4, width=32, allow_subnormal=False)
VECTOR = hnp.arrays(np.float32, (6,), elements=FLOAT32)
quick = h.settings(max_examples=40, deadline=None, derandomize=True)


@functools.cache
def _stepper(mode):
  """One step from x with direction u: the method returns its gradient."""

  @jax.jit
  def step(x, u, lr, wd, peak):
    tx = descend(optax.identity(), lr, None, peak, weight_decay=wd, decay=mode)
    return tx.update(u, tx.init(x), x)[0]

  return step


def _step(mode, x, u, lr=0.5, wd=0.25, peak=2.0):
  return np.asarray(_stepper(mode)(x, u, lr, wd, peak))


@quick
@h.given(x=VECTOR, u=VECTOR)
def test_each_mode_is_its_formula(x, u):
  """The table of parts/decay.py; all factors are powers of 2, so exact."""
  lr, wd, peak = 0.5, 0.25, 2.0
  aligned = np.sign(x) * np.sign(u) >= 0
  shrink = {
    'decoupled': lr * wd * x,
    'independent': lr / peak * wd * x,
    'corrected': lr * wd * lr / peak * x,
    'cautious': lr * wd * np.where(aligned, x, 0),
    'cautious-strict': lr * wd * np.where(np.sign(x) * np.sign(u) > 0, x, 0),
    'cautious-gradient': lr * wd * np.where(aligned, x, 0),  # here u = g
    'coupled': lr * wd * x,  # through a method that changes nothing
    'none': 0 * x,
  }
  tested_elsewhere = {'cautious-tensor', *decay_masks.RANDOM}
  assert set(shrink) | tested_elsewhere == set(decay.MODES)
  for mode, value in shrink.items():
    want = -lr * u - value
    np.testing.assert_allclose(_step(mode, x, u), want, rtol=1e-6, atol=1e-6)


@quick
@h.given(x=VECTOR, u=VECTOR, scale=st.floats(2**-9, 2**9, width=32))
def test_properties_of_cautious_decay(x, u, scale):
  none, plain = _step('none', x, u), _step('decoupled', x, u)
  cautious = _step('cautious', x, u)
  np.testing.assert_array_equal(_step('cautious', x, u, wd=0.0), none)
  same = np.abs(u) * np.sign(x)
  np.testing.assert_array_equal(
    _step('cautious', x, same), _step('decoupled', x, same)
  )
  np.testing.assert_array_equal(_step('cautious', -x, -u), -cautious)
  assert ((cautious == none) | (cautious == plain)).all()
  k = np.abs(cautious - none) > 0
  larger = _step('cautious', x, scale * u) - _step('none', x, scale * u)
  faster = _step('cautious', x, u, lr=2.0) - _step('none', x, u, lr=2.0)
  sure = np.abs(x) > 1e-2  # where float32 shows a decay next to scale * u
  np.testing.assert_array_equal((np.abs(faster) > 0)[sure], k[sure])
  clear = sure & (np.abs(u) * scale < 1e3)
  np.testing.assert_array_equal((np.abs(larger) > 0)[clear], k[clear])


def test_cautious_decay_compares_signs_not_the_product():
  """1e-25 * -1e-25 underflows to -0, which is >= 0; a tie does decay."""
  x = np.array([1e-25, 1e-25, 1.0], np.float32)
  u = np.array([-1e-25, 1e-25, 0.0], np.float32)
  assert x[0] * u[0] >= 0, 'the product would pass'
  moved = _step('cautious', x, u) - _step('none', x, u)
  assert moved[0] == 0 and moved[1] < 0 and moved[2] < 0


def test_a_learning_rate_of_zero_moves_nothing_and_is_finite():
  x = np.ones(3, np.float32)
  for mode in decay.MODES:
    assert not _step(mode, x, x, lr=0.0, peak=0.0).any()


def test_peak_defaults_to_the_learning_rate():
  x = jnp.ones(3)
  for mode in ('independent', 'corrected'):
    knobs = {'weight_decay': 0.1, 'decay': mode}
    a = descend(optax.identity(), 0.5, **knobs)
    b = descend(optax.identity(), 0.5, None, 0.5, **knobs)
    np.testing.assert_array_equal(
      a.update(x, a.init(x), x)[0], b.update(x, b.init(x), x)[0]
    )


def test_vectors_decay_only_without_axes():
  params = {'w': jnp.ones((2, 2)), 'b': jnp.ones(2), 'e': jnp.ones((3, 2))}
  axes = {
    'w': roles.infer((2, 2)),
    'b': roles.infer((2,)),
    'e': roles.Axes(('vocab', 'embed'), 'embedding', (0,), (1,)),
  }
  zeros = jax.tree.map(jnp.zeros_like, params)
  for given in (None, axes):
    tx = adamw(0.5, given)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert updates['w'].all() and updates['e'].all()
    assert updates['b'].all() == (given is None)


def test_mistakes():
  with pytest.raises(ValueError) as e:
    adamw(1e-3, decay='l2')
  assert str(e.value) == (
    "decay='l2' does not exist; legal: 'decoupled', 'independent', "
    "'corrected', 'coupled', 'none', 'cautious', 'cautious-strict', "
    "'cautious-gradient', 'cautious-tensor', 'random-matched', 'random:0.5'."
  )
  params = {'a': jnp.ones((2, 2))}
  wrong = {'a': roles.infer((2,))}
  with pytest.raises(ValueError, match='name 1 dimensions of a parameter of'):
    tx = adamw(1e-3, wrong)
    tx.update(params, tx.init(params), params)
  with pytest.raises(ValueError, match='only one of the two has: a, b.'):
    tx = adamw(1e-3, {'b': roles.infer((2, 2))})
    tx.update(params, tx.init(params), params)
