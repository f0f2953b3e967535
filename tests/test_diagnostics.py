"""What a run logs about decay, against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import diagnostics, loop, spec, step
from optimizers.parts import kernels, roles, saturation
from tests import helpers
from tests import optimizer_problem as problem


@functools.cache
def _measured(name, mode, weight_decay=0.5, lr=0.3, stop=3, peak=0.3):
  """Parameters, change and metrics of the last of some steps, in float64."""
  config = helpers.config(f'optimizer={name}')
  config.optimizer.decay = mode
  axes, floats = problem.axes(), spec.floats('optimizers', config.optimizer)
  floats['weight_decay'] = weight_decay
  with jax.enable_x64(True):
    wide = lambda t: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), t)
    x, grads = wide(problem.params()), wide(problem.gradients(stop))

    @jax.jit
    def one(x, state, g):
      def update(floats):
        tx = spec.build(
          'optimizers', config.optimizer, lr, axes, peak, floats=floats
        )
        return tx.update(g, state, x)

      dx, new = update(floats)
      found = diagnostics.measure(
        config, axes, x, state, lambda f: update(f)[0], (lr, peak), floats
      )
      return dx, new, found

    tx = spec.build(
      'optimizers', config.optimizer, lr, axes, peak, floats=floats
    )
    state = tx.init(x)
    for i in range(stop):
      if i:
        x = jax.tree.map(jnp.add, x, dx)  # noqa: F821
      before = state
      g = jax.tree.map(lambda g, i=i: g[i], grads)
      dx, state, found = one(x, state, g)
  return jax.device_get((x, dx, before, found))


def _matrices(tree):
  return [np.asarray(tree['blocks'][k]) for k in ('query', 'out')]


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_without_decay_nothing_is_active(name):
  """Products are fused in one update and not in the other: no decay."""
  for mode in ('decoupled', 'cautious'):
    _, _, _, found = _measured(name, mode, weight_decay=0.0)
    active = [v for k, v in found.items() if 'decay/active' in k]
    assert active == [0.0] * len(active) and active


@pytest.mark.parametrize('name', ['adamw', 'lion', 'sgdw'])
def test_the_mask_of_cautious_decay_is_where_the_update_shrinks(name):
  """-dx x = lr (u x + wd k x^2) is positive if and only if k = 1."""
  x, dx, _, found = _measured(name, 'cautious')
  for role, leaves in (
    ('matrix', lambda t: _matrices(t)),
    ('embedding', lambda t: [t['table']]),
  ):
    pairs = list(zip(leaves(x), leaves(dx), strict=True))
    k = [-np.sign(d) * np.sign(p) > 0 for p, d in pairs]
    active = sum(m.sum() for m in k) / sum(m.size for m in k)
    assert found[f'decay/active/{role}'] == pytest.approx(active)
    assert 0.2 < active < 0.8
    part = sum(
      np.sum((0.3 * 0.5 * p * m) ** 2)
      for (p, _), m in zip(pairs, k, strict=True)
    )
    moved = sum(np.sum(d**2) for _, d in pairs)
    size = sum(np.sum(p**2) for p, _ in pairs)
    n = sum(p.size for p, _ in pairs)
    assert found[f'decay/ratio/{role}'] == pytest.approx((part / moved) ** 0.5)
    assert found[f'update/relative/{role}'] == pytest.approx(
      (moved / size) ** 0.5
    )
    assert found[f'param/rms/{role}'] == pytest.approx((size / n) ** 0.5)


@pytest.mark.parametrize(
  ('mode', 'active'),
  [('decoupled', 1), ('corrected', 1), ('none', 0), ('random:0.3', 0.3)],
)
def test_active_share(mode, active):
  _, _, _, found = _measured('adamw', mode)
  assert found['decay/active/matrix'] == pytest.approx(active, abs=0.1)
  assert found['decay/active/vector'] == 0
  assert (found['decay/ratio/head'] > 0) == (active > 0)


def test_lion_is_measured_against_its_box():
  x, _, state, found = _measured('lion', 'decoupled')
  y = np.concatenate([0.5 * p.ravel() for p in _matrices(x)])
  m = np.concatenate([p.ravel() for p in _matrices(state.mu)])
  assert found['lion/max/matrix'] == pytest.approx(abs(y).max())
  gap = (abs(m) + m * y).sum() / abs(m).sum()
  assert found['lion/gap/matrix'] == pytest.approx(gap)
  assert found['lion/saturated/matrix'] == np.mean(abs(y) > 0.95)
  assert found['lion/inside/matrix'] == 1
  assert 'lion/max/vector' not in found
  assert not [k for k in _measured('adamw', 'none')[3] if k[:4] == 'lion']


def test_the_box_of_a_corrected_decay():
  """wd lr / peak, so half as far at half the peak."""
  x, _, _, found = _measured('lion', 'corrected', peak=0.6)
  largest = 0.25 * max(abs(p).max() for p in _matrices(x))
  assert found['lion/max/matrix'] == pytest.approx(largest)


def test_the_gap_vanishes_at_the_minimum_and_skips_what_is_outside():
  """x = -grad K(mu) / wd; the second of two layers is ten times too large."""
  m = jnp.asarray(problem.normal((2, 3, 4), 1)[0], jnp.float32)
  for name in ('l1', 'l2', 'huber', 'nuclear', 'topk'):
    axes = roles.infer(m.shape)
    k, view, dims = kernels.arrange(name, m, axes)
    x = -k.gradient(view, 0.5, dims).reshape(m.shape) / 0.7
    knobs = {'weight_decay': 0.7, 'epsilon': 0.5}
    found = saturation.measure(name, x, {'mu': m}, None, **knobs)
    assert found['lion/gap/matrix'] == pytest.approx(0, abs=1e-5)
    assert found['lion/inside/matrix'] == 1
    x = x.at[1].multiply(10.0)
    found = saturation.measure(name, x, {'mu': m}, None, **knobs)
    assert found['lion/gap/matrix'] == pytest.approx(0, abs=1e-5)
    assert found['lion/inside/matrix'] == 0.5


def test_saturated_is_what_is_near_the_bound():
  x = jnp.array([[0.94, -0.96], [0.5, 1.0]]) / 0.7
  measure = lambda mode: saturation.measure(
    'l1', x, {'mu': x}, None, weight_decay=0.7, decay=mode
  )
  for mode in ('decoupled', 'cautious', 'corrected'):
    assert measure(mode)['lion/saturated/matrix'] == 0.5
  assert measure('coupled') == measure('none') == {}  # no bound


def test_a_parameter_with_rates_of_its_own():
  """wd of a width rule counts; 'independent' is relative to its own peak."""
  x, m = jnp.asarray(problem.normal((2, 3, 4))[:2], jnp.float32)
  axes = roles.infer(x.shape)
  own = dataclasses.replace(axes, decay_scale=0.5, lr_scale=0.25)
  for mode, factor in (('decoupled', 0.5), ('independent', 2.0)):
    a = saturation.measure(
      'l1', x, {'mu': m}, own, weight_decay=0.1, decay=mode
    )
    b = saturation.measure('l1', x, {'mu': m}, axes, weight_decay=0.1 * factor)
    assert a['lion/max/matrix'] == pytest.approx(b['lion/max/matrix'])


def test_a_run_with_and_without():
  """The same parameters bit for bit; all tags end in a role that exists."""
  states, logs = [], []
  for on in (True, False):
    c = helpers.config('optimizer=lion', diagnostics=on)
    built = loop.build(c)
    tokens = built.data.train.batch(0)
    state, metrics = built.train_step(built.init(), tokens, step.floats(c))
    states.append(jax.device_get(state))
    logs.append(jax.device_get(metrics))
  jax.tree.map(np.testing.assert_array_equal, *states)
  more = logs[0].keys() - logs[1].keys()
  assert logs[1].keys() < logs[0].keys()
  assert {k.rsplit('/')[-1] for k in more} == {
    'matrix', 'embedding', 'head', 'vector',
  }  # fmt: skip
  assert len(more) == 4 * 4 + 3 * 4
  assert all(np.isfinite(v) for v in logs[0].values())


def test_a_run_measures_at_the_rate_of_the_step():
  """In a warm-up the box of corrected decay is larger by peak / rate."""
  c = helpers.config('optimizer=lion', diagnostics=True)
  c.optimizer.decay, c.schedule.warmup = 'corrected', 0.5
  built = loop.build(c)
  state = built.init()
  axes = jax.tree.leaves(built.model.axes)
  leaves = zip(jax.tree.leaves(state.params), axes, strict=True)
  largest = max(float(abs(x).max()) for x, a in leaves if a.role == 'matrix')
  _, found = built.train_step(state, built.data.train.batch(0), step.floats(c))
  part = float(found['optim/lr']) / c.learning_rate
  assert part < 0.2
  want = c.optimizer.weight_decay * part * largest
  assert float(found['lion/max/matrix']) == pytest.approx(want, rel=1e-5)
