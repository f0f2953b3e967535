"""The convex bound: worked numbers, tight worst cases, real losses."""

import csv
import pathlib

import numpy as np
import pytest
from scipy import stats

from schedules.parts import shapes
from schedules.theory import bound, predict

ROOT = pathlib.Path(__file__).parents[1]


def _wsd(num_steps, decay, shape='linear'):
  """As the paper's code: 1 up to the cooldown, whose first value is lower."""
  n = round(decay * num_steps)
  x = np.arange(1, n + 1) / (n + 1)
  return np.append(np.ones(num_steps - n), shapes.shape(shape)(x))


def _full(num_steps, shape):
  return shapes.shape(shape)(np.arange(num_steps) / num_steps)


def _naive(lr, norms, distance):
  """The definition, term by term."""
  t, q = len(lr), (lr * norms) ** 2
  total = (distance**2 + q.sum()) / (2 * lr.sum())
  for k in range(t - 1):
    total += 0.5 * lr[k] / lr[k + 1 :].sum() * q[k:].sum() / lr[k:].sum()
  return total


def test_definition():
  rng = np.random.default_rng(0)
  lr, norms = rng.random(30), rng.random(30) + 0.5
  got = bound.omega(lr, grad_norms=norms, distance=1.7)
  np.testing.assert_allclose(got, _naive(lr, norms, 1.7), rtol=1e-13)


def test_four_steps():
  constant, linear = [1, 1, 1, 1], [1, 0.75, 0.5, 0.25]
  np.testing.assert_allclose(bound.omega(constant), 0.125 + 0.5 + 0.9166667)
  np.testing.assert_allclose(
    bound.best(constant), [0.2970443, 0.8416254], atol=5e-8
  )
  np.testing.assert_allclose(bound.omega(linear), 1.5333333)
  np.testing.assert_allclose(
    bound.best(linear), [0.3872983, 1.0327956], atol=5e-8
  )


T = 1000
TABLE = {
  'constant': (np.ones(T), 0.010856, 2.9128),
  'inverse sqrt': (1 / np.sqrt(np.arange(1, T + 1)), 0.199089, 2.5701),
  'wsd .1': (_wsd(T, 0.1), 0.014471, 2.3003),
  'wsd .2': (_wsd(T, 0.2), 0.016178, 2.1718),
  'wsd .4': (_wsd(T, 0.4), 0.019136, 2.0656),
  'wsd 1-sqrt .1': (_wsd(T, 0.1, '1-sqrt'), 0.015038, 2.2534),
  'wsd 1-sqrt .2': (_wsd(T, 0.2, '1-sqrt'), 0.017099, 2.1343),
  'wsd 1-sqrt .4': (_wsd(T, 0.4, '1-sqrt'), 0.021067, 2.0473),
  'cosine': (_full(T, 'cosine'), 0.030624, 2.0632),
  '1-sqrt': (_full(T, '1-sqrt'), 0.046916, 2.0190),
  'linear': (_full(T, 'linear'), 0.031497, 2.0060),
}


@pytest.mark.parametrize('name', TABLE)
def test_a_thousand_steps(name):
  shape, rate, scaled = TABLE[name]
  got = bound.best(shape)
  np.testing.assert_allclose(got.learning_rate, rate, atol=6e-7)
  np.testing.assert_allclose(got.bound * T**0.5, scaled, atol=6e-5)
  # The best multiple is one: both sides of it are worse.
  at = [bound.omega(got.learning_rate * k * shape) for k in (0.9, 1, 1.1)]
  np.testing.assert_allclose(at[1], got.bound, rtol=1e-12)
  assert at[1] < min(at[0], at[2])
  scaled = bound.best(shape, grad_norms=2.0, distance=3.0)
  np.testing.assert_allclose(scaled.learning_rate, rate * 1.5, rtol=1e-4)
  np.testing.assert_allclose(scaled.bound, got.bound * 6, rtol=1e-12)


def test_constant_learning_rate_has_harmonic_noise():
  t, rate = 50, 0.3
  harmonic = sum(1 / k for k in range(1, t))
  want = 1 / (2 * rate * t) + rate / 2 + rate * harmonic / 2
  np.testing.assert_allclose(bound.omega(np.full(t, rate)), want, rtol=1e-13)


