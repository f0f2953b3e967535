"""A run: resume, branch, init, divergence, meshes, what it leaves on disk."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from tensorboard.backend.event_processing import event_accumulator

from lm import checkpoint, loop, step
from lm import run as run_lib
from lm.errors import UserError
from tests import helpers
from tests.helpers import ROOT


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run of 12 steps."""
  path = tmp_path_factory.mktemp('runs') / 'whole'
  assert loop.train(helpers.config(), path) == 'done'
  return path


def test_a_run_learns_and_explains_itself(whole):
  run = run_lib.Run(whole)
  loss = run.metrics['train/loss']
  assert loss.step.tolist() == list(range(12))
  assert run.metrics['eval/loss'].step.tolist() == [0, 4, 8, 12]
  assert run.metrics['eval/loss'].value[-1] < run.metrics['eval/loss'].value[0]
  assert run.steps == [0, 4, 8, 12]
  assert run.meta['status'] == 'done'
  assert run.meta['step'] == 12
  assert run.meta['data_fingerprint']
  assert run.meta['versions']['jax'] == jax.__version__
  np.testing.assert_array_equal(
    run.metrics['tokens'].value, run.metrics['tokens'].step * 8 * 32
  )
  np.testing.assert_allclose(
    run.metrics['optim/lr'].value, run.learning_rates(), rtol=1e-6
  )
  # The log's last evaluation, again from the checkpoint, on another mesh.
  loss = run.losses(run.params()).mean()
  np.testing.assert_allclose(
    loss, run.metrics['eval/loss'].value[-1], rtol=1e-5
  )
  with pytest.raises(UserError, match="Did you mean 'train/loss'"):
    run.metrics['train/los']


def test_tensorboard_reads_the_same_numbers(whole):
  events = event_accumulator.EventAccumulator(str(whole / 'tb')).Reload()
  run = run_lib.Run(whole)
  for tag in ('train/loss', 'eval/loss', 'grad/l1', 'optim/lr'):
    points = events.Scalars(tag)
    assert [p.step for p in points] == run.metrics[tag].step.tolist()
    np.testing.assert_allclose(
      [p.value for p in points], run.metrics[tag].value, rtol=1e-6
    )


def test_mean_is_the_mean_of_the_iterates(whole, tmp_path):
  """Every iterate is saved in a second run and averaged in float64."""
  every = tmp_path / 'every'
  config = helpers.config(checkpoint__every_steps=1, checkpoint__mean=False)
  loop.train(config, every)
  run = run_lib.Run(whole)
  iterates = {s: helpers.leaves(every, s, 'params') for s in range(13)}
  for knot in (4, 8, 12):
    mean = helpers.leaves(whole, knot, 'mean')
    assert checkpoint.read_meta(whole, knot)['mean_start'] == knot - 4
    for key, value in mean.items():
      steps = range(knot - 3, knot + 1)
      want = np.mean([iterates[s][key].astype(np.float64) for s in steps], 0)
      np.testing.assert_allclose(value, want, atol=1e-7)
      assert np.abs(value - iterates[knot][key]).max() > 0
  assert run.mean(12).keys() == run.params(12).keys()


def _interrupt(config, path, at, monkeypatch):
  """Stops a run as SIGTERM would, at a step."""
  with monkeypatch.context() as m:
    m.setattr(loop._Preemption, 'reached', lambda self, n: n == at)
    assert loop.train(config, path) == 'preempted'


@pytest.mark.parametrize('at', [3, 4, 11])
def test_resume_is_the_uninterrupted_run(whole, tmp_path, monkeypatch, at):
  _interrupt(helpers.config(), tmp_path, at, monkeypatch)
  run = run_lib.Run(tmp_path)
  assert (run.meta['status'], run.meta['step']) == ('preempted', at)
  assert run.steps[-1] == at
  assert loop.train(helpers.config(), tmp_path) == 'done'
  helpers.assert_same_run(whole, tmp_path)
  assert run.meta['starts'] == 2


