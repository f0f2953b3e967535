"""One step: bad steps, clipping, accumulation, meshes."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import schedules
from launch.parts import curves
from lm import loop, loss, model, norms, sharding, step
from lm.errors import UserError
from tests import helpers


def test_a_bad_step_changes_nothing_but_the_counters():
  config = helpers.config()
  built = loop.build(config)
  one = built.init()
  params = jax.tree.map(lambda x: x.at[...].set(jnp.nan), one.params)
  train_step = jax.jit(step.build_train(config, built.model))
  tokens = built.data.train.batch(0)
  two, metrics = train_step(
    one.replace(params=params), tokens, step.floats(config)
  )
  for a, b in zip(
    jax.tree.leaves(one.opt_state), jax.tree.leaves(two.opt_state), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert (int(two.step), int(two.bad_steps), int(two.bad_in_a_row)) == (1, 1, 1)
  three, _ = train_step(
    two.replace(params=one.params), tokens, step.floats(config)
  )
  assert (int(three.bad_steps), int(three.bad_in_a_row)) == (1, 0)


def test_accumulation_equals_one_batch():
  whole_, parts = (
    _one_step(helpers.config(grad_accum_steps=n, batch_size=32)) for n in (1, 4)
  )
  # The results may be equal to the last bit (on some processors they are).
  assert [_scans(n) for n in (1, 4)] == [False, True]
  for key in ('train/loss', 'grad/l2', 'grad/l1'):
    np.testing.assert_allclose(whole_[key], parts[key], rtol=2e-5)


def _scans(slices):
  config = helpers.config(grad_accum_steps=slices, batch_size=32)
  built = loop.build(config)
  tokens = built.data.train.batch(0)
  arguments = built.abstract, tokens, step.floats(config)
  return f'length={slices}' in str(built.train_step.trace(*arguments).jaxpr)


def test_slices_of_a_batch_that_fit_the_caches_of_a_cpu():
  """At most 1024 tokens per device; whole sequences."""
  for rows, columns, want in (
    (8, 33, 1), (16, 129, 2), (16, 257, 4), (12, 257, 3), (4, 4097, 4),
    (7, 512, 7), (1, 9, 1),
  ):  # fmt: skip
    assert sharding.fitting_slices(rows, columns) == want
  with jax.set_mesh(loop.build(helpers.config()).mesh):  # 8 devices
    assert sharding.fitting_slices(64, 257) == 2
  sliced, chosen = (
    _one_step(helpers.config(grad_accum_steps=n, batch_size=64)) for n in (2, 0)
  )
  assert sliced == chosen


def _one_step(config):
  built = loop.build(config)
  tokens = built.data.train.batch(0)
  _, metrics = built.train_step(built.init(), tokens, step.floats(config))
  return {k: float(v) for k, v in metrics.items()}


def test_norms_are_those_before_clipping():
  free = _one_step(helpers.config(clip_norm=0.0))
  clipped = _one_step(helpers.config(clip_norm=0.01))
  assert free['grad/l2'] == clipped['grad/l2'] > 0.01
  assert free['grad/l1'] == clipped['grad/l1'] > free['grad/l2']


@pytest.mark.parametrize('scan', [False, True])
def test_nuclear_norm_is_the_sum_of_singular_values(scan):
  config = helpers.config(
    model__scan_layers=scan, log_nuclear_norm=True, model__num_layers=2
  )
  net = model.build(config.model)
  params = net.init(jax.random.key(3))
  want = 0.0
  for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for w in x if scan and 'block' in name else [x]:
      if name[-2:] in ('/q', '/k', '/v', '/o'):  # (32, heads, dim), or o
        w = w.reshape(-1, 32) if name.endswith('o') else w.reshape(32, -1)
      if w.ndim == 2 and name not in ('embedding', 'head'):
        want += np.linalg.svd(np.float64(w), compute_uv=False).sum()
  got = norms.nuclear(params, net.axes)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_clipping_bounds_the_gradient_that_the_optimizer_gets():
  """Signum with b=0 and coupled scale would hide it, Adam's mu shows it."""
  config = helpers.config(clip_norm=0.01)
  built = loop.build(config)
  state, _ = built.train_step(
    built.init(), built.data.train.batch(0), step.floats(config)
  )
  mu = optax.tree.get(state.opt_state, 'mu')
  np.testing.assert_allclose(
    optax.tree.norm(mu) / (1 - config.optimizer.b1), 0.01, rtol=1e-3
  )


def test_one_compilation_for_all_floats():
  config = helpers.config()
  built = loop.build(config)
  train_step = jax.jit(step.build_train(config, built.model))
  state, tokens = built.init(), built.data.train.batch(0)
  traced = step.floats(config)
  train_step(state, tokens, traced)
  traced['optimizer']['b1'] = 0.5
  traced['schedule']['decay'] = 0.7
  traced['learning_rate'] = 1.0
  train_step(state, tokens, traced)
  assert train_step._cache_size() == 1


@pytest.mark.parametrize(
  ('optimizer', 'mesh'),
  [
    ('adamw', {'data': 8}),
    ('muon', {'fsdp': 8, 'data': 1}),
    ('adamw', {'tensor': 2, 'fsdp': 2}),
  ],
  ids=['data', 'fsdp', 'tensor'],
)
def test_meshes_give_the_single_device_run(tmp_path, mesh, optimizer):
  """Ten steps of two layers on 8 devices and on 1."""
  mesh = {f'mesh__{k}': v for k, v in mesh.items()}
  eight = _losses(_ten_steps(optimizer, **mesh), sharded=True)
  np.testing.assert_allclose(eight, _single(optimizer), rtol=2e-4)