def test_trailing_zeros_are_dropped():
  linear = [1, 0.75, 0.5, 0.25]
  assert bound.omega([*linear, 0, 0]) == bound.omega(linear)
  assert bound.omega([*linear, 1e-17]) == bound.omega(linear)
  # Without the guard it would diverge, as it does for what is almost none.
  assert bound.omega([*linear, 1e-12]) > 1e9
  # The smallest step of a long cosine is no zero.
  assert bound.omega(_full(10**5, 'cosine')) < bound.omega(np.ones(10**5))


# Exact worst cases for T = 60 by performance estimation, published with the
# paper's code (lr-scheduling): the bound is about twice these, in their order.
@pytest.mark.parametrize(
  ('shape', 'worst', 'factor'),
  [
    (_full(60, 'linear'), 0.12921, 2.05),
    (_full(60, 'cosine'), 0.13323, 2.05),
    (_wsd(60, 0.2), 0.13960, 2.08),
    (1 / np.sqrt(np.arange(1, 61)), 0.15420, None),
    (np.ones(60), 0.17810, 1.73),
  ],
)
def test_above_the_tight_worst_case(shape, worst, factor):
  got = bound.best(shape).bound
  assert got > worst
  if factor:
    np.testing.assert_allclose(got / worst, factor, atol=0.06)


@pytest.mark.parametrize('num_steps', [100, 1000, 5000])
@pytest.mark.parametrize('decay', [0.05, 0.2, 0.6, 0.9])
def test_closed_form_of_wsd_is_above_the_bound(num_steps, decay):
  start = round((1 - decay) * num_steps)
  closed = bound.wsd_upper_bound(num_steps, start)
  exact = bound.best(_wsd(num_steps, decay)).bound
  assert exact < closed < 1.6 * exact
  twice = bound.wsd_upper_bound(num_steps, start, grad_norm=2.0, distance=3.0)
  np.testing.assert_allclose(twice, 6 * closed)


def test_bounds_the_error_on_random_convex_problems():
  rng = np.random.default_rng(1)
  ratios = []
  for i in range(200):
    a = rng.standard_normal((8, 4))  # f(x) = max |a_j (x - x*)|, f* = 0
    x = rng.standard_normal(4)
    distance, steps = np.linalg.norm(x), 40
    norm = np.linalg.norm(a, axis=1).max()
    shape = (np.ones(steps), _full(steps, 'linear'), _wsd(steps, 0.3))[i % 3]
    knobs = {'grad_norms': norm, 'distance': distance}
    lr = shape * bound.best(shape, **knobs).learning_rate
    for rate in lr:
      j = np.argmax(abs(a @ x))
      x = x - rate * np.sign(a[j] @ x) * a[j]
    ratios.append(abs(a @ x).max() / bound.omega(lr, **knobs))
  assert max(ratios) <= 1
  assert max(ratios) > 0.1, 'the bound is not tested by such easy problems'


@pytest.mark.parametrize(
  ('lr', 'knobs', 'message'),
  [
    ([], {}, 'no positive learning rate'),
    ([0, 0], {}, 'no positive learning rate'),
    ([1, -1], {}, 'lr contains -1.0'),
    ([1, float('nan')], {}, 'lr contains nan'),
    ([1, 1], {'grad_norms': [1, 2, 3]}, r'shape \(2,\) and grad_norms \(3,\)'),
    ([1, 1], {'grad_norms': [1, -2]}, 'grad_norms contains -2.0'),
    ([1, 1], {'grad_norms': 0.0}, 'no positive norm'),
  ],
)
def test_bad_arguments(lr, knobs, message):
  with pytest.raises(ValueError, match=message):
    bound.omega(lr, **knobs)


def test_a_cooldown_must_lie_in_the_run():
  with pytest.raises(ValueError, match='start=100'):
    bound.wsd_upper_bound(100, 100)
  with pytest.raises(ValueError, match='start=1 must lie between 1 and 99'):
    bound.wsd_upper_bound(100, 1)


def _published():
  """Figures of arXiv 2501.18965's logs: 124M, 50,000 steps, warm-up 300."""
  path = ROOT / 'schedules' / 'theory' / 'published_losses.csv'
  with path.open(newline='') as f:
    return list(csv.DictReader(f))


