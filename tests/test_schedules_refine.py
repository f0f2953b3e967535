"""Refined schedules: worked examples, hygiene, the filter; keeping a peak."""

import numpy as np
import pytest
from scipy import ndimage

from schedules.linear import linear
from schedules.theory import refine, transfer


@pytest.mark.parametrize(
  ('norms', 'power', 'want'),
  [
    ([1, 1, 1, 1], 1, [1, 2 / 3, 1 / 3, 0]),
    ([1, 1, 1, 1], 2, [1, 2 / 3, 1 / 3, 0]),
    ([2, 1, 1, 2], 2, [0.45, 1, 0.2, 0]),
    ([2, 1, 1, 2], 1, [0.833333, 1, 0.333333, 0]),
    ([1, 1, 1, 0.5], 2, [1, 0.833333, 0.666667, 0]),
    ([4, 2, 1, 1, 1], 2, [0.1015625, 0.375, 1, 0.5, 0]),
  ],
)
def test_worked_examples(norms, power, want):
  got = refine.refine(norms, power=power)
  np.testing.assert_allclose(got, want, atol=5e-7)


@pytest.mark.parametrize('scale', [1e-3, 7.0])
@pytest.mark.parametrize('power', [1, 2])
def test_constant_norms_give_the_linear_decay(scale, power):
  # Clipped norms are constant: no information, the minimax schedule.
  n = 200
  got = refine.refine(np.full(n, scale), power=power)
  want = 1 - np.arange(1, n + 1) / n
  np.testing.assert_allclose(got, want / want[0], atol=1e-12)
  stretched = refine.resample(got, 1000)
  np.testing.assert_allclose(stretched, np.linspace(1, 0, 1000), atol=1e-12)
  close = linear(n, warmup=0.0)(np.arange(n))
  assert abs(got - close).max() <= 1 / n + 1e-6


def test_learning_rates_and_guarantee_of_weights():
  norms = np.array([2.0, 1, 1, 2])
  lr, value = refine.conversion(norms**-2, grad_norms=norms)
  want = [0.142302, 0.316228, 0.063246, 0]
  np.testing.assert_allclose(lr, want, atol=5e-7)
  np.testing.assert_allclose(value, 0.632456, atol=5e-7)
  uniform = refine.conversion(np.ones(4), grad_norms=norms)
  np.testing.assert_allclose(uniform.bound, 0.790569, atol=5e-7)
  np.testing.assert_allclose(
    lr / lr.max(), refine.refine(norms, power=2), atol=1e-12
  )


def test_refined_weights_have_the_best_guarantee():
  rng = np.random.default_rng(0)
  norms = rng.random(20) + 0.5
  best = refine.conversion(norms**-2, grad_norms=norms).bound
  np.testing.assert_allclose(best, np.sum(norms**-2) ** -0.5, rtol=1e-12)
  for _ in range(50):
    other = refine.conversion(rng.random(20) + 0.1, grad_norms=norms).bound
    assert other > best


def test_guarantee_holds_on_random_convex_problems():
  rng = np.random.default_rng(1)
  ratios = []
  for _ in range(100):
    a = rng.standard_normal((6, 3))
    x = rng.standard_normal(3)
    norms = np.full(30, np.linalg.norm(a, axis=1).max())
    weights = rng.random(30) + 0.1
    lr, value = refine.conversion(
      weights, grad_norms=norms, distance=np.linalg.norm(x)
    )
    for rate in lr:
      j = np.argmax(abs(a @ x))
      x = x - rate * np.sign(a[j] @ x) * a[j]
    ratios.append(abs(a @ x).max() / value)
  assert 0.1 < max(ratios) <= 1


def test_filter_repeats_the_start_and_reflects_the_end():
  rng = np.random.default_rng(2)
  x, size = rng.random(50), 11
  got = refine.median(x, size)
  padded = np.concatenate([np.full(5, x[0]), x, x[-2 : -2 - 5 : -1]])
  want = [np.median(padded[i : i + size]) for i in range(50)]
  np.testing.assert_array_equal(got, want)
  frozen = ndimage.median_filter(x, size, mode='nearest')
  assert (got[-5:] != frozen[-5:]).any()
  np.testing.assert_array_equal(refine.median(x, 1), x)


