"""launch.compare: the statistics, and the command."""

import json
import math
import os
import pathlib
import signal

import numpy as np
import pytest
from scipy import stats

from launch.parts import fairness, ranking, schedule_pictures, trials, tuning
from lm import card, spec
from lm.foreign_logs import Series
from tests import helpers, tools


def _row(name, losses, tokens=1000, **searches):
  curve = Series(np.array([0, 10]), np.array([5.0, 3.0]))
  tuned = tuning.Tuned(
    {k: x.best for k, x in searches.items()},
    searches,
    sum(len(x.losses) for x in searches.values()),
  )
  return ranking.Row(
    name, tuned, np.array(losses), [curve] * len(losses), tokens
  )


def test_table_is_paired_by_seed():
  rate = tuning.Found({1.0: 3.0, 2.0: 2.0, 4.0: 2.5}, 2.0, '')
  edge = tuning.Found({1.0: 3.0}, 1.0, 'lower')
  a, b = [2.0, 3.0, 4.0], [1.9, 2.8, 3.9]
  rows = [
    _row('a', a, learning_rate=rate),
    _row('b', b, 2500, learning_rate=edge),
    _row('c', [2.0, math.inf, 1.0], learning_rate=rate),
  ]
  header, body = ranking.table(rows)
  assert header[-2:] == ['loss', 'minus a']
  # By hand: differences -.1, -.2, -.1; t(2, 0.975) = 4.302653.
  half = 4.302653 * np.std([0.1, 0.2, 0.1], ddof=1) / math.sqrt(3)
  assert body[1][1:3] == ['1 or lower', '1']
  assert body[1][4:] == [f'-0.1333 ±{half:.4f}']
  assert ranking.legend(rows, ['NOT EQUAL']).endswith('NOT EQUAL')
  low, high = stats.ttest_1samp(a, 0).confidence_interval(0.95)
  assert body[0][3] == f'3.0000 ±{(high - low) / 2:.4f}'
  assert body[0][4] == '' and body[2][3:5] == ['1 of 3 diverged', '']
  numbers = json.loads(json.dumps(ranking.as_json(rows, [1, 2, 3])))
  assert numbers['methods'][1]['minus_first'][0] == pytest.approx(-0.4 / 3)
  assert numbers['methods'][2]['losses'] == [2.0, None, 1.0]
  assert numbers['methods'][2]['minus_first'] is None
  assert '| b | 1 or lower |' in ranking.markdown(rows, 'command')


def test_what_makes_methods_unequal_is_told():
  """Losses on other tokens have no difference; data in another order may."""
  names = {
    'a': {},
    'b': {'eval__num_sequences': 8},
    'c': {'num_steps': 24},
    'd': {'model__num_layers': 2},
    'e': {'optimizer__b1': 0.5, 'seed': 7, 'model__init': 'zero'},
    'f': {
      'data__order': 'ascend',
      'data__score': 'compressibility',
      'data__order_end': 4,
    },
    'g': {'num_steps': 24},
    'h': {'num_steps': 24},
    'i': {'num_steps': 24},
  }
  configs = [helpers.config(**fields) for fields in names.values()]
  measured = fairness.validations(configs)
  a, b, *others = measured
  assert a != b and {*others} == {a}
  assert fairness.validations([configs[0], configs[4]]) == ['', '']
  told = fairness.notes([*names], configs, measured)
  assert told == [
    'NOT EQUAL to a: b: measured on other tokens (eval.num_sequences=8, not '
    f'{configs[0].eval.num_sequences}): not comparable.',
    'NOT EQUAL to a: c, g, h and 1 more: trained on 2 times the tokens.',
    'NOT EQUAL to a: d: another model (model.num_layers=2, not 1).',
  ]
  rows = [_row('a', [2.0, 3.0]), _row('b', [1.9, 2.8])]
  rows[1].measured = b
  assert ranking.table(rows)[1][1][-1] == 'other tokens'
  assert ranking.as_json(rows, [1, 2])['methods'][1]['minus_first'] is None


