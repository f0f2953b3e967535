"""Resume, branch, init, damaged checkpoints."""

import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from launch.parts import range_training, ranking, trials
from lm import address, checkpoint, fingerprint, loop
from lm import run as run_lib
from lm.errors import UserError
from merging.engine import items
from tests import helpers


def _interrupt(config, path, at, monkeypatch):
  """Stops a run as SIGTERM would, at a step."""
  with monkeypatch.context() as m:
    m.setattr(loop.Preemption, 'reached', lambda self, n: n == at)
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


@pytest.mark.parametrize('at', [8, 12])  # in the run; at its end
def test_a_save_that_fails_is_a_crash_and_the_run_goes_on(
  whole, tmp_path, monkeypatch, at
):
  write = checkpoint.ocp.CheckpointManager.save

  def full(self, step, **args):
    if step == at:
      raise OSError(28, 'No space left on device')
    return write(self, step, **args)

  with monkeypatch.context() as m:
    m.setattr(checkpoint.ocp.CheckpointManager, 'save', full)
    with pytest.raises(OSError, match='No space'):
      loop.train(helpers.config(), tmp_path)
  run = run_lib.Run(tmp_path)
  assert (run.meta['status'], run.meta['step']) == ('crashed', run.steps[-1])
  assert loop.train(helpers.config(), tmp_path) == 'done'
  helpers.assert_same_run(whole, tmp_path)


def test_a_last_save_that_fails_in_its_thread_is_a_crash(tmp_path, monkeypatch):
  close = checkpoint.Checkpoints.close

  def fails(self):
    close(self)
    raise RuntimeError('in the thread')

  with monkeypatch.context() as m:
    m.setattr(checkpoint.Checkpoints, 'close', fails)
    with pytest.raises(RuntimeError, match='in the thread'):
      loop.train(helpers.config(), tmp_path)
  assert run_lib.Run(tmp_path).meta['status'] == 'crashed'
  assert loop.train(helpers.config(), tmp_path) == 'done'


