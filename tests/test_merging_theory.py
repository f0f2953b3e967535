"""What a merge does to the trajectory: identities and closed forms."""

import numpy as np
import pytest

from merging.decay import decay
from merging.engine import coefficients
from merging.engine import shapes as merge_shapes
from merging.uniform import uniform
from schedules.parts import shapes as schedule_shapes
from schedules.wsd import wsd

EQUAL = np.arange(1, 11) * 100


def test_average_is_the_rescaled_trajectory():
  rng = np.random.default_rng(1)
  theta = np.cumsum(rng.standard_normal((4, 5)), axis=0)
  c = decay([1, 2, 3, 4], shape='1-sqrt', floor=0.1)
  w = coefficients.forward(c)
  displaced = theta[0] - w @ (theta[:-1] - theta[1:])
  assert abs(c @ theta - displaced).max() < 1e-15 * abs(theta).max() * 4


def test_interval_means_emulate_the_decay_exactly():
  # The oracle replays the trajectory with every update scaled by W.
  rng = np.random.default_rng(2)
  steps = np.array([3, 10, 12, 30, 37])
  theta = np.cumsum(rng.standard_normal((38, 4)), axis=0) / 10
  means = [
    theta[a + 1 : b + 1].mean(0) for a, b in zip(steps, steps[1:], strict=False)
  ]
  for shape in merge_shapes.names():
    knots = coefficients.target((steps - 3) / 34, shape, 0.1)
    weight = np.interp(np.arange(3, 37), steps, knots)
    want = theta[3] + weight @ np.diff(theta[3:], axis=0)
    c = coefficients.interval_means(steps, shape, 0.1)
    total = c.first + c.means.sum() + c.last
    assert abs(total - 1) < 1e-15
    got = c.first * theta[3] + c.means @ means + c.last * theta[37]
    np.testing.assert_allclose(got, want, atol=2e-15)


def test_interval_means_of_a_linear_decay():
  c = coefficients.interval_means([0, 10, 40], floor=0.2)
  np.testing.assert_allclose(c.means, [0.8 * 0.25, 0.8 * 0.75], atol=1e-15)
  np.testing.assert_allclose([c.first, c.last], [0, 0.2], atol=1e-15)
  # The weights at the knots are those of the schedule that is emulated.
  schedule = wsd(100, warmup=0.0, decay=0.4, shape='1-sqrt')
  knots = [float(schedule(s)) for s in (60, 70, 80, 90, 100)]
  c = coefficients.interval_means([60, 70, 80, 90, 100], '1-sqrt')
  np.testing.assert_allclose(c.means, -np.diff(knots), atol=1e-7)
  with pytest.raises(ValueError, match='two or more'):
    coefficients.interval_means([5])
  with pytest.raises(ValueError, match='falls from'):
    coefficients.from_knots([1, 0.2, 0.3])


def test_correction_for_a_learning_rate_that_varied():
  w = coefficients.correct([0.75, 0.5, 0.25, 0], [1, 0.8, 0.6, 0.4])
  np.testing.assert_allclose(w, [0.75, 0.625, 5 / 12, 0], atol=1e-15)
  c = coefficients.inverse(w)
  want = [0.25, 0.125, 5 / 24, 5 / 12, 0]
  np.testing.assert_allclose(c, want, atol=1e-15)
  w = coefficients.correct([1, 0.9, 0.8, 0.1], [1, 0.8, 0.6, 0.4])
  with pytest.raises(ValueError, match='2 of 5 the coefficient -0.125'):
    coefficients.inverse(w)
  c = coefficients.inverse(w, allow_negative=True)
  want = [0, -0.125, -0.2083333, 1.0833333, 0.25]
  np.testing.assert_allclose(c, want, atol=5e-8)
  with pytest.raises(ValueError, match='must be positive'):
    coefficients.correct([1.0], [0.0])
  with pytest.raises(ValueError, match='1 target learning rates for 2'):
    coefficients.correct([1.0], [1.0, 1.0])


def test_effective_number_of_checkpoints():
  assert coefficients.effective_count(uniform(EQUAL)) == pytest.approx(10)
  assert coefficients.effective_count([1.0]) == 1
  assert coefficients.effective_count([0.5, 0.25, 0.25]) == pytest.approx(8 / 3)


def _merged_variance(c, interval, rho):
  lag = abs(np.subtract.outer(np.arange(c.size), np.arange(c.size)))
  return c @ rho ** (interval * lag) @ c


