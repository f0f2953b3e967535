"""Schedules with cycles and power laws: published values and by hand."""

import numpy as np
import optax
import pytest

from lm import spec
from lm.errors import UserError
from schedules.anytime import anytime
from schedules.fsl import fsl
from schedules.inverse_sqrt import inverse_sqrt
from schedules.onecycle import onecycle
from schedules.power import power
from schedules.sgdr import sgdr
from schedules.wsd import wsd
from schedules.wsd_s import wsd_s


def _values(multiplier, steps):
  return [float(multiplier(s)) for s in steps]


def test_wsd_s_values_of_another_trainer():
  # Levanter's test: cycles end at 300, 700, 1000 and decay over 10 % to 10 %.
  multiplier = wsd_s(
    1000, warmup=0.0, decay=0.1, final=0.1, cycle_end_steps=(300, 700)
  )
  peak = (0, 269, 300, 659, 701, 969)
  assert _values(multiplier, peak) == [1] * 6
  assert all(0.1 < x < 1 for x in _values(multiplier, (271, 299, 661, 971)))
  assert _values(multiplier, (1000, 5000)) == [np.float32(0.1)] * 2
  # By hand: half of the second decay, which takes 40 steps.
  assert float(multiplier(680)) == pytest.approx(0.55, abs=1e-6)


def test_wsd_s_of_one_cycle_is_wsd():
  knobs = {'warmup': 0.1, 'decay': 0.3, 'shape': '1-sqrt', 'final': 0.2}
  steps = np.arange(130)
  np.testing.assert_array_equal(
    wsd_s(100, **knobs)(steps), wsd(100, **knobs)(steps)
  )


def test_a_longer_run_repeats_the_cycles_of_a_shorter_one():
  short = wsd_s(100, warmup=0.0, decay=0.2, cycle_end_steps=(50,))
  longer = wsd_s(200, warmup=0.0, decay=0.2, cycle_end_steps=(50, 100))
  steps = np.arange(100)
  np.testing.assert_array_equal(short(steps), longer(steps))


@pytest.mark.parametrize('final', [0.0, 0.1])
def test_sgdr_against_optax(final):
  lengths = (20, 40, 80)
  kwargs = [
    {
      'init_value': 1.0,
      'peak_value': 1.0,
      'warmup_steps': 0,
      'decay_steps': n,
      'end_value': final,
    }
    for n in lengths
  ]
  want = optax.sgdr_schedule(kwargs)
  got = sgdr(140, cycles=3, growth=2, final=final)
  steps = np.arange(150)
  np.testing.assert_allclose(got(steps), [want(s) for s in steps], atol=3e-7)


def test_sgdr_restarts_at_the_peak():
  multiplier = sgdr(110, warmup_steps=10, cycles=4)
  assert _values(multiplier, (9, 10, 35, 60, 85)) == [1] * 5
  assert max(_values(multiplier, (34, 59, 84, 109))) < 0.005
  assert float(multiplier(0)) == pytest.approx(0.1)


def test_onecycle_against_optax():
  # optax divides the final value by both factors.
  want = optax.linear_onecycle_schedule(100, 1.0)
  steps = np.arange(120)
  got = onecycle(100)(steps)
  np.testing.assert_allclose(got, [want(s) for s in steps], atol=3e-7)


def test_power_by_hand():
  multiplier = power(
    10_000, warmup=0.0, decay=0.0, exponent=0.5, knee_steps=100
  )
  got = _values(multiplier, (0, 100, 400, 2500))
  np.testing.assert_allclose(got, [1, 1, 0.5, 0.2], rtol=1e-6)
  cooled = power(
    10_000, warmup=0.1, decay=0.2, exponent=0.5, knee_steps=1000, final=0.1
  )
  got = _values(cooled, (999, 4000, 9000, 10_000))
  want = [1, 0.5, 0.55 / 3, 0.1 * 0.1**0.5]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_anytime_by_hand():
  multiplier = anytime(10, warmup_steps=4, timescale_steps=12)
  got = _values(multiplier, (0, 3, 4, 40, 2**31 - 1))
  want = [0.25, 1, 1, 0.5, (12 / 2**31) ** 0.5]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  whole = anytime(10, timescale_steps=5, exponent=1.0)
  assert float(whole(15)) == pytest.approx(0.25)
  same = inverse_sqrt(100, warmup=0.04, timescale_steps=12)
  steps = np.arange(50)
  np.testing.assert_allclose(multiplier(steps), same(steps), rtol=1e-6)


def test_fsl_by_hand():
  # 2 * 1.5 - 1 = 2: a square.
  easy = fsl(100, warmup=0.0, capacity=1.5)
  got = _values(easy, (0, 50, 90, 100, 1000))
  np.testing.assert_allclose(got, [1, 0.25, 0.01, 0, 0], rtol=1e-5)
  hard = fsl(100, warmup=0.1, hold=0.5, capacity=2.0)
  got = _values(hard, (0, 9, 60, 80, 100))
  np.testing.assert_allclose(got, [0.1, 1, 1, 0.125, 0], rtol=1e-5)


@pytest.mark.parametrize(('hold', 'capacity'), [(0.0, 1.5), (0.25, 1.75)])
def test_fsl_against_optax(hold, capacity):
  begin, power = round(100 * hold), 2 * capacity - 1
  want = optax.polynomial_schedule(1.0, 0.0, power, 100 - begin, begin)
  steps = np.arange(130)
  got = fsl(100, warmup=0.0, hold=hold, capacity=capacity)(steps)
  np.testing.assert_allclose(got, want(steps), atol=5e-7)


@pytest.mark.parametrize(
  ('name', 'knobs', 'message'),
  [
    ('wsd_s', {'cycle_end_steps': (50, 40)}, 'must increase'),
    ('wsd_s', {'cycle_end_steps': (100,)}, 'num_steps=100'),
    ('wsd_s', {'decay': 1.5}, 'decay=1.5'),
    ('sgdr', {'cycles': 0}, 'cycles=0'),
    ('sgdr', {'growth': 0}, 'growth=0'),
    ('sgdr', {'warmup_steps': 100}, 'warmup_steps=100'),
    ('onecycle', {'rise': 0.6, 'fall': 0.6}, 'rise=0.6 . fall=0.6'),
    ('onecycle', {'start': -0.1}, 'start=-0.1'),
    ('power', {'knee_steps': 0}, 'knee_steps=0'),
    ('power', {'exponent': 2.0}, 'exponent=2.0'),
    ('anytime', {'timescale_steps': 0}, 'timescale_steps=0'),
    ('fsl', {'capacity': 1.0}, 'capacity=1.0'),
    ('fsl', {'warmup': 0.5, 'hold': 0.6}, 'warmup=0.5 . hold=0.6'),
  ],
)
def test_bad_knobs_are_answered_with_a_sentence(name, knobs, message):
  config = spec.spec('schedules', name, **knobs)
  with pytest.raises(UserError, match=message):
    spec.build('schedules', config, 100)


def test_a_warm_up_takes_its_steps_from_the_first_decay():
  """18 steps of warm-up leave 2 of a cycle of 20 for its decay of 10."""
  multiplier = wsd_s(100, warmup=0.18, decay=0.5, cycle_end_steps=(20,))
  got = multiplier(np.arange(21))
  np.testing.assert_allclose(got[:18], np.arange(1, 19) / 18, rtol=1e-6)
  np.testing.assert_allclose(got[18:], [1, 0.5, 1], rtol=1e-6)
