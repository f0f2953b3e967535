"""The search of launch.compare."""

import itertools
import math

import numpy as np
import pytest

from launch.parts import trials, tuning
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


def _config(method, **fields):
  return helpers.config(**{k.replace('.', '__'): v for k, v in fields.items()})


def test_a_float_below_one_is_searched_by_its_distance_from_one(monkeypatch):
  method = trials.Method('m', {}, {'optimizer.b1': '0.9'})
  seen = []

  class Trials:
    def loss(self, method, fields, seed):
      seen.append(fields['optimizer.b1'])
      return abs(math.log(1 - fields['optimizer.b1']) - math.log(0.025))

  monkeypatch.setattr(trials.Method, 'config', _config)
  found = tuning.tune(Trials(), method, ['b1'], seeds=[0], factor=2.0, most=9)
  assert found.fields['optimizer.b1'] == pytest.approx(0.975)
  steps = np.diff(np.log1p(-np.sort(seen)))
  np.testing.assert_allclose(steps, -math.log(2), rtol=1e-6)
  assert found.searches['optimizer.b1'].edge == ''


def test_a_float_below_one_stays_one_that_a_step_can_tell_from_one(monkeypatch):
  method, seen = trials.Method('m', {}, {'optimizer.b1': '0.9'}), []

  class Trials:
    def loss(self, method, fields, seed):
      seen.append(fields['optimizer.b1'])
      return 1 - seen[-1]  # it falls up to 1

  monkeypatch.setattr(trials.Method, 'config', _config)
  tuning.tune(Trials(), method, ['b1'], seeds=[0], factor=1e3, most=9)
  assert 0.9 < max(seen) < 1 and np.float32(max(seen)) < 1


def test_knobs_are_tuned_in_turn(monkeypatch):
  """The second knob at the best of the first, which some methods lack."""
  best = {'learning_rate': 3e-3 * 4, 'optimizer.weight_decay': 0.1 / 2}
  seen = []

  class Trials:
    def loss(self, method, fields, seed):
      seen.append(dict(fields))
      return sum((math.log(fields[k]) - math.log(v)) ** 2
                 for k, v in best.items())  # fmt: skip

  monkeypatch.setattr(trials.Method, 'config', _config)
  found = tuning.tune(
    Trials(), trials.Method('m', {}, {}),
    ['learning_rate', 'weight_decay', 'momentum'],
    seeds=[0, 1], factor=2.0, most=9,
  )  # fmt: skip
  assert found.fields == pytest.approx(best)
  rates = [f['learning_rate'] for f in seen]
  assert len(list(itertools.groupby(rates[10:]))) == 1
