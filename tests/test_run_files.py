"""Files of a run that somebody edited or a crash cut: one sentence names it."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from configs import base
from launch.parts import trials
from lm import (
  address,
  card,
  foreign_logs,
  log,
  loop,
  origin,
  processes,
  spec,
)
from lm import run as run_lib
from lm.errors import UserError
from merging.engine import chunks, sources
from tests import helpers, tools


@pytest.fixture
def run(whole, tmp_path):
  """A copy that may be changed."""
  return shutil.copytree(whole, tmp_path / 'a')


def _edit(path, field, value):
  """Sets a field of a JSON file, by dotted name; ... removes it."""
  content = json.loads(path.read_text())
  place, *rest = content, *field.split('.')
  for key in rest[:-1]:
    place = place[key]
  place[rest[-1]] = value
  if value is ...:
    del place[rest[-1]]
  path.write_text(json.dumps(content))


@pytest.mark.parametrize(
  ('field', 'value', 'sentence'),
  [
    ('num_steps', 'x', "num_steps cannot be 'x'"),
    ('num_steps', False, 'num_steps cannot be False'),
    ('batch_size', True, 'batch_size cannot be True'),
    ('optimizer', 'adamw', 'optimizer.name is missing'),
    ('schedule', {}, 'schedule.name is missing'),
    ('model', [], 'model.num_layers is missing'),
    ('model.rope_theta', '1e4', "model.rope_theta cannot be '1e4'"),
    ('data.train', None, 'data.train is missing'),
    ('eval.num_sequences', 1.5, 'eval.num_sequences cannot be 1.5'),
    ('data.order', 1, 'data.order cannot be 1'),
  ],
)
def test_an_edited_config_is_one_sentence(run, field, value, sentence):
  _edit(run / 'config.json', field, value)
  for read in (
    lambda: run_lib.Run(run).config,
    lambda: foreign_logs.read(str(run)),
    lambda: card.check_config(run, helpers.config(), 12),
  ):
    with pytest.raises(UserError, match=f'config.json of a run: {sentence}'):
      read()


def test_a_run_older_than_knobs_of_the_model_has_their_defaults(run):
  before = log.read_config(run)
  for knob in log._MODEL:
    _edit(run / 'config.json', f'model.{knob}', ...)
  assert log.read_config(run) == before
  assert log._MODEL.items() <= base.get_config().model.to_dict().items()


def test_another_function_of_the_same_parameters_is_told(run, tmp_path, capsys):
  for i, start in enumerate(({'init': str(run)}, {'branch': f'{run}@12'})):
    changed = {'model__activation': 'gelu', 'num_steps': 16, **start}
    loop.train(helpers.config(**changed), tmp_path / f'b{i}')
    assert '(trained with model.activation=silu)' in capsys.readouterr().out


def test_the_types_are_those_of_the_configs():
  config = base.get_config()
  for field, kind in {**log._FIELDS, **log._NEWER}.items():
    value = config
    for key in field.split('.'):
      value = value[key]
    assert isinstance(value, kind), field


@pytest.mark.parametrize(
  ('field', 'value', 'sentence'),
  [
    ('status', 3, 'status cannot be 3'),
    ('status', ..., 'status is missing'),
    ('step', 'x', "step cannot be 'x'"),
    ('parent', [], r'parent cannot be \[\]'),
    ('starts', '2', "starts cannot be '2'"),
  ],
)
def test_an_edited_meta_is_one_sentence(run, field, value, sentence):
  _edit(run / 'meta.json', field, value)
  for read in (
    lambda: run_lib.Run(run).meta,
    lambda: foreign_logs.read(str(run)),
    lambda: card.Card(run, helpers.config(), ''),
  ):
    with pytest.raises(UserError, match=f'meta.json of a run: {sentence}'):
      read()


@pytest.mark.parametrize('parent', ['{}@x', '{}', 'elsewhere@4', ''])
def test_an_edited_parent_is_no_parent(run, monkeypatch, capsys, parent):
  _edit(run / 'meta.json', 'parent', parent.format(run))
  arguments = [f'--run={run}', f'--against={run}']
  assert tools.call(monkeypatch, 'emulate', *arguments) == 2
  assert f'error: {run} is not a branch of {run}' in capsys.readouterr().err


@pytest.mark.parametrize('value', [None, 'x', []])
def test_an_edited_checkpoint_meta_is_one_sentence(run, value):
  _edit(address.item(run, 12, 'meta') / 'metadata', 'mean_start', value)
  with pytest.raises(ValueError, match='metadata. cannot be read'):
    sources.mean_steps(run, end=12, window=8)
  with pytest.raises(ValueError, match='window=-8 must be at least 1'):
    sources.mean_steps(run, end=12, window=-8)
  with pytest.raises(UserError, match='begins at step 0: no mean ends there'):
    run_lib.Run(run).mean(0)


def test_cut_files_of_a_run_are_one_sentence(run):
  for name, read in (
    ('schedules/multiplier.npz', lambda: run_lib.Run(run).schedule()),
    ('meta.json', lambda: foreign_logs.read(str(run))),
    ('config.json', lambda: foreign_logs.read(str(run))),
  ):
    (run / name).write_bytes((run / name).read_bytes()[:40])
    with pytest.raises(UserError, match=name):
      read()


def _read_both(run):
  """The training loss as the tools see it, and as notebooks do."""
  found = foreign_logs.read(str(run)).tags, run_lib.Run(run).metrics
  return [x['train/loss'] for x in found]


@pytest.mark.parametrize('cut', [b'{"step": 13, "tr', b'{"step": 13, "\xc3'])
def test_a_cut_last_line_of_the_metrics_is_left_out(whole, run, cut):
  with (run / 'metrics.jsonl').open('ab') as f:
    f.write(cut)
  want = run_lib.Run(whole).metrics['train/loss']
  for got in _read_both(run):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  'line', [b'\xff\xfe1', b'{"step": 13, "tr', b'{"loss": 1}', b'5', b'[[]]',
           b'{"step": "x"}'],
)  # fmt: skip
def test_a_damaged_line_of_the_metrics_is_named(run, line):
  path = run / 'metrics.jsonl'
  lines = path.read_bytes().splitlines()
  path.write_bytes(b'\n'.join([*lines[:3], line, *lines[3:], b'']))
  with pytest.raises(UserError, match="line 4 of '.*metrics.jsonl' is damaged"):
    run_lib.Run(run).metrics  # noqa: B018
  with pytest.raises(UserError, match="line 4 of '.*metrics.jsonl' is damaged"):
    log.Metrics(run, 13)


@pytest.mark.parametrize('name', ['predict', 'refine', 'plot_schedule'])
@pytest.mark.parametrize('damage', ['utf-16', 'line'])
def test_tools_name_metrics_that_cannot_be_read(
  run, monkeypatch, tmp_path, capsys, name, damage
):
  path = run / 'metrics.jsonl'
  text = path.read_text()
  path.write_text(text, encoding='utf-16')
  if damage == 'line':
    path.write_text(text + '{"step"\n')
  monkeypatch.chdir(tmp_path)
  flag = 'run' if name == 'refine' else 'runs'
  assert tools.call(monkeypatch, name, f'--{flag}={run}') == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert str(run) in error


def test_code_that_changes_inside_a_run_is_told_and_kept(
  run, monkeypatch, capsys
):
  old = log.read_meta(run)
  assert loop.train(helpers.config(), run) == 'done'
  assert 'warning' not in capsys.readouterr().out
  monkeypatch.setattr(spec, 'code_hash', lambda package, name: package[0] * 16)
  started = {**log.read_meta(run), 'step': 15}  # of a save that was killed
  log.write_json(run / 'meta.json', started)
  for _ in range(2):  # told once
    assert loop.train(helpers.config(), run) == 'done'
  told = capsys.readouterr().out
  assert (
    told.count('optimizers/adamw.py (or what it imports, or parts/) has') == 1
  )
  assert 'since step 12' in told
  new = log.read_meta(run)
  assert (
    new['code_before'] == {'12': old['code']} and new['code'] != old['code']
  )
  arguments = [f'--run={run}', '--end=8', '--window=8', '--dry_run']
  assert tools.call(monkeypatch, 'merge', *arguments) == 0
  assert 'changed at step' not in capsys.readouterr().out  # not in the window
  log.write_json(run / 'meta.json', {**new, 'code_before': {'4': old['code']}})
  assert tools.call(monkeypatch, 'merge', *arguments) == 0
  assert 'changed at step 4;' in capsys.readouterr().out
  with pytest.raises(UserError, match='was trained with other code'):
    trials.Trials(run.parent).check('a', helpers.config(), run)


def test_a_config_that_was_edited_is_told(run, capsys):
  log.write_json(
    run / 'config.json', card.as_dict(helpers.config(learning_rate=0.5))
  )
  for _ in range(2):  # told once
    assert loop.train(helpers.config(learning_rate=0.5), run) == 'done'
  told = capsys.readouterr().out
  assert told.count('was edited: the steps until 12 are of another config') == 1


def test_other_code_of_lm_is_told(run, monkeypatch, capsys):
  """It may change no number, so nothing is refused."""
  monkeypatch.setattr(origin, 'library', lambda: '0' * 16)
  found = trials.Trials(run.parent)
  found.train(run, helpers.config())
  assert found.note().endswith('; warning: 1 with other code of lm/.')
  capsys.readouterr()
  assert loop.train(helpers.config(), run) == 'done'
  assert 'code of lm/ has changed since step 12' in capsys.readouterr().out
  assert log.read_meta(run)['code_of_lm'] == '0' * 16


def test_processes_compare_config_data_and_code(run, monkeypatch):
  texts = {}
  monkeypatch.setattr(processes, 'check_alike', texts.__setitem__)
  monkeypatch.setattr(processes, 'check_fields', texts.__setitem__)
  assert loop.train(helpers.config(), run) == 'done'
  before = texts['The code']
  monkeypatch.setattr(spec, 'code_hash', lambda package, name: package[0] * 16)
  assert loop.train(helpers.config(), run) == 'done'
  assert texts['config'] == card.as_dict(helpers.config())
  assert {'The data', 'The code'} <= texts.keys()
  assert texts['The code'] != before


def test_the_field_that_processes_have_not_in_common_is_named(monkeypatch):
  other = iter(['hash', 'optimizer, seed', '{"b1": 0.5}'])
  monkeypatch.setattr(processes, 'gather', lambda text: [text, next(other)])
  with pytest.raises(UserError, match='config.optimizer must be .*0: {"b1": 1'):
    processes.check_fields('config', {'seed': 0, 'optimizer': {'b1': 1}})
  # All that is gathered is alike, but not the hash of all there is.
  other = iter(['hash', 'seed', '0'])
  with pytest.raises(UserError, match='The config must be the same'):
    processes.check_fields('config', {'seed': 0})
  monkeypatch.setattr(processes, 'gather', lambda text: [text, text])
  processes.check_fields('config', {'seed': 0})


def test_data_that_changed_are_told(run, tmp_path, capsys):
  """To who evaluates, and to a branch that reads them by the same names."""
  _edit(run / 'meta.json', 'data_fingerprint', 'before')
  assert run_lib.Run(run).data
  assert 'was trained on before, its losses' in capsys.readouterr().out
  c = helpers.config(branch=f'{run}@8')
  assert loop.train(c, tmp_path / 'b') == 'done'
  assert f'changed since {run} was trained' in capsys.readouterr().out
  c.seed = 1  # another order of data by its config
  assert loop.train(c, tmp_path / 'c') == 'done'
  assert 'data have changed' not in capsys.readouterr().out
  (run / 'meta.json').unlink()  # a copy of config and checkpoints is enough
  assert loop.train(c, tmp_path / 'd') == 'done'


def test_parameters_of_merges(run, tmp_path, monkeypatch, capsys):
  """By name, as the README has it; outside of a run there is no config."""
  arguments = [f'--run={run}', '--name=m', '--end=8', '--window=8']
  assert tools.call(monkeypatch, 'merge', *arguments) == 0
  a, b = (run_lib.Run(run).params(name) for name in ('m', 'merged/m'))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  at = f'--at={run},{run}/merged/m'
  assert tools.call(monkeypatch, 'evaluate', at) == 0
  assert re.search(r'm │ .* │ [+-]0\.\d{4} ±0', capsys.readouterr().out)
  shutil.move(run / 'merged' / 'm', tmp_path / 'alone')
  assert tools.call(monkeypatch, 'evaluate', f'--at={tmp_path}/alone') == 2
  assert "alone' is a merge outside of a run" in capsys.readouterr().err
  config = helpers.config(init=f'{tmp_path}/alone', num_steps=1)
  assert loop.train(config, tmp_path / 'next') == 'done'
  chunk = next((tmp_path / 'alone').rglob('0.0*'))
  for damage in (lambda: chunk.write_bytes(b'cut'), chunk.unlink):
    damage()
    with pytest.raises(UserError, match="alone/params' is unreadable: "):
      loop.train(config, tmp_path / 'other')


def test_small_arrays_are_stored_whole_though_each_device_has_them(run):
  """By default Orbax cuts them into a slice for each of the 8 devices."""
  stored = chunks.values(address.item(run, 4, 'params'))
  names = [key.removesuffix('/.zarray') for key in stored if '.zarray' in key]
  assert run_lib.Run(run).meta['devices']['count'] == 8 and len(names) > 8
  for name in names:
    assert len(chunks.layout(stored, name).array.numbers()) == 1, name
