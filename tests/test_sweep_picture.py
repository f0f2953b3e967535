"""The picture of launch.sweep: what it shows, and what it marks."""

import math

import pytest

from launch.parts import schedule_pictures, sweeps, trials


def _methods(rows):
  return {
    str(i): trials.Method(str(i), {'optimizer': r.pop('optimizer', 'a')}, r)
    for i, r in enumerate(rows)
  }


@pytest.mark.parametrize('bad', [[math.inf, 2.0, 1e9], [math.inf] * 3])
def test_what_diverged_is_no_best_and_does_not_hide_the_rest(bad):
  rows = [{'rate': r} for r in (100.0, 1.0, 10.0)]
  found = sweeps.groups(_methods(rows), [0] * 3, bad)
  stars = [row[-1].endswith('*') for row in sweeps.table(found)[1]]
  assert stars == [x == 2.0 for x in bad]
  (ax,) = schedule_pictures.sweep(sweeps.lines(found, 'rate'), 'rate').axes
  assert ax.get_xlim()[0] <= 1 and ax.get_xlim()[1] >= 100
  above = [x for x in ax.lines if x.get_marker() == 'x']
  assert 100.0 in [x for line in above for x in line.get_xdata()]


def test_finite_losses_are_in_the_picture_but_for_outliers():
  rows = [{'rate': r, 'seed': s} for r in (3e-3, 5e-3, 1e-2) for s in (0, 1)]
  draw = lambda losses: schedule_pictures.sweep(
    sweeps.lines(
      sweeps.groups(_methods(map(dict, rows)), [0, 1] * 3, losses), 'rate'
    ),
    'rate',
  ).axes[0]
  ax = draw([2.0, 2.2, 1.9, 2.3, 2.3, 2.5])
  assert ax.get_ylim()[0] < 1.9 and ax.get_ylim()[1] > 2.5  # with its bands
  assert ax.get_xscale() == 'log'
  assert [*ax.get_xticks()] == [3e-3, 5e-3, 1e-2]
  ax = draw([1.5, 1.5, 1.505, 1.505, 1.56, 1.56])  # two of three are alike
  assert ax.get_ylim()[1] > 1.56
  ax = draw([2.0, 2.2, 2.4, 2.4, 9.0, 9.0])
  marks = {x.get_marker(): [*x.get_xdata()] for x in ax.lines[1:]}
  assert ax.get_ylim()[1] < 3 and marks == {'^': [1e-2]}
  ax = draw([2.0, 2.2, 2.4, 2.4, math.inf, 9.0])
  marks = {x.get_marker(): [*x.get_xdata()] for x in ax.lines[1:]}
  assert marks == {'x': [1e-2]}
