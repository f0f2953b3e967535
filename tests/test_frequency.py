"""Rare tokens: groups by frequency, and toys whose orderings are published."""

import fractions

import hypothesis as h
import numpy as np
import pytest
from hypothesis import strategies as st

from benchmarks import frequency as toys
from lm import frequency

COUNTS = [50, 20, 10, 8, 4, 3, 2, 1, 1, 1]


@pytest.mark.parametrize(
  ('num', 'want'),
  [
    (1, [list(range(10))]),
    (2, [[0], list(range(1, 10))]),
    (5, [[0], [], [1], [2], list(range(3, 10))]),  # floats: [2, 3], [4, ...]
  ],
)
def test_golden_groups(num, want):
  found = frequency.groups(COUNTS, num)
  assert [np.flatnonzero(found == k).tolist() for k in range(num)] == want


@h.settings(max_examples=50, deadline=None, derandomize=True)
@h.given(
  st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
  st.integers(1, 6),
)
def test_groups_by_brute_force(counts, num):
  """The first class that lifts the mass to k / num closes group k."""
  found, group, mass = {}, 0, fractions.Fraction(0)
  for i in sorted(range(len(counts)), key=lambda i: -counts[i]):
    while group < num - 1 and mass >= fractions.Fraction(group + 1, num):
      group += 1
    found[i] = group
    mass += fractions.Fraction(counts[i], sum(counts))
  got = frequency.groups(counts, num)
  assert got.tolist() == [found[i] for i in range(len(counts))]
  values = np.arange(len(counts)) ** 2.0
  for k, mean in enumerate(frequency.means(values, counts, num)):
    mine = [i for i in found if found[i] == k and counts[i]]
    if not mine:
      assert np.isnan(mean)
      continue
    weights = [counts[i] for i in mine]
    assert mean == pytest.approx(np.average(values[mine], weights=weights))


@pytest.mark.parametrize(
  ('counts', 'num', 'sentence'),
  [
    ([0.5, 0.5], 2, 'list of integers, not float64'),
    ([1, 2], 0, 'num=0 must be at least 1'),
    ([0, 0], 2, 'one of them positive'),
    ([-1, 2], 2, 'must be >= 0'),
  ],
)
def test_mistakes(counts, num, sentence):
  with pytest.raises(ValueError, match=sentence):
    frequency.groups(counts, num)


def test_decay_is_the_less_biased_the_more_cautious_its_mask():
  """cautious << random at its rate << by the gradient < plain (2510.12402).

  Losses of 3e-7 and below 0.1 depend on the initial values; the others are
  within 10 % of those of an independent implementation.
  """
  run = lambda wd: {
    mode: np.sum(toys.zipf() * toys.bigram(mode, wd)) for mode in toys.ARMS
  }
  loss = run(10.0)
  assert loss['none'] < 1e-6
  assert 10 * loss['cautious'] < loss['random-matched']
  assert 10 * loss['random-matched'] < loss['cautious-gradient']
  assert 1.3 * loss['cautious-gradient'] < loss['decoupled']
  assert loss['cautious-gradient'] == pytest.approx(2.13, rel=0.1)
  loss = run(2.0)
  assert loss['none'] == pytest.approx(0, abs=1e-8)
  assert loss['cautious'] < loss['random-matched'] < 1e-4
  assert 1.3 * loss['cautious-gradient'] < loss['decoupled']
  assert loss['cautious-gradient'] > 0.1
  assert loss['decoupled'] == pytest.approx(1.215, rel=0.02)


def test_plain_decay_forgets_rare_tokens_first():
  """Rising in the decay and in the rarity; cautious decay forgets none."""
  losses = np.array(
    [toys.by_rarity(toys.bigram('decoupled', wd)) for wd in (0.3, 1.0, 2.0)]
  )
  assert (np.diff(losses[:, 1:], axis=0) > 0).all()
  assert (np.diff(losses[1:], axis=1) > 0).all()
  assert losses[0].max() < 5e-4
  np.testing.assert_allclose(losses[1, 3], 1.2798, rtol=0.2)
  np.testing.assert_allclose(losses[2, 2:], [0.9909, 3.9078], rtol=0.05)
  assert toys.by_rarity(toys.bigram('cautious', 2.0)).max() < 5e-5


@pytest.mark.parametrize(
  ('name', 'want'),
  [
    ('gradient descent, lr 1', [1.5196, 0.0168, 0.4882, 4.0538]),
    ('gradient descent, lr 10', [0.1688, 0.0015, 0.0168, 0.4882]),
    ('Adam without momentum, lr 0.03', [0.01] * 4),
    ('sign, lr 0.03', [0.0007] * 4),
  ],
)
def test_rare_classes_are_slow_for_gradient_descent_alone(name, want):
  """Mean, frequent, medium, rare after 200 steps, from log 111."""
  start = toys.classes(toys.SMALL[name], num_steps=0)
  np.testing.assert_allclose(start, 4.7095, atol=5e-5)
  np.testing.assert_allclose(toys.classes(toys.SMALL[name]), want, atol=6e-5)
