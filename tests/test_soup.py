"""Greedy soups: the choice, and the command on real runs."""

import json
import shlex
import shutil

import numpy as np
import pytest

from lm import data, loop
from lm import run as run_lib
from merging.engine import greedy, stream
from tests import helpers, tools


def test_the_choice_on_a_quadratic():
  # Loss = squared distance of the mean from 0: opposite errors cancel.
  x = np.array([2.0, -1.9, 3.0, 0.1, 0.15])
  loss = lambda chosen: float(x[chosen].mean() ** 2)
  tried = greedy.greedy(x**2, loss)
  assert [t.candidate for t in tried] == [3, 4, 1, 0, 2]
  # 0.1 alone; with 0.15 worse; with -1.9 worse; with 2.0 worse.
  assert [t.kept for t in tried] == [True, False, False, False, False]
  x = np.array([1.0, -1.1, 5.0])
  tried = greedy.greedy(x**2, lambda chosen: float(x[chosen].mean() ** 2))
  assert [t.kept for t in tried] == [True, True, False]
  np.testing.assert_allclose(tried[1].loss, 0.0025)
  with pytest.raises(ValueError, match='must be finite'):
    greedy.greedy([1.0, float('nan')], loss)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run and its copy: the mean of their equal ends is no worse."""
  folder = tmp_path_factory.mktemp('my runs')
  config = helpers.config('schedule=constant', eval__every_steps=0)
  loop.train(config, folder / '0')
  shutil.copytree(folder / '0', folder / 'b@2')  # a name, not a step
  return folder


def test_the_two_validation_sets_are_disjoint(runs):
  run = run_lib.Run(runs / '0')
  one, two = run.data.eval_tokens_ES, data.second_validation(run.config)
  assert one.shape == two.shape
  rows = lambda x: {row.tobytes() for row in x}
  assert len(rows(one)) == len(one) and not rows(one) & rows(two)


def test_the_command(runs, monkeypatch, capsys):
  a, b = runs / '0', runs / 'b@2'
  at = f'--at={a}@8,{a}@12,{b}'
  assert tools.call(monkeypatch, 'soup', at) == 0
  text = capsys.readouterr().out
  assert 'Gain of the soup over the best single checkpoint' in text
  words = lambda text: shlex.split(text.rpartition('Next: ')[2])
  assert words(text)[-1].endswith(f',{a}/merged/soup')
  assert tools.call(monkeypatch, 'evaluate', f'--at={b}') == 0
  assert words(capsys.readouterr().out)[-1] == f'--run={b}'
  about = json.loads((a / 'merged/soup/merge.json').read_text())
  assert about['method']['name'] == 'greedy'
  rows = about['sources']
  n = len(rows)
  assert n >= 2 and {r['coefficient'] for r in rows} == {1 / n}
  assert [r['step'] for r in rows][-2:] == [12, 12]
  want = stream.combine([(a / r['path'], 1 / n) for r in rows])
  got = run_lib.Run(a).params('soup')
  for x, y in zip(
    helpers.flat(want).values(), helpers.flat(got).values(), strict=True
  ):
    np.testing.assert_array_equal(x, y)
  c = shutil.copytree(a, runs / 'c')
  config = (c / 'config.json').read_text()
  (c / 'config.json').write_text(config.replace('"silu"', '"gelu"'))
  assert tools.call(monkeypatch, 'soup', f'--at={a},{c}') == 2
  assert 'has model.activation=gelu, unlike' in capsys.readouterr().err
  (c / 'config.json').write_text(config)
  shutil.rmtree(c / 'checkpoints/8')
  shutil.copytree(c / 'checkpoints/12', c / 'checkpoints/8')  # no worse
  one = f'--at={c}@8,{c}@12'
  assert tools.call(monkeypatch, 'soup', one, '--name=one') == 0
  text = capsys.readouterr().out  # of one run, updates have multipliers
  assert 'effective LR' in text
  for wrong, message in (
    ((at,), 'merged/soup exists'),
    ((f'--at={a}',), 'needs two checkpoints'),
    ((f'--at={a}@12,{a}',), 'is listed twice'),
    ((f'--at={a},{a}/merged/soup', '--name=x'), 'is a merge'),
  ):
    assert tools.call(monkeypatch, 'soup', *wrong) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1, error