def test_picture_shows_every_best():
  """Of every search, and the ends of all curves, in any number of panels."""
  low = tuning.Found({1.0: 2.5, 2.0: 2.0, 4.0: 9.0}, 2.0, '')
  rows = [_row('a', [3.0, 3.1], rate=low), _row('b', [3.0], rate=low, b=low)]
  fig = schedule_pictures.ranking(rows)
  assert [ax.get_xlabel() for ax in fig.axes] == ['rate', 'b', 'step']
  for ax in fig.axes:
    bottom, top = ax.get_ylim()
    assert bottom < min(min(x.get_ydata()) for x in ax.lines) < top
  zero = tuning.Found({0.0: 2.0, 0.5: 2.5, 1.0: 3.0}, 0.0, '')
  fig = schedule_pictures.ranking([_row('a', [3.0], rate=low, b=zero)])
  assert [ax.get_xscale() for ax in fig.axes[:2]] == ['log', 'linear']
  (only,) = schedule_pictures.ranking([_row('a', [3.0])]).axes
  assert only.get_xlabel() == 'step'
  assert only.get_ylim()[1] > 5  # of two evaluations, both are to be seen


def test_what_diverged_is_in_the_picture_beside_others():
  rate = tuning.Found({1.0: 2.5, 2.0: 2.0, 4.0: math.inf}, 2.0, '')
  rows = [_row(name, [3.0, math.inf], rate=rate) for name in 'ab']
  short = Series(np.array([0]), np.array([5.0]))
  rows[1].curves[1] = short  # until there, the mean can be drawn
  fig = schedule_pictures.ranking(rows)
  at = [
    line.get_transform().transform(line.get_xydata())[0]
    for line in fig.axes[0].lines
    if line.get_marker() == 'x'
  ]
  assert len(at) == 2 and at[0][0] == at[1][0] and at[1][1] - at[0][1] > 6
  (legend,) = fig.legends
  texts = [text.get_text() for text in legend.get_texts()]
  assert texts == ['a (1 of 2 diverged)', 'b (1 of 2 diverged)']


def test_code_hashes_know_their_own_file_and_the_parts(tmp_path, monkeypatch):
  package = tmp_path / 'methods'
  (package / 'parts').mkdir(parents=True)
  files = ('__init__.py', 'a.py', 'b.py', 'parts/c.py')
  for name in files:
    (package / name).write_text('')
  monkeypatch.syspath_prepend(tmp_path)
  hashes = [spec.code_hash('methods', 'a')]
  for name in ('b.py', 'a.py', 'parts/c.py'):
    (package / name).write_text('x = 1')
    hashes.append(spec.code_hash('methods', 'a'))
  assert hashes[0] == hashes[1] and len(set(hashes)) == 3
  (package / 'a.py').write_text('"""What it does."""\nx = 1  # one')
  assert spec.code_hash('methods', 'a') == hashes[-1]
  # What is no Python is not run by anybody; what the parts import is.
  for text in ('x = (', 'from methods import b', 'from methods.b import x',
               'import methods.b', 'from .. import b'):  # fmt: skip
    (package / 'parts/c.py').write_text(text)
    (package / 'b.py').write_text('x = 2')
    before = spec.code_hash('methods', 'a')
    (package / 'b.py').write_text('x = 3')
    same = spec.code_hash('methods', 'a') == before
    assert same == (text == 'x = ('), text


def test_hashes_of_methods_know_those_that_they_are_made_of(monkeypatch):
  hashes = lambda: {n: spec.code_hash('optimizers', n)
                    for n in ('muon', 'normuon', 'signum')}  # fmt: skip
  before, read = hashes(), pathlib.Path.read_bytes
  edited = lambda path: read(path) + b'x = 1' * (path.name == 'muon.py')
  monkeypatch.setattr(pathlib.Path, 'read_bytes', edited)
  after = hashes()
  assert [before[n] != after[n] for n in before] == [True, True, False]