# Ratio of the variance after merging to that at constant learning rate, noisy
# quadratic h = 1, eta = 0.1, window 600 (methods 1.2).
@pytest.mark.parametrize(
  ('shape', 'n', 'want'),
  [
    ('linear', 4, 0.25000),
    ('linear', 8, 0.12508),
    ('linear', 16, 0.06492),
    ('linear', 60, 0.03405),
    ('linear', 600, 0.03117),
    ('1-sqrt', 4, 0.33610),
    ('1-sqrt', 16, 0.10826),
    ('1-sqrt', 60, 0.05632),
  ],
)
def test_noisy_quadratic(shape, n, want):
  interval = 600 // n
  c = decay(np.arange(n) * interval, shape=shape)
  got = _merged_variance(c, interval, rho=1 - 0.1)
  np.testing.assert_allclose(got, want, atol=6e-6)


@pytest.mark.parametrize(
  ('shape', 'want'),
  [('linear', 0.10923), ('cosine', 0.09644), ('1-sqrt', 0.08010),
   ('square', 0.14924)],
)  # fmt: skip
def test_real_decays_of_the_noisy_quadratic(shape, want):
  """Methods 1.2: the order of the shapes is not that of their merges."""
  variance = 1.0
  for rate in 0.1 * merge_shapes.shape(shape).value(np.arange(600) / 600):
    # Of noise 1 with v = eta / (2 - eta) at constant rate, in units of v.
    variance = (1 - rate) ** 2 * variance + rate**2 * (2 - 0.1) / 0.1
  assert variance == pytest.approx(want, abs=6e-6)


@pytest.mark.parametrize(
  ('h', 'constant', 'merged', 'decayed'),
  [(0.002, 0.88691, 0.93808, 0.94185), (0.01, 0.54865, 0.73481, 0.74111),
   (0.05, 0.04941, 0.27950, 0.22313)],
)  # fmt: skip
def test_progress_along_slow_directions(h, constant, merged, decayed):
  """Methods 1.2: merging and decaying give up nearly the same of it."""
  x = (1 - 0.1 * h) ** np.arange(601)
  assert x[600] == pytest.approx(constant, abs=6e-6)
  knots = np.arange(16) * 37 + (600 - 15 * 37)
  assert uniform(knots) @ x[knots] == pytest.approx(merged, abs=6e-6)
  # These figures are of a decay that is a step ahead: ours begins at 1.
  rates = 0.1 * merge_shapes.shape('linear').value(np.arange(1, 601) / 600)
  assert np.prod(1 - rates * h) == pytest.approx(decayed, abs=6e-6)


def test_means_of_intervals_are_worth_all_iterates():
  """Methods 1.6: 200 directions, 2,000 steps; raw, raw, means and all."""
  rng = np.random.default_rng(0)
  h = np.geomspace(0.5, 1, 200)
  x, path = np.zeros(200), []
  for _ in range(4000):
    x = x - 0.1 * (h * x + rng.standard_normal(200))
    path.append(x)
  path = np.array(path[2000:])
  loss = lambda theta: 0.5 * h @ theta**2
  raw = {n: loss(path[2000 // n - 1 :: 2000 // n].mean(0)) for n in (4, 20)}
  means = loss(path.reshape(4, 500, 200).mean(1).mean(0))
  assert means == pytest.approx(loss(path.mean(0)))
  assert means < raw[20] / 2 < raw[4] / 4


def test_noisy_quadratic_formula_against_simulation():
  # Many independent chains in stationarity: variance of the merge, sampled.
  rng = np.random.default_rng(3)
  x = rng.standard_normal(200_000)
  c, rho, merged = decay([0, 5, 10], shape='cosine'), 0.9, 0.0
  for j in range(3):
    merged = merged + c[j] * x
    for _ in range(5):
      x = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal(x.size)
  want = _merged_variance(c, 5, rho)
  np.testing.assert_allclose(merged.var(), want, rtol=0.02)


@pytest.mark.parametrize('name', schedule_shapes.names())
def test_shapes_of_schedules_and_merges_are_the_same(name):
  x = np.linspace(0, 1, 101)
  want = schedule_shapes.shape(name)(x)
  got = merge_shapes.shape(name).value(x)
  np.testing.assert_allclose(got, want, atol=1e-15)


@pytest.mark.parametrize('name', merge_shapes.names())
def test_integrals_of_shapes(name):
  x = np.linspace(0.001, 0.999, 101)
  s = merge_shapes.shape(name)
  slope = (s.integral(x + 1e-5) - s.integral(x - 1e-5)) / 2e-5
  np.testing.assert_allclose(slope, s.value(x), atol=1e-5)
