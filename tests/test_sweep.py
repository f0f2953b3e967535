"""launch.sweep: its table, its picture, and the command."""

import importlib
import json
import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from launch.parts import schedule_pictures, sweeps, trials
from lm.run import Run
from tests import helpers, tools

ROOT = pathlib.Path(__file__).parents[1]

_FILE = """
from configs import debug


def get_config(arg=''):
  c = debug.get_config(arg)
  c.num_steps = 6
  c.eval.every_steps = 3
  return c


def sweep(arg=''):
  return {
    f'{name}-{rate}-{seed}': {
      'optimizer': name, 'learning_rate': rate, 'seed': seed
    }
    for name in ('adamw', 'lion') for rate in (1e-3, 1e-2) for seed in (0, 1)
  }
"""


def _methods(rows):
  return {
    str(i): trials.Method(str(i), {'optimizer': r.pop('optimizer', 'a')}, r)
    for i, r in enumerate(rows)
  }


def test_groups_are_alike_but_for_the_seed():
  rows = [
    {'optimizer': name, 'rate': rate, 'same': 3, 'seed': seed}
    for name in ('a', 'b')
    for rate in (0.1, 10.0)
    for seed in (0, 1)
  ]
  losses = [3.0, 3.2, 2.0, 2.2, 5.0, math.inf, 4.0, 4.4]
  seeds = [0, 1] * 4
  found = sweeps.groups(_methods(rows), seeds, losses)
  assert [g.values for g in found[:2]] == [
    {'optimizer': 'a', 'rate': 0.1},
    {'optimizer': 'a', 'rate': 10.0},
  ]
  header, body = sweeps.table(found)
  assert header == ['optimizer', 'rate', 'seeds', 'loss']
  low, high = stats.ttest_1samp([2.0, 2.2], 0).confidence_interval(0.95)
  assert body[1] == ['a', '10', '2', f'2.1000 ±{(high - low) / 2:.4f} *']
  assert body[2][-1] == '1 of 2 diverged'
  assert sweeps.axis(found) == 'rate'
  lines = sweeps.lines(found, 'rate')
  assert [g.values['rate'] for g in lines['a']] == [0.1, 10.0]
  assert lines['b'][1].losses == {0: 4.0, 1: 4.4}
  header, body = sweeps.bests(found, 'rate')
  assert header == ['optimizer', 'best rate', 'loss', 'minus a']
  assert body[0][:2] == ['a', '10 or higher'] and body[0][3] == ''
  low, high = stats.ttest_rel([4.0, 4.4], [2.0, 2.2]).confidence_interval(0.95)
  assert body[1][1:] == [
    '10 or higher', sweeps.table(found)[1][3][-1],
    f'+2.1000 ±{(high - low) / 2:.4f}',
  ]  # fmt: skip
  (ax,) = schedule_pictures.sweep(lines, 'rate').axes
  assert (ax.get_xlabel(), ax.get_xscale()) == ('rate', 'log')
  np.testing.assert_allclose(ax.lines[0].get_ydata(), [3.1, 2.1])