@pytest.mark.parametrize(
  ('text', 'choices', 'fields'),
  [
    ('muon', {'optimizer': 'muon'}, {}),
    ('schedule=wsd', {'schedule': 'wsd'}, {}),
    ('muon, schedule=wsd', {'optimizer': 'muon', 'schedule': 'wsd'}, {}),
    (
      'lion,optimizer.b1=0.8,z_loss=1e-4',
      {'optimizer': 'lion'},
      {'optimizer.b1': '0.8', 'z_loss': '1e-4'},
    ),
  ],
)
def test_methods(text, choices, fields, monkeypatch):
  monkeypatch.setattr(trials.Method, 'config', lambda self: None)
  method = trials.parse(text)
  assert (method.choices, method.fields) == (choices, fields)
  assert pathlib.Path(trials.folder(method)).name == trials.folder(method)


def test_the_command(tmp_path, monkeypatch, capsys):
  """As a user: two methods; again, with one more; every mistake a sentence."""
  words = [
    'launch.compare', '--config=configs/debug.py', f'--workdir={tmp_path}/a',
    '--config.num_steps=8', '--config.eval.every_steps=4', '--seeds=2',
    '--factor=8', '--most=3', '--method=adamw',
    '--method=lion,optimizer.b1=0.8',
  ]  # fmt: skip
  done = helpers.command(*words)
  assert 'minus adamw' in done.stdout and 'Next: tensorboard' in done.stdout
  found = json.loads((tmp_path / 'a' / 'compare.json').read_text())
  assert found['seeds'] == [100, 101]
  for row, name in zip(
    found['methods'], ('adamw', 'lion+optimizer.b1=0.8'), strict=True
  ):
    tried = dict(row['searches']['learning_rate'])
    rate = row['tuned']['learning_rate']
    assert len(tried) == 3 and tried[rate] == min(tried.values())
    for seed, loss in zip([100, 101], row['losses'], strict=True):
      run = tmp_path / 'a' / name / f'learning_rate={rate:.4g}-seed{seed}'
      assert helpers.lines(run)[-1]['eval/loss'] == loss
      config = json.loads((run / 'config.json').read_text())
      assert (config['seed'], config['learning_rate']) == (seed, rate)
      if name != 'adamw':
        assert config['optimizer']['b1'] == 0.8
  assert (tmp_path / 'a' / 'compare.png').read_bytes()[:4] == b'\x89PNG'

  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('metrics.jsonl')}
  again = helpers.command(*words, '--method=adamw,schedule=linear')
  assert '10 of 15 runs had been trained before' in again.stdout
  assert all(p.stat().st_mtime_ns == t for p, t in before.items())

  assert tools.call(monkeypatch, 'compare', *words[1:-1]) == 0
  output = capsys.readouterr().out
  assert 'had lion,optimizer.b1=0.8, adamw,schedule=linear, too.' in output

  for extra, sentence in (
    ('--config.eval.num_sequences=8', 'was trained with eval.num_sequences=16'),
    ('--method=adamww', "Did you mean 'adamw'"),
    ('--method=muon,optimizer.b9=1', "no field 'optimizer.b9'"),
    ('--method=adamw,seed=3', 'seeds are the same for all'),
    ('--method=adamw', 'is given twice'),
    ('--method=muon,', 'is empty or a second optimizer'),
    ('--tune=gamma', "'gamma' is repeated or no float of these"),
    ('--tune=learning_rate,learning_rate', 'is repeated or no float'),
    ('--factor=1', '--factor=1.0 must be'),
  ):
    assert tools.call(monkeypatch, 'compare', *words[1:], extra) == 2, extra
    output = capsys.readouterr()
    assert sentence in output.err and output.err.count('error: ') == 1
  meta = next((tmp_path / 'a' / 'adamw').glob('*seed100')) / 'meta.json'
  old = json.loads(meta.read_text())
  meta.write_text(json.dumps({**old, 'data_fingerprint': 'other'}))
  assert tools.call(monkeypatch, 'compare', *words[1:]) == 2
  output = capsys.readouterr()
  assert f'{meta.parent} was trained on other data' in output.err
  meta.write_text(json.dumps({**old, 'code': 'other'}))
  assert tools.call(monkeypatch, 'compare', *words[1:]) == 2
  output = capsys.readouterr()
  assert f'{meta.parent} was trained with other code' in output.err


