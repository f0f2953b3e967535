"""The refined schedule's convex suite, and the river valley."""

import functools

import numpy as np
import pytest

from benchmarks import convex, river
from schedules.theory import refine
from schedules.wsd_s import wsd_s


@functools.cache
def _suite():
  """Train, refine, train again, compare: on two problems of the suite."""
  chosen = {k: convex.problems()[k] for k in ('breast_cancer', 'least squares')}
  return {k: convex.compare(p, seeds=2) for k, p in chosen.items()}


@pytest.mark.parametrize('name', ['breast_cancer', 'least squares'])
def test_decay_and_refinement_beat_a_constant_rate(name):
  found, refined = _suite()[name]
  best, constant = found['linear'][1].mean(), found['constant'][1].mean()
  excess = {
    k: (x.mean() - best) / (constant - best) for k, (_, x) in found.items()
  }
  assert constant > best
  # Not "refined beats linear": they are within the noise, either may win.
  assert abs(excess['refined']) < 0.3 and abs(excess['cosine']) < 0.3
  for rate, _ in found.values():
    assert convex.RATES[0] < rate < convex.RATES[-1], 'the best is inside'
  assert refined.max() == 1 and refined[-1] == 0
  assert abs(refined - np.linspace(1, 0, refined.size)).max() > 0.02


def test_gradients_are_those_of_the_loss():
  for problem in (convex.problems()['wine'], convex.least_squares(50, 4)):
    rng = np.random.default_rng(0)
    shape = (problem.rows.shape[1], problem.targets.shape[1])
    w, v = rng.standard_normal((2, *shape))
    residual = convex._residual(problem, problem.rows @ w, problem.targets)
    gradient = problem.rows.T @ residual / len(problem.rows)
    gradient += convex.PENALTY * w
    ends = [convex.loss(problem, w + s * 1e-6 * v) for s in (1, -1)]
    want = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(np.sum(gradient * v), want, rtol=1e-6)


def test_the_bound_prefers_the_refined_schedule_on_its_norms():
  """What refinement promises, on the norms that it was computed from."""
  problem = convex.least_squares()
  m = np.linspace(1, 0, 500)
  _, norms = convex.train(problem, m, np.array([1.0]), seed=0)
  g = refine.median(norms[:, 0], refine.width(500, 0.1))
  weights = {'refined': g**-2, 'linear': np.ones(500)}
  bounds = {
    k: refine.conversion(w, grad_norms=g).bound for k, w in weights.items()
  }
  assert bounds['refined'] < 0.99 * bounds['linear']


@functools.cache
def _stable(rate):
  return river.train(np.full(1500, rate))


def test_a_larger_rate_is_faster_along_the_river_and_higher_on_the_hill():
  slow, fast = _stable(4.0), _stable(8.0)
  assert fast.river[-1].mean() < 0.6 * slow.river[-1].mean()
  for rate, x in ((4.0, slow), (8.0, fast)):
    hill = x.hill[1000:].mean()
    np.testing.assert_allclose(hill, river.stationary_hill(rate), rtol=0.12)


def test_a_decay_removes_the_height_and_keeps_the_river():
  rates = np.full(1500, 8.0)
  rates[1300:] *= 1 - np.arange(200) / 200
  cooled, stable = river.train(rates), _stable(8.0)
  assert cooled.hill[-1].mean() < 0.2 * stable.hill[1000:].mean()
  np.testing.assert_allclose(
    cooled.river[-1].mean(), stable.river[-1].mean(), rtol=0.1
  )
  assert cooled.total[-1].mean() < 0.7 * stable.total[1300:].mean()


def test_resuming_at_the_peak_raises_the_loss_to_the_stable_curve():
  rates = np.full(1500, 8.0)
  rates[600:700] *= 1 - np.arange(100) / 100
  resumed, stable = river.train(rates), _stable(8.0)
  after = slice(800, 1500)
  assert resumed.hill[700].mean() < 0.3 * stable.hill[after].mean()
  ratio = resumed.hill[after].mean() / stable.hill[after].mean()
  np.testing.assert_allclose(ratio, 1, atol=0.05)
  # Not above it: only the river is behind, by the steps that were slow.
  behind = stable.river[750].mean()
  assert resumed.river[800].mean() <= 1.02 * behind


def test_several_budgets_in_one_run():
  ends = (300, 600, 1200)
  found = {k: ([x.mean() for x in v], n) for k, (v, n) in
           river.budgets(ends).items()}  # fmt: skip
  losses = {k: np.array(v) for k, (v, _) in found.items()}
  assert (losses['WSD-S'] < losses['cyclic cosine']).all()
  # The rollback of branches is worth its steps here: WSD-S pays for resuming.
  assert (losses['WSD, branches'] <= 1.02 * losses['WSD-S']).all()
  assert found['WSD-S'][1] == 1200 < found['WSD, branches'][1]
  first = wsd_s(300, warmup=0.0, decay=0.1)
  alone = river.train(river.curve(first, 300)).total[-1].mean()
  np.testing.assert_allclose(losses['WSD-S'][0], alone, rtol=1e-6)