def test_lines_after_the_checkpoint_are_written_again(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'a')
  for step_ in (8, 12):
    shutil.rmtree(tmp_path / 'a' / 'checkpoints' / str(step_))
  with (tmp_path / 'a' / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 13, "train/lo')  # cut by kill -9
  loop.train(helpers.config(), tmp_path / 'a')
  helpers.assert_same_run(whole, tmp_path / 'a')


@pytest.mark.parametrize('name', ['params', 'train', 'mean'])
def test_a_flipped_byte_is_noticed(whole, tmp_path, name, capsys):
  path = tmp_path / 'a'
  shutil.copytree(whole, path)
  data = checkpoint.item(path, 12, name)
  victim = max(data.rglob('d/*'), key=lambda p: p.stat().st_size)
  content = bytearray(victim.read_bytes())
  for place in range(200, len(content), 997):
    content[place] ^= 0x10
  victim.write_bytes(content)
  assert loop.train(helpers.config(), path) == 'done'
  assert 'warning: Checkpoint' in capsys.readouterr().out
  assert (path / 'damaged' / '12').is_dir()
  helpers.assert_same_run(whole, path)


def test_all_damaged_is_an_error_and_not_a_new_run(whole, tmp_path):
  path = tmp_path / 'a'
  shutil.copytree(whole, path)
  for saved in path.glob('checkpoints/*/params/_METADATA'):
    saved.write_text('{')
  with pytest.raises(UserError, match='All checkpoints of .* are damaged'):
    loop.train(helpers.config(), path)


def test_fingerprint_sees_bits_swaps_and_not_sharding():
  x = jnp.arange(64.0).reshape(8, 8)
  mark = int(checkpoint.fingerprint({'x': x})['x'])
  swapped = x[jnp.array([1, 0, *range(2, 8)])]
  flipped = np.array(x)
  flipped.view(np.uint32)[3, 3] ^= 1
  assert int(checkpoint.fingerprint({'x': swapped})['x']) != mark
  assert int(checkpoint.fingerprint({'x': jnp.asarray(flipped)})['x']) != mark
  mesh = jax.make_mesh((8,), ('data',))
  sharded = jax.device_put(
    x, NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  )
  assert int(checkpoint.fingerprint({'x': sharded})['x']) == mark


def test_another_config_is_refused_with_the_field(whole, tmp_path, capsys):
  path = tmp_path / 'a'
  shutil.copytree(whole, path)
  before = (path / 'config.json').read_text()
  with pytest.raises(UserError, match=r'another optimizer\.b2'):
    loop.train(helpers.config(optimizer__b2=0.99), path)
  assert 'optimizer.b2: 0.95 -> 0.99' in capsys.readouterr().out
  with pytest.raises(UserError, match='another num_steps'):
    loop.train(helpers.config(num_steps=16), path)  # wsd: another decay
  assert (path / 'config.json').read_text() == before
  loop.train(helpers.config(max_bad_steps=3), path)
  assert 'max_bad_steps: 10 -> 3' in capsys.readouterr().out


def test_a_constant_run_can_be_made_longer(tmp_path):
  long, short = tmp_path / 'long', tmp_path / 'short'
  loop.train(helpers.config('schedule=constant'), long)
  loop.train(helpers.config('schedule=constant', num_steps=8), short)
  loop.train(helpers.config('schedule=constant'), short)
  helpers.assert_same_run(long, short)


def test_branch_of_the_same_config_is_the_run_itself(whole, tmp_path):
  config = helpers.config(branch=f'{whole}@4')
  loop.train(config, tmp_path)
  assert run_lib.Run(tmp_path).steps == [4, 8, 12]
  assert run_lib.Run(tmp_path).meta['parent'] == f'{whole}@4'
  for name in ('params', 'train', 'mean'):
    a, b = (helpers.leaves(r, 12, name) for r in (whole, tmp_path))
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
  assert helpers.lines(tmp_path) == helpers.lines(whole)[4:]


def test_branch_data_restart_sees_other_batches(whole, tmp_path):
  config = helpers.config(branch=f'{whole}@4', branch_data='restart')
  loop.train(config, tmp_path)
  a, b = (run_lib.Run(r).metrics['train/loss'] for r in (whole, tmp_path))
  assert b.value[0] != a.value[4]
  assert b.step[0] == 4


def test_init_takes_parameters_only(whole, tmp_path):
  loop.train(helpers.config(init=f'{whole}@12', num_steps=2), tmp_path)
  start = helpers.leaves(tmp_path, 0, 'params')
  for key, value in helpers.leaves(whole, 12, 'params').items():
    np.testing.assert_array_equal(start[key], value)
  train = helpers.leaves(tmp_path, 0, 'train')
  assert all(v.sum() == 0 for k, v in train.items() if 'mu' in k)


@pytest.mark.parametrize(
  ('overrides', 'sentence'),
  [
    ({'branch': '{run}@5'}, r"@5' does not exist; .* has the steps 0, 4, 8"),
    ({'branch': 'nowhere@4'}, "'nowhere' has no checkpoints"),
    ({'branch': '{run}@4', 'init': '{run}@4'}, 'exclude each other'),
    ({'branch': '{run}@12'}, 'not before num_steps=12'),
    ({'branch': '{run}@4', 'checkpoint__every_steps': 3}, 'that divides it'),
    ({'branch': '{run}@4', 'branch_data': 'x'}, 'Legal: continue, restart'),
    ({'init': '{run}/merged/x'}, 'not a merge; merges of this run: none'),
    ({'init': '{run}@4', 'model__d_model': 64}, 'do not fit this model'),
    ({'batch_size': 7}, 'batch_size=7 must be a positive multiple of 8'),
    ({'eval__num_sequences': 12}, 'must be a multiple of eval.batch_size=8'),
    ({'mesh__fsdp': 3}, 'does not make 8 devices'),
    ({'mesh__tensor': 8}, r'mesh\.tensor=8 does not divide .* size 2'),
    ({'schedule__shape': 'lin'}, r'schedules/wsd\.py: .*linear'),
    ({'optimizer__decay': 'x'}, r'optimizers/adamw\.py: .*decoupled'),
    ({'num_steps': 0}, 'num_steps=0'),
    ({'checkpoint__every_steps': 0}, r'checkpoint\.every_steps=0'),
    ({'clip_norm': -1.0}, r'clip_norm=-1'),
  ],
)  # fmt: skip
def test_mistakes_are_one_sentence(whole, tmp_path, overrides, sentence):
  filled = {
    k: v.format(run=whole) if isinstance(v, str) else v
    for k, v in overrides.items()
  }
  with pytest.raises(UserError, match=sentence):
    loop.train(helpers.config(**filled), tmp_path / 'new')
  assert not (tmp_path / 'new' / 'config.json').exists()


def test_non_finite_steps_are_skipped_counted_and_end_the_run(tmp_path):
  config = helpers.config(learning_rate=1e30, max_bad_steps=3)
  assert loop.train(config, tmp_path) == 'diverged'
  run = run_lib.Run(tmp_path)
  assert run.meta['status'] == 'diverged'
  bad = run.metrics['train/bad_steps'].value
  assert bad[-1] == 3
  saved = helpers.leaves(tmp_path, run.steps[-1], 'params')
  assert all(np.isfinite(x).all() for x in saved.values())


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
  assert whole_ != parts  # another order of sums
  for key in ('train/loss', 'grad/l2', 'grad/l1'):
    np.testing.assert_allclose(whole_[key], parts[key], rtol=2e-5)


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
  'mesh', [{'data': 8}, {'fsdp': 8, 'data': 1}, {'tensor': 2, 'fsdp': 2}],
  ids=['data', 'fsdp', 'tensor'],
)  # fmt: skip
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_meshes_give_the_single_device_run(tmp_path, mesh, optimizer):
  """Ten steps on 8 devices and on 1."""
  config = helpers.config(
    f'optimizer={optimizer}',
    num_steps=10,
    **{f'mesh__{k}': v for k, v in mesh.items()},
  )
  eight = _losses(config, sharded=True)
  single = _losses(helpers.config(f'optimizer={optimizer}', num_steps=10))
  np.testing.assert_allclose(eight, single, rtol=2e-4)