_SHORT = [
  '--config=configs/debug.py:schedule=linear', '--config.num_steps=4',
  '--config.eval.every_steps=4', '--seeds=1', '--most=3', '--factor=8',
]  # fmt: skip


def _compare(monkeypatch, *arguments):
  return tools.call(monkeypatch, 'compare', *_SHORT, *arguments)


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--method=adamw,optimizer.decay=nonsense'], 'nonsense'),
    (['--method=adamw,model.num_heads=3'], 'num_kv_heads=2 must divide'),
    (['--method=adamw,optimizer.b1=1.5'], 'optimizer.b1=1.5 must be'),
    (
      ['--method=adamw,optimizer.weight_decay=0', '--tune=weight_decay'],
      'which no factor changes',
    ),
    ([f'--method=adamw,data.train={"x" * 300}'], 'legal: at most 200'),
    (['--config.seed=4294967290'], 'leaves no seeds for the final runs'),
    (['--config.branch=runs/x'], "branch='runs/x' must name the step"),
  ],
)
def test_mistakes_come_before_any_training(
  arguments, sentence, tmp_path, monkeypatch, capsys
):
  words = [f'--workdir={tmp_path}/a', '--method=sgdw', *arguments]
  assert _compare(monkeypatch, *words) == 2
  output = capsys.readouterr()
  assert sentence in output.err and output.err.count('error: ') == 1
  assert not list(tmp_path.rglob('config.json'))


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch, capsys):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'a' / 'compare.md').mkdir(parents=True)
  for place, sentence in (('file', 'cannot be used'), ('a', 'is a directory')):
    words = ['--method=adamw', f'--workdir={tmp_path}/{place}']
    assert _compare(monkeypatch, *words) == 2
    assert sentence in capsys.readouterr().err


def test_a_search_leaves_out_what_the_optimizer_refuses(tmp_path, monkeypatch):
  """Above b2, Lion-K has no b1."""
  words = ['--method=lion_k,optimizer.b1=0.97', '--tune=b1']
  assert not _compare(monkeypatch, f'--workdir={tmp_path}', *words)
  (row,) = json.loads((tmp_path / 'compare.json').read_text())['methods']
  tried = [value for value, _ in row['searches']['optimizer.b1']]
  assert len(tried) == 2 and max(tried) == pytest.approx(0.97)


def test_again_with_sorted_data_and_with_another_table(
  tmp_path, monkeypatch, capsys
):
  """The order of the data depends on the seed; a table on its file."""
  table = tmp_path / 'table.json'
  table.write_text('[1, 1, 1, 1]')
  words = [
    f'--workdir={tmp_path}/a', '--tune=', '--seeds=2',
    f'--method=schedule=table,schedule.path={table}',
    '--config.data.order=ascend', '--config.data.score=compressibility',
    '--config.data.order_end=4',
  ]  # fmt: skip
  for _ in range(2):
    assert not _compare(monkeypatch, *words)
  assert '2 of 2 runs had been trained before' in capsys.readouterr().out
  table.write_text('[1, 0, 0, 0]')
  assert _compare(monkeypatch, *words) == 2
  assert 'other code or tables of adamw or table' in capsys.readouterr().err


def test_a_signal_at_the_end_of_a_run_stops_the_comparison(
  tmp_path, monkeypatch, capsys
):
  finish = card.Card.finish

  def signalled(self, status):
    finish(self, status)
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(card.Card, 'finish', signalled)
  words = [f'--workdir={tmp_path}/a', '--method=adamw', '--tune=', '--seeds=2']
  assert _compare(monkeypatch, *words) == 143
  assert 'run the same command to continue' in capsys.readouterr().out
  assert len(list(tmp_path.rglob('config.json'))) == 1
  monkeypatch.setattr(card.Card, 'finish', finish)
  assert not _compare(monkeypatch, *words)
  assert '1 of 2 runs had been trained before' in capsys.readouterr().out
