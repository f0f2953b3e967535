"""Weight decay: properties of each mode, its mistakes, and where it leads."""

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
from optimizers.parts import decay, decay_masks, kernels, roles
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


def test_equilibrium_of_norm_and_rotation_under_random_gradients():
  """RMS(x) = sqrt(lr / 2 wd), rotation sqrt(2 lr wd (1 - b1) / (1 + b1)).

  The one check that decay is wired correctly in a long run (2305.17212).
  """
  lr, wd, b1 = 0.01, 0.4, 0.9
  tx = adamw(lr, b1=b1, b2=0.99, weight_decay=wd)

  def body(carry, key):
    x, state = carry
    g = jax.random.normal(key, x.shape)
    updates, state = tx.update(g, state, x)
    rotation = jnp.linalg.norm(updates) / jnp.linalg.norm(x)
    return (x + updates, state), (jnp.sqrt(jnp.mean(x**2)), rotation)

  x = 0.3 * jnp.ones(4000)
  keys = jax.random.split(jax.random.key(0), 3000)
  _, (rms, rotation) = jax.jit(
    lambda x: jax.lax.scan(body, (x, tx.init(x)), keys)
  )(x)
  assert rms[-1000:].mean() == pytest.approx((lr / 2 / wd) ** 0.5, rel=0.08)
  want = (2 * lr * wd * (1 - b1) / (1 + b1)) ** 0.5
  assert rotation[-1000:].mean() == pytest.approx(want, rel=0.08)


def _walk(f, start, mode, make, num_steps=20_000, peak=1e-2):
  """Minimises f with the learning rate falling linearly to 0, in float64."""

  def body(carry, t):
    x, state = carry
    tx = make(peak * (1 - t / num_steps), None, peak, decay=mode)
    updates, state = tx.update(jax.grad(f)(x), state, x)
    return (x + updates, state), f(x)

  with jax.enable_x64(True):
    x = jnp.array(start)
    init = make(peak, None, peak, decay=mode).init(x)
    steps = jnp.arange(num_steps)
    run = jax.jit(lambda x, s: jax.lax.scan(body, (x, s), steps))
    (x, _), values = run(x, init)
    return np.asarray(x), float(f(x)), np.asarray(values)


def _parabola(p):
  return (p[1] - 3 - (p[0] - 3) ** 2) ** 2


def _circle(p):
  return ((p[1] - 3) ** 2 + (p[0] - 3) ** 2 - 1) ** 2


_adam = functools.partial(adamw, b2=0.95, weight_decay=0.4)


@pytest.mark.parametrize(
  'f, start, mode, end, value',
  [
    (_parabola, (5.0, 6.0), 'none', (4.788, 6.198), 0.0),
    (_parabola, (5.0, 6.0), 'decoupled', (2.5, 2.5), 0.5625),
    (_parabola, (5.0, 6.0), 'cautious', (3.0, 3.0), 0.0),
    (_circle, (4.5, 4.0), 'none', (3.910, 3.414), 0.0),
    (_circle, (4.5, 4.0), 'decoupled', (2.29289, 2.29289), None),
    (_circle, (4.5, 4.0), 'cautious', (3.71447, 3.69967), 0.0),
  ],
)
def test_where_decay_leads_on_a_manifold_of_minima(f, start, mode, end, value):
  """Decay stops at a biased point, cautious decay at a Pareto point of |x|.

  End points computed independently in float64 for the toys of 2510.12402.
  """
  x, loss, _ = _walk(f, start, mode, _adam)
  np.testing.assert_allclose(x, end, atol=2e-3)
  if value is not None:
    assert loss == pytest.approx(value, abs=1e-6 if value else 1e-10)


def _sgd(learning_rate, axes, peak, *, decay):
  knobs = {'weight_decay': 0.4, 'decay': decay}
  return descend(optax.identity(), learning_rate, axes, peak, **knobs)


def test_cautious_decay_does_not_raise_the_loss_of_gradient_descent():
  """f itself is a Lyapunov function, up to O(lr^2); not so with plain decay."""
  _, end, values = _walk(_circle, (4.5, 4.0), 'cautious', _sgd)
  assert (np.diff(values) > 1e-15).sum() <= 1 and end < 1e-20
  _, end, values = _walk(_circle, (4.5, 4.0), 'decoupled', _sgd)
  assert (np.diff(values) > 1e-15).sum() > 500 and end > 0.05


@pytest.mark.parametrize('kernel', ['quadratic', 'relativistic'])
def test_the_lyapunov_function_of_momentum_with_cautious_decay(kernel):
  """f + K(m) + wd sum max(m x, 0) falls, up to O(lr^2); not with plain decay.

  2510.12402 for dx = -(grad K(m) + wd [m x >= 0] x) dt, dm = (grad f - m) dt:
  momentum with K = m^2 / 2, Lion-K with any even K.
  """
  k, wd, dims, e = kernels.KERNELS[kernel], 0.4, (0,), 0.1

  def h(x, m):
    toward_zero = jnp.maximum(m * x, 0).sum()
    return _circle(x) + k.value(m, e, dims)[0] + wd * toward_zero

  def rise(mode, lr):
    momentum = optax.stateless(lambda m, _: k.gradient(m, e, dims))
    tx = descend(momentum, lr, None, None, weight_decay=wd, decay=mode)

    def body(carry, _):
      x, m = carry
      before = h(x, m)
      m = m + lr * (jax.grad(_circle)(x) - m)
      updates, _ = tx.update(m, tx.init(x), x)
      return (x + updates, m), before

    with jax.enable_x64(True):
      start = jnp.array((4.5, 4.0)), jnp.zeros(2)
      run = lambda c: jax.lax.scan(body, c, length=int(20 / lr))[1]
      return np.diff(jax.jit(run)(start)).max()

  for lr in (1e-2, 1e-3):
    assert rise('cautious', lr) <= 20 * lr**2
  assert rise('decoupled', 1e-3) > 10 * 20 * 1e-3**2