def test_a_sharded_checkpoint_goes_on_on_one_device(tmp_path):
  mesh = {'mesh__fsdp': 2, 'mesh__tensor': 2}
  config = helpers.config('optimizer=muon', **mesh)
  assert loop.train(config, tmp_path) == 'done'
  run = run_lib.Run(tmp_path)
  before = run.metrics['train/loss'].value
  shutil.rmtree(tmp_path / 'checkpoints' / '12')
  done = helpers.command(
    'launch.train',
    f'--config={tmp_path}/config.json',
    f'--workdir={tmp_path}',
    '--config.mesh.fsdp=1',
    '--config.mesh.tensor=1',
  )
  assert 'mesh.fsdp: 2 -> 1' in done.stdout
  assert run.meta['devices']['count'] == 1
  after = run.metrics['train/loss'].value
  np.testing.assert_array_equal(after[:8], before[:8])
  np.testing.assert_allclose(after, before, rtol=2e-4)


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


def test_kill_9_then_the_same_command(tmp_path):
  """Killed as soon as a checkpoint beyond the first appears."""
  arguments = [
    '--config=configs/debug.py',
    '--config.num_steps=60',
    '--config.checkpoint.every_steps=4',
  ]
  helpers.command('launch.train', *arguments, f'--workdir={tmp_path}/a')
  command = [sys.executable, '-m', 'launch.train', *arguments]
  environment = {
    **os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=1'
  }  # fmt: skip
  victim = subprocess.Popen(
    [*command, f'--workdir={tmp_path}/b'],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
  )
  while not any(s > 4 for s in checkpoint.steps(tmp_path / 'b')):
    assert victim.poll() is None
    time.sleep(0.02)
  victim.send_signal(signal.SIGKILL)
  victim.wait()
  assert checkpoint.steps(tmp_path / 'b')[-1] < 60
  helpers.command('launch.train', *arguments, f'--workdir={tmp_path}/b')
  helpers.assert_same_run(tmp_path / 'a', tmp_path / 'b')