def test_keys_that_change_together_are_one_column():
  rows = [{'d': d, 'heads': d // 16, 'lr': r} for d in (32, 64) for r in (1, 2)]
  found = sweeps.groups(_methods(rows), [0] * 4, [1.0, 2.0, 3.0, 4.0])
  want = [{'d': d, 'lr': r} for d in (32, 64) for r in (1, 2)]
  assert [g.values for g in found] == want
  rows[3]['heads'] = 3
  found = sweeps.groups(_methods(rows), [0] * 4, [1.0, 2.0, 3.0, 4.0])
  assert [*found[0].values] == ['d', 'heads', 'lr']


def test_settings_of_equal_values_are_not_one_line():
  """b1 = 0.5 is not b2 = 0.5; and seeds are paired in any order."""
  rows = [{key: 0.5, 'rate': r, 'seed': s} for key in ('b1', 'b2')
          for r in (1.0, 2.0) for s in (0, 1)]  # fmt: skip
  losses = [4.0, 4.1, 3.0, 3.3, 6.0, 6.0, 5.0, 5.1]
  found = sweeps.groups(_methods(rows), [0, 1] * 3 + [1, 0], losses)
  assert [*sweeps.lines(found, 'rate')] == ['b1=0.5', 'b2=0.5']
  header, body = sweeps.bests(found, 'rate')
  assert header == ['b1', 'b2', 'best rate', 'loss', 'minus b1=0.5']
  assert [row[:3] for row in body] == [
    ['0.5', '-', '2 or higher'],
    ['-', '0.5', '2 or higher'],
  ]
  # Seed 0: 5.1 - 3.0; seed 1: 5.0 - 3.3.
  low, high = stats.ttest_1samp([2.1, 1.7], 0).confidence_interval(0.95)
  assert body[1][-1] == f'+1.9000 ±{(high - low) / 2:.4f}'


def test_a_best_inside_is_no_end_and_unequal_seeds_have_no_difference():
  rows = [{'optimizer': n, 'rate': r} for n in 'ab' for r in (1, 2, 3)]
  found = sweeps.groups(
    _methods(rows), [0, 0, 0, 0, 1, 0], [2.0, 1.0, 2.0, 3.0, 2.0, 2.5]
  )
  assert [row[1] for row in sweeps.bests(found, 'rate')[1]] == ['2', '2']
  assert [row[3] for row in sweeps.bests(found, 'rate')[1]] == ['', '']


def test_the_baseline_is_the_first_setting():
  """Not the one with the least value."""
  rows = [
    {'optimizer': n, 'rate': r}
    for n, rates in (('adamw', (3, 2)), ('muon', (2, 1)))
    for r in rates
  ]
  found = sweeps.groups(_methods(rows), [0] * 4, [1.0, 2.0, 3.0, 4.0])
  assert [*sweeps.lines(found, 'rate')] == ['adamw', 'muon']
  header, body = sweeps.bests(found, 'rate')
  assert header[-1] == 'minus adamw' and body[1][-1] == '+2.0000'


def test_of_equal_numbers_the_learning_rate_is_the_axis():
  rows = [{'b1': b, 'learning_rate': r} for b in (1, 2) for r in (1, 2)]
  found = sweeps.groups(_methods(rows), [0] * 4, [1.0, 2.0, 3.0, 4.0])
  assert sweeps.axis(found) == 'learning_rate'


def test_no_numbers_no_axis():
  one = sweeps.groups(_methods([{'seed': 0}, {'seed': 1}]), [0, 1], [1.0, 2.0])
  assert len(one) == 1 and not sweeps.axis(one)
  words = _methods([{'schedule': 'a'}, {'schedule': 'b'}])
  assert not sweeps.axis(sweeps.groups(words, [0, 0], [1.0, 2.0]))
  # A field that some settings leave out is not an axis.
  some = _methods([{'b1': 0.5}, {'b1': 0.9}, {'optimizer': 'b'}])
  assert not sweeps.axis(sweeps.groups(some, [0] * 3, [1.0, 2.0, 3.0]))


def test_the_command(tmp_path, monkeypatch, capsys):
  """As a user: twice, and every mistake a sentence before any training."""
  file, out = tmp_path / 'x.py', tmp_path / 'out'
  file.write_text(_FILE)
  words = f'--config={file}', f'--workdir={out}', '--config.batch_size=8'
  done = helpers.command('launch.sweep', *words)
  assert 'Next: tensorboard' in done.stdout and ' * ' in done.stdout
  found = json.loads((out / 'sweep.json').read_text())['runs']
  assert [row['name'] for row in found[:2]] == [
    'adamw-0.001-0',
    'adamw-0.001-1',
  ]
  for row in found:
    run = Run(out / row['name'])
    assert run.metrics['eval/loss'].value[-1] == row['loss']
    config = run.config
    assert (config.optimizer.name, config.learning_rate, config.seed) == tuple(
      row['settings'].values()
    )
    assert (config.batch_size, config.num_steps) == (8, 6)
  assert len({row['loss'] for row in found}) == 8
  assert (out / 'sweep.png').read_bytes()[:4] == b'\x89PNG'
  # Alone, it is the same run, bit for bit.
  alone = tmp_path / 'alone'
  helpers.command(
    'launch.train', f'--config={file}:optimizer=lion', f'--workdir={alone}',
    '--config.batch_size=8', '--config.learning_rate=0.01', '--config.seed=1',
  )  # fmt: skip
  assert Run(alone).metrics['eval/loss'].value[-1] == found[-1]['loss']

  assert tools.call(monkeypatch, 'sweep', *words) == 0
  assert '8 of 8 runs had been trained before' in capsys.readouterr().out

  assert tools.call(monkeypatch, 'sweep', *words, '--config.num_steps=7') == 2
  assert 'was trained with num_steps=6, not 7' in capsys.readouterr().err


# Not configs/papers/defazio2023_refined.py, which reads a run.
SWEEPS = sorted(
  p
  for p in ROOT.glob('configs/**/*.py')
  if 'def sweep' in p.read_text() and 'refined' not in p.name
)


@pytest.mark.parametrize('path', SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_of_configs(path, tmp_path, monkeypatch, capsys):
  """All that comes before and after the training, which gives one number."""
  trained = []

  def train(_, run, config):
    trained.append(run.name)
    return 1.0 + config.learning_rate + config.seed

  monkeypatch.setattr(trials.Trials, 'train', train)
  words = f'--config={path}', f'--workdir={tmp_path}'
  assert tools.call(monkeypatch, 'sweep', *words) == 0
  assert len(trained) >= 10
  rows = json.loads((tmp_path / 'sweep.json').read_text())['runs']
  assert len(rows) == len(trained)
  assert 'wrote' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('returned', 'sentence'),
  [
    ('{}', 'sweep() returns no {name: {key: value}}, but {}'),
    ('[1]', 'sweep() returns no {name: {key: value}}, but [1]'),
    ("{'a/b': {}}", "names a setting 'a/b'; legal: at most 200 letters"),
    ("{'a': 3}", "the setting 'a' is no {key: value}, but 3"),
    ("{'a': {'rate': 3}}", "no field 'rate'"),
    ("{'a': {'optimizer': 'lions'}}", "Did you mean 'lion'"),
    ("{'a': {}, 'b': {'learning_rate': -1.0}}", 'learning_rate=-1.0 must be'),
    (
      "{'a': {'num_steps': 'x'}}",
      "The setting 'a': num_steps='x' must be an integer",
    ),
    ("{'a': {'model': {'d_model': 16}}}", "'model' is a section, which takes"),
    ("{'sweep.json': {}}", "names a setting 'sweep.json'"),
    ("{'a': {}, 'b': {'seed': 0}}", "'a' and 'b' are the same run"),
    ("{'a': {'optimizer': 'lion,size=tiny'}}", "has optimizer='lion,size"),
    ("{'a': {}, 'b': {'branch': '/nope@2'}}", "The setting 'b': '/nope"),
    ("{'a': {}, 'b': {'init': '/nope@2'}}", "The setting 'b': '/nope"),
    ("{'a': {'init': '/x@2'}, 'b': {'branch': '/y@2'}}", 'either: b.'),
    ("{'b': {'init': '/nope'}}", "init='/nope' must name the step"),
    ("{'b': {'init': '/nope/merged/a'}}", "The setting 'b': '/nope"),
    ("{'a': {'batch_size': 4}}", "'--config.batch_size=16' is given, and"),
    ('1 / 0', 'division by zero'),
  ],
)
def test_mistakes_come_before_training(
  returned, sentence, tmp_path, monkeypatch, capsys
):
  file = tmp_path / 'x.py'
  file.write_text(
    'from configs.debug import get_config\n'
    f"def sweep(arg=''):\n  return {returned}\n"
  )
  words = f'--config={file}', f'--workdir={tmp_path}/out'
  words += ('--config.batch_size=16',)
  assert tools.call(monkeypatch, 'sweep', *words) == 2
  output = capsys.readouterr()
  assert sentence in output.err and output.err.count('error: ') == 1
  assert not [*tmp_path.glob('out/*/meta.json')]


def test_a_field_whose_name_begins_alike_may_be_given(
  tmp_path, monkeypatch, capsys
):
  """init_state beside a sweep over init, init_std beside model.init."""
  file = tmp_path / 'x.py'
  file.write_text(
    'from configs.debug import get_config\n'
    "def sweep(arg=''):\n  return {'a': {'init': '/nope@2'}}\n"
  )
  words = f'--config={file}', f'--workdir={tmp_path}/out'
  more = '--config.init_state=True'
  assert tools.call(monkeypatch, 'sweep', *words, more) == 2
  assert "The setting 'a': '/nope" in capsys.readouterr().err
  assert tools.call(monkeypatch, 'sweep', *words, '--config.init=/b@1') == 2
  assert "'--config.init=/b@1' is given, and" in capsys.readouterr().err


def test_a_file_without_a_sweep(tmp_path, monkeypatch, capsys):
  words = '--config=configs/debug.py', f'--workdir={tmp_path}/out'
  assert tools.call(monkeypatch, 'sweep', *words) == 2
  assert 'has no sweep(); for example configs/sweep.py' in (
    capsys.readouterr().err
  )
  assert tools.call(monkeypatch, 'sweep') == 2
  assert '--workdir is missing' in capsys.readouterr().err


def test_an_optimizer_that_raises_is_refused_before_training(
  tmp_path, monkeypatch, capsys
):
  """When it is traced; and a rate may be a number of numpy."""
  lion = importlib.import_module('optimizers.lion')
  monkeypatch.setattr(lion, 'descend', lion.descend)  # put back at the end
  file = tmp_path / 'x.py'
  file.write_text(
    'import numpy as np\nimport optax\nfrom configs.debug import get_config\n'
    'import importlib\nlion = importlib.import_module("optimizers.lion")\n'
    'def update(*_):\n  raise ZeroDivisionError("mine")\n'
    'lion.descend = lambda *a, **k: optax.GradientTransformation('
    'optax.sgd(1.0).init, update)\n'
    "def sweep(arg=''):\n  return {"
    "'a': {'learning_rate': np.float64(1e-3)}, 'b': {'optimizer': 'lion'}}\n"
  )
  words = f'--config={file}', f'--workdir={tmp_path}/out'
  assert tools.call(monkeypatch, 'sweep', *words) == 2
  error = capsys.readouterr().err
  assert "The setting 'b': " in error and 'ZeroDivisionError: mine' in error
  assert error.count('\n') == 1 and not [*tmp_path.glob('out/*/meta.json')]
