"""launch.compare: the search, the statistics, and the command."""

import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from launch.parts import ranking, schedule_pictures, trials, tuning
from lm import spec
from lm.foreign_logs import Series
from tests import helpers


def _search(loss, start, factor=2.0, most=10, **more):
  order = []

  def measure(x):
    order.append(x)
    return loss(x)

  return tuning.search(measure, start, factor=factor, most=most, **more), order


@pytest.mark.parametrize('best', [1e-4, 3e-3, 0.7])
@pytest.mark.parametrize('factor', [2.0, 10.0])
def test_a_search_ends_beside_no_better_neighbour(best, factor):
  loss = lambda x: (math.log(x) - math.log(best)) ** 2
  found, order = _search(loss, 3e-3, factor, most=100)
  assert found.edge == '' and len(set(order)) == len(order)
  assert list(found.losses) == order
  assert abs(math.log(found.best / best)) <= math.log(factor) / 2 + 1e-9
  neighbours = [x for x in order if x != found.best]
  assert any(math.isclose(x, found.best * factor) for x in neighbours)
  assert any(math.isclose(x, found.best / factor) for x in neighbours)


def test_a_search_says_where_it_had_to_stop():
  found, order = _search(lambda x: -x, 1.0, most=5)
  assert (found.best, found.edge, len(order)) == (8.0, 'higher', 5)
  found, _ = _search(lambda x: x, 1.0, most=5)
  assert (found.best, found.edge) == (0.0625, 'lower')
  # What is not legal is not measured, and its neighbour is no edge.
  found, order = _search(lambda x: -x, 1.0, legal=lambda x: x <= 4)
  assert (found.best, found.edge, max(order)) == (4.0, '', 4.0)


def test_a_search_leaves_what_diverges():
  for bad in (math.inf, math.nan):
    found, order = _search(lambda x, b=bad: b if x > 0.3 else 1 / x, 8.0)
    assert (found.best, found.edge) == (0.25, '')
    assert order == [8, 4, 2, 1, 0.5, 0.25, 0.125]
    assert found.losses[8.0] == math.inf


def _row(name, losses, tokens=1000, **searches):
  curve = Series(np.array([0, 10]), np.array([5.0, 3.0]))
  tuned = trials.Tuned(
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
  (unequal,) = (x for x in ranking.legend(rows).splitlines() if 'NOT' in x)
  assert 'b trains on 2.5 times the tokens of a' in unequal
  low, high = stats.ttest_1samp(a, 0).confidence_interval(0.95)
  assert body[0][3] == f'3.0000 ±{(high - low) / 2:.4f}'
  assert body[0][4] == '' and body[2][3:5] == ['1 of 3 diverged', '']
  numbers = json.loads(json.dumps(ranking.as_json(rows, [1, 2, 3])))
  assert numbers['methods'][1]['minus_first'][0] == pytest.approx(-0.4 / 3)
  assert numbers['methods'][2]['losses'] == [2.0, None, 1.0]
  assert numbers['methods'][2]['minus_first'] is None
  assert '| b | 1 or lower |' in ranking.markdown(rows, 'command')


def test_picture_shows_every_best():
  """Of every search, and the ends of all curves, in any number of panels."""
  low = tuning.Found({1.0: 2.5, 2.0: 2.0, 4.0: 9.0}, 2.0, '')
  rows = [_row('a', [3.0, 3.1], rate=low), _row('b', [3.0], rate=low, b=low)]
  fig = schedule_pictures.ranking(rows)
  assert [ax.get_xlabel() for ax in fig.axes] == ['rate', 'b', 'step']
  for ax in fig.axes:
    bottom, top = ax.get_ylim()
    assert bottom < min(min(x.get_ydata()) for x in ax.lines) < top
  (only,) = schedule_pictures.ranking([_row('a', [3.0])]).axes
  assert only.get_xlabel() == 'step'


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


def test_the_command(tmp_path):
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

  for extra, sentence in (
    ('--config.eval.num_sequences=8', 'was trained with eval.num_sequences=16'),
    ('--method=adamww', "Did you mean 'adamw'"),
    ('--method=muon,optimizer.b9=1', "no field 'optimizer.b9'"),
    ('--method=adamw,seed=3', 'seeds are the same for all'),
    ('--method=adamw', 'is given twice'),
    ('--method=muon,', 'is empty or repeated'),
    ('--tune=gamma', "'gamma' is repeated or no float of these"),
    ('--tune=learning_rate,learning_rate', 'is repeated or no float'),
    ('--factor=1', '--factor=1.0 must be'),
  ):
    failed = helpers.command(*words, extra, check=False)
    assert failed.returncode == 2, extra
    assert sentence in failed.stderr and 'Traceback' not in failed.stderr
    assert failed.stderr.count('error: ') == 1
  meta = next((tmp_path / 'a' / 'adamw').glob('*seed100')) / 'meta.json'
  old = json.loads(meta.read_text())
  meta.write_text(json.dumps({**old, 'data_fingerprint': 'other'}))
  failed = helpers.command(*words, check=False)
  assert failed.returncode == 2
  assert f'{meta.parent} was trained on other data' in failed.stderr
  meta.write_text(json.dumps({**old, 'code': 'other'}))
  failed = helpers.command(*words, check=False)
  assert failed.returncode == 2
  assert f'{meta.parent} was trained with other code' in failed.stderr


def test_a_float_below_one_is_searched_by_its_distance_from_one(monkeypatch):
  method = trials.Method('m', {}, {'optimizer.b1': '0.9'})
  seen = []

  class Trials:
    def loss(self, method, fields, seed):
      seen.append(fields['optimizer.b1'])
      return abs(math.log(1 - fields['optimizer.b1']) - math.log(0.025))

  monkeypatch.setattr(trials.Method, 'config', lambda self: helpers.config())
  found = trials.tune(Trials(), method, ['b1'], seeds=[0], factor=2.0, most=9)
  assert found.fields['optimizer.b1'] == pytest.approx(0.975)
  steps = np.diff(np.log1p(-np.sort(seen)))
  np.testing.assert_allclose(steps, -math.log(2), rtol=1e-6)
  assert found.searches['optimizer.b1'].edge == ''


def test_knobs_are_tuned_in_turn(monkeypatch):
  """The second knob at the best of the first, which some methods lack."""
  best = {'learning_rate': 3e-3 * 4, 'optimizer.weight_decay': 0.1 / 2}
  seen = []

  class Trials:
    def loss(self, method, fields, seed):
      seen.append(dict(fields))
      return sum((math.log(fields[k]) - math.log(v)) ** 2
                 for k, v in best.items())  # fmt: skip

  monkeypatch.setattr(trials.Method, 'config', lambda self: helpers.config())
  found = trials.tune(
    Trials(), trials.Method('m', {}, {}),
    ['learning_rate', 'weight_decay', 'momentum'],
    seeds=[0, 1], factor=2.0, most=9,
  )  # fmt: skip
  assert found.fields == pytest.approx(best)
  rates = [f['learning_rate'] for f in seen]
  assert len(list(itertools.groupby(rates[10:]))) == 1