def _losses(config, sharded=False):
  """Losses by a loop of a few lines; unsharded: without mesh and shardings."""
  built = loop.build(config)
  state, train_step = built.init(), built.train_step
  if not sharded:
    train_step = jax.jit(step.build_train(config, built.model))
    state = jax.device_get(state)
  losses = []
  for n in range(config.num_steps):
    tokens = built.data.train.batch(n)
    state, metrics = train_step(state, tokens, step.floats(config))
    losses.append(float(metrics['train/loss']))
  if sharded:
    shards = [x.sharding.num_devices for x in jax.tree.leaves(state.params)]
    assert min(shards) == 8
  return losses


@functools.cache
def _single(optimizer):
  return _losses(_ten_steps(optimizer))


def _ten_steps(optimizer, **mesh):
  more = {'model__num_layers': 2, 'num_steps': 10, **mesh}
  return helpers.config(f'optimizer={optimizer}', **more)


@pytest.mark.parametrize(
  ('schedule', 'sentence'),
  [
    (
      lambda s: 2.0 if s < 2 else 1.0,
      '`if` on an array, or on a float keyword',
    ),
    (lambda s: jnp.where(s < 3, 1.0, 2.0), 'at step 3 is 2; legal: 0 to 1'),
    (lambda s: 0.0 * s, 'the multiplier is always 0; legal: 0 to 1'),
    (lambda s: s / 0, 'at step 0 is nan'),
  ],
)
def test_a_schedule_that_is_none_is_one_sentence(schedule, sentence):
  with pytest.raises(UserError, match=sentence):
    step.values(schedule, 5, 'mine')


@pytest.mark.parametrize('value', [None, np.ones(3)])
def test_a_multiplier_is_one_number(value, monkeypatch):
  module = importlib.import_module('schedules.cosine')
  monkeypatch.setattr(module, 'cosine', lambda num_steps: lambda s: value)
  with pytest.raises(UserError, match='cosine.py: the multiplier must be one'):
    step.check_schedule({'name': 'cosine'}, 5)
  monkeypatch.setattr(module, 'cosine', lambda num_steps: 0.5)
  with pytest.raises(UserError, match='must return a function, not 0.5'):
    step.check_schedule({'name': 'cosine'}, 5)


@pytest.mark.parametrize(
  ('line', 'sentence'),
  [
    ('if warmup > 0.5: warmup', 'line 4: Tracer.* float keyword'),
    ('max(warmup, 1)', 'line 4: Tracer.* float keyword'),
    ('lambda: math.cos(num_steps)', ''),
    ('math.cos(warmup)', 'line 4: Concret.* take jnp for math'),
    ('numpy.zeros(3)[numpy.int32(warmup)]', r'line 4: .*asarray\(table\)'),
  ],
)
def test_float_keywords_of_a_schedule_are_traced(
  line, sentence, tmp_path, monkeypatch
):
  """Also where a schedule is only drawn: what it says is what a run does."""
  (tmp_path / 'zz_test_mine.py').write_text(f"""import math, numpy
import jax.numpy as jnp
def zz_test_mine(num_steps, *, warmup: float = 0.1):
  {line}
  return lambda step: jnp.minimum(1.0, (step + 1) / (1 + num_steps * warmup))
""")
  monkeypatch.setattr(
    schedules, '__path__', [*schedules.__path__, str(tmp_path)]
  )
  monkeypatch.delitem(sys.modules, 'schedules.zz_test_mine', raising=False)
  draw = lambda: curves.curve('zz_test_mine:warmup=0.2', 10)
  if not sentence:
    assert draw().value[-1] == 1
    return
  with pytest.raises(UserError, match=sentence):
    draw()
  config = helpers.config('schedule=zz_test_mine')
  with pytest.raises(UserError, match=sentence):
    loop.build(config)


def test_options_of_the_loss_reach_the_gradient():
  options = {'z_loss': 0.3, 'linearity': 0.5, 'softcap': 0.5}
  config = helpers.config(z_loss=0.3, linearity=0.5, model__logit_softcap=0.5)
  built = loop.build(config)
  tokens = built.data.train.batch(0)
  with jax.set_mesh(built.mesh):
    state = built.init()
    params = jax.device_get(state.params)
    start = float(optax.tree.norm(params))
    _, metrics = built.train_step(state, tokens, step.floats(config))

  @functools.partial(jax.jit, static_argnames='softcap')
  def norm(params, **options):
    of = lambda p: loss.next_token(built.model, p, tokens, **options).loss
    return optax.tree.norm(jax.grad(of)(params))

  got = {k: float(v) for k, v in metrics.items()}
  assert got['param/l2'] == pytest.approx(start, rel=1e-6)
  assert got['grad/l2'] == pytest.approx(float(norm(params, **options)), 1e-4)
  for left_out in options:
    others = {k: v for k, v in options.items() if k != left_out}
    other = float(norm(params, **others))
    assert abs(got['grad/l2'] / other - 1) > 1e-3, left_out
