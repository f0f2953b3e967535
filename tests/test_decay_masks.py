"""Masked decay: the modes that depend on gradients, tensors and chance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optimizers.adamw import adamw
from optimizers.muon import muon
from optimizers.parts import decay_masks, roles
from optimizers.parts.decay import descend
from tests import optimizer_problem as problem


def _decayed(mode, x, u, num_steps=1):
  """Where x decays in each of `num_steps` steps with the same x and gradient u.

  lr = wd = 1, so that an update is -u - x or -u.
  """
  tx = descend(optax.identity(), 1.0, weight_decay=1.0, decay=mode)

  def body(state, _):
    updates, state = tx.update(u, state, x)
    return state, updates

  return np.asarray(
    jax.lax.scan(body, tx.init(x), length=num_steps)[1] + jnp.asarray(u) != 0
  )


def test_a_strict_mask_leaves_ties_alone():
  """Figures of the published code for AdamW; coordinate 5 has no gradient."""
  x = np.array([1.0, -2, 3, 0, -0.5])
  grads = np.array([[0.5, 0.1, -0.2, 0.3, 0], [-1, -0.4, -0.1, 0.2, 0.7]])
  want = [0.8863373966, -1.9396598149, 3.1939292958, -0.1975078696]
  for mode, ends in (
    ('cautious-strict', (-0.5, -0.5734959988)),
    ('cautious', (-0.475, -0.5484959988)),
  ):
    tx = adamw(0.1, weight_decay=0.5, decay=mode)
    got = problem.run(tx, x, grads)
    np.testing.assert_allclose(got[:, 4], ends, atol=1e-9)
    np.testing.assert_allclose(got[1, :4], want, atol=1e-9)


@pytest.mark.parametrize(
  ('scale', 'want'),
  [
    ('keller', [[0.9720883773, 0.500389498, -0.0088319565],
                [-0.2988157531, -2.0153269253, -0.9901417884]]),
    ('moonlight', [[0.9906710864, 0.5001101667, -0.0024980545],
                   [-0.29923475, -2.0043351091, -0.9957773621]]),
  ],
)  # fmt: skip
def test_golden_cautious_muon(scale, want):
  """One step, computed with dion's published code in float64."""
  w = np.array([[1, 0.5, 0], [-0.3, -2, -1]])
  g = np.array([[[3.0, 0, 1], [0, 2, -1]]])
  tx = muon(0.02, scale=scale, weight_decay=0.1, decay='cautious')
  np.testing.assert_allclose(problem.run(tx, w, g)[0], want, atol=1e-9)


def test_the_gradient_mask_reads_the_gradient_not_the_direction():
  """The method turns the gradient round, so that u = -g."""
  x, g = jnp.array([1.0, -1, 2, 3]), jnp.array([1.0, 1, -1, 0])
  for mode, want in (
    ('cautious-gradient', [-1, 0, 0, -3]),
    ('cautious', [0, 1, -2, -3]),
  ):
    tx = descend(optax.scale(-1.0), 1.0, weight_decay=1.0, decay=mode)
    updates, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_array_equal(updates - g, want)


def test_the_tensor_mask_is_one_bit_for_each_matrix():
  x = jnp.stack([jnp.eye(3) + 0.5, jnp.eye(3) + 0.5, jnp.eye(3) + 0.5])
  u = x.at[1].multiply(-1.0).at[2].set(jnp.eye(3) - 0.1)
  on = _decayed('cautious-tensor', x, u)[0]
  np.testing.assert_array_equal(on.all((1, 2)), [True, False, True])
  np.testing.assert_array_equal(on.any((1, 2)), [True, False, True])
  assert (np.asarray(u * x)[2] < 0).any(), 'entrywise it would differ'


def test_random_masks_have_their_rates():
  """Within 4 standard errors, in each step and matrix."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 100, 40)) + 3)
  u = jnp.asarray(rng.normal(size=x.shape) + np.array([[[0.5]], [[-1]]]))
  aligned = np.asarray(u * x >= 0).mean((1, 2))
  assert abs(aligned[0] - aligned[1]) > 0.4
  for mode, rate in (('random-matched', aligned), ('random:0.2', 0.2)):
    on = _decayed(mode, x, u, 5)
    error = 4 * np.sqrt(rate * (1 - rate) / 4000)
    assert (np.abs(on.mean((2, 3)) - rate) < error).all()
    # Independent of the direction, and new in each step.
    same = lambda p, q: np.mean(p * q + (1 - p) * (1 - q))
    agree = np.mean(on == np.asarray(u * x >= 0))
    assert abs(agree - same(rate, aligned)) < 0.02
    assert abs(np.mean(on[0] == on[1]) - same(rate, rate)) < 0.03
  assert not _decayed('random:0', x, u).any()
  assert _decayed('random:1', x, u).all()
  assert _decayed('random-matched', x, x).all()
  # As often as 'cautious', whose mask holds where u x is zero.
  assert _decayed('random-matched', x, jnp.zeros_like(x)).all()


def test_random_masks_differ_between_parameters_and_not_between_runs():
  x = {'a': jnp.ones((8, 8)), 'b': jnp.ones((8, 8)), 'v': jnp.ones(8)}
  tx = adamw(0.1, roles.of(x), decay='random:0.5')
  step = jax.jit(tx.update)
  state = tx.init(x)
  first, after = step(x, state, x)
  again, _ = step(x, state, x)
  later, _ = step(x, after, x)
  assert (first['a'] != first['b']).any()
  assert np.ptp(first['v']) == 0, 'vectors do not decay'
  np.testing.assert_array_equal(first['a'], again['a'])
  same = (first['a'] == first['a'].max()) == (later['a'] == later['a'].max())
  assert 0.2 < same.mean() < 0.8


@pytest.mark.parametrize('mode', decay_masks.MODES)
def test_sharded_equals_single(mode):
  """On 8 devices, bit for bit, the random masks too."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  rng = np.random.default_rng(0)
  x = {'w': rng.normal(size=(16, 8)), 'b': rng.normal(size=8)}
  x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), x)
  g = jax.tree.map(jnp.cos, x)
  tx = descend(optax.identity(), 0.25, weight_decay=0.5, decay=mode)
  step = jax.jit(tx.update)
  single = step(g, tx.init(x), x)
  place = NamedSharding(mesh, P('data'))
  put = functools.partial(jax.device_put, device=place)
  sharded = step(put(g), tx.init(x), put(x))
  assert sharded[0]['w'].sharding.shard_shape((16, 8)) != (16, 8)
  jax.tree.map(np.testing.assert_array_equal, sharded, single)


@pytest.mark.parametrize(
  'decay', ['random', 'random:', 'random:2', 'random:-0.1', 'random:half',
            'random:nan'],
)  # fmt: skip
def test_a_probability_is_needed(decay):
  with pytest.raises(ValueError) as e:
    adamw(0.1, decay=decay)
  assert str(e.value) == (
    f"decay='{decay}' needs a probability from 0 to 1, as in 'random:0.5'."
  )