def test_width_is_odd_and_a_fraction_of_the_run():
  # The published code uses 1001 for its 10,000 points.
  assert refine.width(10_000, 0.1) == 1001
  assert [refine.width(4, 0.1), refine.width(50, 0.1)] == [1, 5]


def test_outliers_zeros_and_skipped_steps_do_not_matter():
  norms = np.linspace(1, 2, 400)
  want = refine.refine(norms, power=2)
  broken = norms.copy()
  broken[[50, 120, 300]] = np.nan, 0, np.inf
  broken[200] = 1e-6  # a spike of the inverse, removed by the filter
  got = refine.refine(broken, power=2)
  np.testing.assert_allclose(got, want, atol=0.01)
  raw = refine.refine(broken, power=2, tau=0.0)
  assert abs(raw - want).max() > 0.5, 'the filter is what removes the spike'


def test_range_and_scale():
  rng = np.random.default_rng(3)
  norms = rng.lognormal(size=500)
  got = refine.refine(norms, power=2)
  assert got.max() == 1 and got.min() == 0 and got[-1] == 0
  np.testing.assert_allclose(refine.refine(1e8 * norms, power=2), got)


@pytest.mark.parametrize(
  ('norms', 'knobs', 'message'),
  [
    ([1.0], {}, r'shape \(1,\)'),
    ([[1.0, 2.0]], {}, r'shape \(1, 2\)'),
    ([0, float('nan')], {}, 'no positive, finite norm'),
    ([1, 2], {'power': -1}, 'power=-1'),
    ([1, 2], {'tau': 1.5}, 'tau=1.5'),
  ],
)
def test_bad_arguments(norms, knobs, message):
  with pytest.raises(ValueError, match=message):
    refine.refine(norms, **knobs)


# Extension of a WSD run of 4,000 steps with a linear cooldown of 20 %.
@pytest.mark.parametrize(
  ('factor', 'decay', 'rho'),
  [
    (1, 0.2, 1.0),
    (1.5, 0.446, 0.637),
    (2, 0.633, 0.533),
    (2.5, 0.771, 0.473),
    (3, 0.876, 0.431),
    (4, None, 0.375),
  ],
)
def test_extension(factor, decay, rho):
  new = int(4000 * factor)
  longer = transfer.longer_decay(4000, new, decay=0.2)
  assert longer == (decay if decay is None else pytest.approx(decay, abs=6e-4))
  lower = transfer.lower_rate(4000, new, decay=0.2)
  assert lower == pytest.approx(rho, abs=6e-4)
  late = transfer.lower_rate(4000, 8000, decay=0.2, switch=4000)
  assert late < transfer.lower_rate(4000, 8000, decay=0.2)


def test_ratio_of_peaks():
  ones, decayed = np.ones(1000), 1 - np.arange(1000) / 1000
  got = transfer.ratio(ones, decayed)
  np.testing.assert_allclose(got, 0.031497 / 0.010856, rtol=1e-4)
  assert transfer.ratio(decayed, decayed) == 1
  # For every usual shape the best peak falls with the root of the length.
  short, longer = (1 - np.arange(n) / n for n in (25_000, 100_000))
  np.testing.assert_allclose(transfer.ratio(short, longer), 0.5, rtol=2e-4)


@pytest.mark.parametrize(
  ('args', 'knobs', 'message'),
  [
    ((4000, 2000), {'decay': 0.2}, 'new_steps=2000'),
    ((4000, 8000), {'decay': 0.0}, 'decay=0.0'),
    ((4000, 8000), {'decay': 0.2, 'switch': 7000}, 'switch=7000'),
    ((4000, 8000), {'decay': 0.2, 'shape': 'liner'}, "mean 'linear'"),
  ],
)
def test_impossible_extensions(args, knobs, message):
  with pytest.raises(ValueError, match=message):
    transfer.lower_rate(*args, **knobs)