def _lr(row, num_steps=50_000, warmup=300):
  step, n = np.arange(num_steps), round(float(row['decay']) * num_steps)
  m, final = np.ones(num_steps), float(row['final'])
  if n:
    x = np.clip((step - (num_steps - n)) / n, 0, 1)
    m = final + (1 - final) * shapes.shape(row['shape'])(x)
  return float(row['lr']) * np.minimum(m, (step + 1) / warmup)


def test_five_real_runs_predict_the_others():
  rows = _published()
  losses = np.array([float(r['loss']) for r in rows])
  lrs = [_lr(r) for r in rows]
  used = np.array(
    [
      (r['schedule'], r['decay'], r['shape']) == ('wsd', '0.2', 'linear')
      for r in rows
    ]
  )
  assert used.sum() == 5 and len(rows) == 49
  chosen = [lr for lr, u in zip(lrs, used, strict=True) if u]
  fitted = predict.fit(chosen, losses[used])
  # Reported in the notes of an independent fit: 0.3745, 8.063, 2.937.
  np.testing.assert_allclose(fitted, [0.3745, 8.063, 2.937], rtol=3e-3)
  got = np.array([predict.loss(fitted, lr) for lr in lrs])
  rank = stats.spearmanr(got[~used], losses[~used]).statistic
  assert rank >= 0.85
  # The null: the average-iterate bound, whose D may be chosen in hindsight.
  nulls = []
  for distance in np.geomspace(0.03, 3, 60):
    null = [bound.average_iterate(lr, distance=distance) for lr in lrs]
    null = np.array(null)[~used]
    nulls.append(stats.spearmanr(null, losses[~used]).statistic)
  assert rank >= max(nulls) + 0.1
  # The decayed runs, in nats: the mean of all would be wrong by four times.
  decayed = ~used & np.array([r['schedule'] != 'constant' for r in rows])
  error = abs(got - losses)[decayed].mean()
  spread = abs(losses[decayed] - losses[decayed].mean()).mean()
  assert error < 0.012 and spread > 0.04
  # Longer cooldowns want larger peaks: ratio to 0.2, measured and predicted.
  peak = {
    d: predict.best_peak(fitted, _lr({**rows[19], 'decay': d, 'lr': 1}))
    for d in ('0.1', '0.2', '0.4', '0.6', '0.9')
  }
  measured = {'0.1': 0.860, '0.4': 1.217, '0.6': 1.427, '0.9': 1.822}
  for d, want in measured.items():
    np.testing.assert_allclose(peak[d] / peak['0.2'], want, rtol=0.05)


def test_a_fit_needs_two_learning_rates_and_three_runs():
  lr = np.ones(10)
  with pytest.raises(ValueError, match='all runs have the peak'):
    predict.fit([lr, lr, lr], [1, 2, 3])
  with pytest.raises(ValueError, match='2 runs with the losses'):
    predict.fit([lr, 2 * lr], [1, 2])
  with pytest.raises(ValueError, match='finite losses'):
    predict.fit([lr, 2 * lr, 3 * lr], [1, 2, float('nan')])


def test_a_fit_recovers_what_made_the_losses():
  lrs = [k * _full(100, 'linear') for k in (0.01, 0.03, 0.1, 0.3)]
  losses = [2 + 3 * bound.omega(lr, distance=0.7) for lr in lrs]
  np.testing.assert_allclose(predict.fit(lrs, losses), [0.7, 3, 2], rtol=1e-4)


def test_the_closed_form_by_hand():
  """T = 4, T0 = 2: 2/3 + 8/18 + (H4 - H3) - 2/72 + 1/4 + H1 / 3 = 23/12."""
  assert bound.wsd_upper_bound(4, 2) == pytest.approx((4 / 6 * 23 / 12) ** 0.5)


def test_seeds_are_no_more_settings_for_a_fit():
  line = np.linspace(1, 0, 50, endpoint=False)
  twice = [1e-3 * line, 1e-2 * line] * 2
  with pytest.raises(ValueError, match='4 runs of 2 different schedules or'):
    predict.fit(twice, [3.0, 2.5, 3.1, 2.4])
  predict.fit([*twice, np.full(50, 1e-3)], [3.0, 2.5, 3.1, 2.4, 3.2])