def test_lines_after_the_checkpoint_are_written_again(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'a')
  for step_ in (8, 12):
    shutil.rmtree(tmp_path / 'a' / 'checkpoints' / str(step_))
  with (tmp_path / 'a' / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 13, "train/lo')  # cut by kill -9
  loop.train(helpers.config(), tmp_path / 'a')
  helpers.assert_same_run(whole, tmp_path / 'a')


def _flip_bytes(item):
  for victim in item.rglob('d/*'):  # values and index: which are read varies
    content = bytearray(victim.read_bytes())
    content[::97] = bytes(x ^ 0x10 for x in content[::97])
    victim.write_bytes(content)


def _change_a_number(item):
  """As a flipped byte of the largest leaf, in a store that is legal."""
  meta = items.metadata(item)
  name = next(n for n in items.leaves(meta) if n.endswith('embedding'))
  leaf = items.open_leaf(item, meta, name, items.context())
  leaf[...] = leaf.read().result() * np.float32(1.0001)


@pytest.mark.parametrize('damage', [_flip_bytes, _change_a_number])
@pytest.mark.parametrize('name', ['params', 'train', 'mean'])
def test_damage_is_noticed(whole, tmp_path, name, damage, capsys):
  path = tmp_path / 'a'
  shutil.copytree(whole, path)
  damage(address.item(path, 12, name))
  assert loop.train(helpers.config(), path) == 'done'
  (warning,) = re.findall('warning: .*', capsys.readouterr().out)
  assert f'{path}' in warning and 'It is set aside in' in warning
  assert ('is not what was saved' in warning) == (damage is _change_a_number)
  assert (path / 'damaged' / '12').is_dir()
  helpers.assert_same_run(whole, path)


def test_all_damaged_is_an_error_and_not_a_new_run(whole, tmp_path):
  path = tmp_path / 'a'
  shutil.copytree(whole, path)
  for saved in path.glob('checkpoints/*/params/_METADATA'):
    saved.write_text('{')
  with pytest.raises(UserError, match='All checkpoints of .* are damaged'):
    loop.train(helpers.config(), path)


def test_metrics_without_checkpoints_are_not_overwritten(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'a')
  shutil.rmtree(tmp_path / 'a' / 'checkpoints')
  with pytest.raises(UserError, match='metrics up to step 12 and no'):
    loop.train(helpers.config(), tmp_path / 'a')
  assert helpers.lines(tmp_path / 'a') == helpers.lines(whole)


def test_a_checkpoint_without_params_is_written_again(whole, tmp_path, capsys):
  path = tmp_path / 'a'
  shutil.copytree(whole, path)
  shutil.rmtree(address.item(path, 12, 'params'))
  assert loop.train(helpers.config(), path) == 'done'
  assert '@12 has no params. It is set aside' in capsys.readouterr().out
  assert (path / 'damaged' / '12').is_dir()
  helpers.assert_same_run(whole, path)


def test_only_checkpoints_without_params_are_no_new_run(whole, tmp_path):
  path = tmp_path / 'a'
  shutil.copytree(whole, path)
  for params in path.glob('checkpoints/*/params'):
    shutil.rmtree(params)
  with pytest.raises(UserError, match='All checkpoints of .* are damaged'):
    loop.train(helpers.config(), path)


def test_missing_metadata_is_named(whole, tmp_path, monkeypatch):
  class Handle:
    __enter__ = lambda self: self
    __exit__ = lambda *_: None
    metadata = lambda *_: types.SimpleNamespace(item_metadata=None)

  monkeypatch.setattr(checkpoint.ocp, 'Checkpointer', lambda _: Handle())
  with pytest.raises(checkpoint.Damaged, match='its metadata is damaged'):
    checkpoint.abstract_item(address.item(whole, 12, 'params'))


def test_fingerprint_sees_bits_swaps_and_not_sharding():
  x = jnp.arange(64.0).reshape(8, 8)
  mark = int(fingerprint.of({'x': x})['x'])
  swapped = x[jnp.array([1, 0, *range(2, 8)])]
  flipped = np.array(x)
  flipped.view(np.uint32)[3, 3] ^= 1
  assert int(fingerprint.of({'x': swapped})['x']) != mark
  assert int(fingerprint.of({'x': jnp.asarray(flipped)})['x']) != mark
  mesh = jax.make_mesh((8,), ('data',))
  sharded = jax.device_put(
    x, NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  )
  assert int(fingerprint.of({'x': sharded})['x']) == mark


def test_every_setting_that_may_not_change_is_named(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'a')
  with pytest.raises(UserError, match='with another num_steps, seed; use'):
    loop.train(helpers.config(seed=1, num_steps=13), tmp_path / 'a')


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


def test_a_run_of_an_older_version_goes_on(whole, tmp_path, capsys):
  """Its config lacks fields: no change if they are off, a refusal otherwise."""
  shutil.copytree(whole, tmp_path / 'a')
  path = tmp_path / 'a' / 'config.json'
  old = json.loads(path.read_text())
  del (
    old['qk_clip'],
    old['project'],
    old['model']['init'],
    old['optimizer']['b1'],
  )
  path.write_text(json.dumps(old))
  for bad in ({'qk_clip': 100.0}, {'optimizer__b1': 0.8}):
    with pytest.raises(UserError, match='was started with another'):
      loop.train(helpers.config(**bad), tmp_path / 'a')
  capsys.readouterr()
  run = run_lib.Run(tmp_path / 'a')
  assert np.isfinite(run.losses(run.params()).mean())
  assert loop.train(helpers.config(), tmp_path / 'a') == 'done'
  assert '->' not in capsys.readouterr().out
  helpers.assert_same_run(whole, tmp_path / 'a')


def test_a_branch_tells_its_changes_and_a_jump_of_the_rate(
  whole, tmp_path, capsys
):
  same = {'branch': f'{whole}@8', 'schedule__decay': 0.25}
  for name, rate in (('same', 3e-3), ('jump', 4e-3)):
    config = helpers.config('schedule=wsd', learning_rate=rate, **same)
    loop.train(config, tmp_path / name)
  quiet, told = capsys.readouterr().out.split(f'{tmp_path}/same: branched')
  assert quiet == f'unlike {whole}: schedule.decay 0.2 -> 0.25\n'
  assert f'unlike {whole}: learning_rate 0.003 -> 0.004, schedule' in told
  assert f'jumps: 4.000e-03 after step 8, 3.000e-03 in {whole}.\n' in told


def test_branch_data_restart_sees_other_batches(whole, tmp_path):
  config = helpers.config(branch=f'{whole}@4', branch_data='restart')
  loop.train(config, tmp_path)
  a, b = (run_lib.Run(r).metrics['train/loss'] for r in (whole, tmp_path))
  assert b.value[0] != a.value[4]
  assert b.step[0] == 4
  # A range test of such a branch, whatever is stored, sees its first batch.
  ranged = helpers.config(
    branch=f'{whole}/.@4', branch_data='restart', checkpoint__moment=True
  )
  swept = np.full(4, config.learning_rate)
  losses, _ = range_training.train(ranged, 'learning_rate', swept)
  np.testing.assert_allclose(losses, b.value[1:4], rtol=1e-6)


def test_tokens_of_a_branch_go_on_from_those_of_its_parent(whole, tmp_path):
  twice = helpers.config(
    branch=f'{whole}@4', branch_data='restart', batch_size=16
  )
  loop.train(twice, tmp_path / 'a')
  third = helpers.config(branch=f'{tmp_path}/a@8', branch_data='restart')
  loop.train(third, tmp_path / 'b')
  before, a, b = (
    run_lib.Run(r).metrics['tokens']
    for r in (whole, tmp_path / 'a', tmp_path / 'b')
  )
  each = before.value[1] - before.value[0]
  np.testing.assert_array_equal(a.value, each * (4 + 2 * (a.step - 4)))
  np.testing.assert_array_equal(b.value, each * (12 + (b.step - 8)))
  row = ranking.row('a', None, [], [run_lib.Run(tmp_path / 'a')])
  assert row.tokens == 20 * each


def test_a_branch_continues_data_that_its_parent_began_again(whole, tmp_path):
  """The batch at step n is that of the parent at step n, and so on."""
  first = helpers.config(branch=f'{whole}@4', branch_data='restart')
  loop.train(first, tmp_path / 'b')
  for name, parent, step in (('c', 'b', 8), ('d', 'c', 12)):
    config = helpers.config(branch=f'{tmp_path / parent}@{step}', num_steps=16)
    loop.train(config, tmp_path / name)
    run = run_lib.Run(tmp_path / name)
    assert run.meta['data_offset'] == 4
    assert config.branch_data == run.config.branch_data == 'continue'
    before = run_lib.Run(tmp_path / parent).metrics['train/loss']
    after = run.metrics['train/loss']
    both = np.intersect1d(before.step, after.step)
    assert both.size == 4
    old = before.value[before.step >= step]
    np.testing.assert_array_equal(old, after.value[: old.size])
  assert trials.Trials(tmp_path)._finished(
    tmp_path / 'd', helpers.config(branch=f'{tmp_path}/c@12', num_steps=16)
  )
  # At a resume it is the same run, whatever word and path are given for it.
  again = helpers.config(branch=f'{tmp_path}/./c/@12', num_steps=16)
  assert loop.train(again, tmp_path / 'd') == 'done'
  again.branch_data = 'restart'
  with pytest.raises(UserError, match='another branch_data'):
    loop.train(again, tmp_path / 'd')


def test_init_takes_parameters_only(whole, tmp_path):
  loop.train(helpers.config(init=f'{whole}@12', num_steps=2), tmp_path)
  start = helpers.leaves(tmp_path, 0, 'params')
  for key, value in helpers.leaves(whole, 12, 'params').items():
    np.testing.assert_array_equal(start[key], value)
  train = helpers.leaves(tmp_path, 0, 'train')
  assert all(v.sum() == 0 for k, v in train.items() if 'mu' in k)


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


def test_two_processes_do_not_train_in_one_directory(whole, monkeypatch):
  handle = loop.card._lock(whole)
  with pytest.raises(UserError, match='Another process is training'):
    loop.train(helpers.config(), whole)
  handle.close()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
  built = loop.build(helpers.config())
  with jax.set_mesh(built.mesh):
    state = built.init()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    bad = jax.tree.map(lambda x: x.at[...].set(np.nan), state.params)
    assert not checkpoints.save(state.replace(params=bad), 1, {'step': 1})
    assert checkpoints.save(state, 2, {'step': 2})
    checkpoints.close()
  assert address.steps(tmp_path) == [2]