def test_sigterm_saves_and_exits(tmp_path):
  command = [
    sys.executable, '-m', 'launch.train', '--config=configs/debug.py',
    '--config.num_steps=100000', '--config.checkpoint.every_steps=50000',
    f'--workdir={tmp_path}/a',
  ]  # fmt: skip
  victim = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  metrics = pathlib.Path(tmp_path, 'a', 'metrics.jsonl')
  while not metrics.exists() or metrics.read_text().count('\n') < 5:
    assert victim.poll() is None
    time.sleep(0.02)
  victim.terminate()
  output, _ = victim.communicate(timeout=60)
  assert victim.returncode == 143
  assert 'preempted. Next: run the same command' in output
  meta = json.loads((tmp_path / 'a' / 'meta.json').read_text())
  assert meta['status'] == 'preempted'
  assert checkpoint.steps(tmp_path / 'a')[-1] == meta['step'] > 0


def test_two_processes_do_not_train_in_one_directory(whole, monkeypatch):
  handle = loop.card._lock(whole)
  with pytest.raises(UserError, match='Another process is training'):
    loop.train(helpers.config(), whole)
  handle.close()


def test_keep_policies(tmp_path):
  config = helpers.config(
    checkpoint__every_steps=1, checkpoint__keep_latest=2,
    checkpoint__keep_every_steps=5,
  )  # fmt: skip
  loop.train(config, tmp_path)
  assert checkpoint.steps(tmp_path) == [0, 5, 10, 11, 12]
