"""Every schedule against its closed form in float64, at every step and late."""

import json

import jax
import numpy as np
import pytest

from lm import spec

NAMES = spec.names('schedules')
POINTS = [0.25, 1.0, 0.5, 0.125]  # of the table

# --- closed forms, of int64 steps below and above the end of the run


def _length(knobs, name, num_steps):
  return round(knobs.get(name, 0) * num_steps)


def _gone(steps, start, length):
  return np.clip((steps - start) / length, 0, 1)


def _floored(knobs, y):
  final = knobs.get('final', 0)
  return final + (1 - final) * y


def _start(knobs, num_steps):
  """The first step after the warm-up."""
  return knobs.get('warmup_steps', _length(knobs, 'warmup', num_steps))


def _half_cosine(x):
  return (1 + np.cos(np.pi * x)) / 2


def _anytime(s, t, k):
  w, tau = k['warmup_steps'], k['timescale_steps']
  return (tau / (tau + np.maximum(s - w, 0))) ** 0.5


def _cooldown(s, t, k):
  n = _length(k, 'decay', t)
  return _floored(k, 1 - _gone(s, t - n, n))


def _fsl(s, t, k):
  start = _start(k, t) + _length(k, 'hold', t)
  return (1 - _gone(s, start, t - start)) ** (2 * k['capacity'] - 1)


def _inverse_sqrt(s, t, k):
  w = _start(k, t)
  tau = k.get('timescale_steps', w)
  return np.sqrt(tau / (tau + np.maximum(s - w, 0))) * _cooldown(s, t, k)


def _onecycle(s, t, k):
  rise, fall = (_length(k, name, t) for name in ('rise', 'fall'))
  turn = rise + fall
  values = [k['start'], 1, k['start'], k['final']]
  return np.interp(s, [0, rise, turn, t], values)


def _power(s, t, k):
  law = np.minimum(1, k['knee_steps'] / np.maximum(s, 1)) ** k['exponent']
  return law * _cooldown(s, t, k)


def _sgdr(s, t, k):
  w = k['warmup_steps']
  half = (t - w) // 2  # two equal cycles
  late = s >= w + half
  x = _gone(s, np.where(late, w + half, w), half)
  return _floored(k, _half_cosine(x))


def _wsd_s(s, t, k):
  (end,) = k['cycle_end_steps']
  starts, ends = np.where(s < end, 0, end), np.where(s < end, end, t)
  n = np.rint(k['decay'] * (ends - starts))
  return _floored(k, 1 - _gone(s, ends - n, n))


def _whole(shape):
  def value(s, t, k):
    w = _start(k, t)
    return _floored(k, shape(_gone(s, w, t - w)))

  return value


FORMS = {
  'anytime': _anytime,
  'constant': lambda s, t, k: np.ones(s.shape),
  'cosine': _whole(_half_cosine),
  'fsl': _fsl,
  'inverse_sqrt': _inverse_sqrt,
  'linear': _whole(lambda x: 1 - x),
  'onecycle': _onecycle,
  'power': _power,
  'sgdr': _sgdr,
  'table': lambda s, t, k: np.interp(3 * s / (t - 1), range(4), POINTS),
  'wsd': _cooldown,
  'wsd_s': _wsd_s,
}


def _reference(name, steps, num_steps, knobs):
  steps = np.asarray(steps, np.int64)
  w = _start(knobs, num_steps)
  rest = FORMS[name](steps, num_steps, knobs)
  return np.where(steps < w, (steps + 1) / max(w, 1), rest)


# --- a run of 1000 steps: W = 50, T0 = 800 where there is one

SHORT = {
  'anytime': {'warmup_steps': 50, 'timescale_steps': 100},
  'constant': {'warmup_steps': 50},
  'cosine': {'warmup': 0.05},
  'fsl': {'warmup': 0.05, 'hold': 0.25, 'capacity': 1.5},
  'inverse_sqrt': {'warmup': 0.05, 'decay': 0.2},
  'linear': {'warmup': 0.05},
  'onecycle': {'rise': 0.3, 'fall': 0.5, 'start': 0.04},
  'power': {'warmup': 0.05, 'decay': 0.2, 'knee_steps': 100, 'exponent': 0.5},
  'sgdr': {'warmup_steps': 50, 'cycles': 2},
  'table': {},
  'wsd': {'warmup': 0.05, 'decay': 0.2},
  'wsd_s': {'warmup': 0.05, 'decay': 0.2, 'cycle_end_steps': (400,)},
}
# The multiplier from step T on, as a function of `final`.
ENDS = {
  **dict.fromkeys(('constant',), lambda final: 1.0),
  **dict.fromkeys(('fsl', 'inverse_sqrt'), lambda final: 0.0),
  **dict.fromkeys(
    ('cosine', 'linear', 'onecycle', 'sgdr', 'wsd', 'wsd_s'),
    lambda final: final,
  ),
  'table': lambda final: POINTS[-1],
}


@pytest.mark.parametrize('final', [0.0, 0.1])
@pytest.mark.parametrize('name', NAMES)
def test_edges(name, final, tmp_path):
  num_steps, knobs = 1000, dict(SHORT.get(name, {}))
  if name == 'table':
    path = tmp_path / 'schedule.json'
    path.write_text(json.dumps({'multiplier': POINTS}))
    knobs['path'] = str(path)
  if 'final' in spec.knobs('schedules', name):
    knobs['final'] = final
  config = spec.spec('schedules', name, **knobs)
  steps = np.arange(2 * num_steps + 1)
  got = jax.jit(spec.build('schedules', config, num_steps))(np.int32(steps))
  got = np.asarray(got)
  assert np.isfinite(got).all() and (got >= 0).all() and (got <= 1).all()
  if name not in FORMS:
    pytest.skip('no closed form of this schedule is known here')
  want = _reference(name, steps, num_steps, knobs)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=3e-7)
  # The first step and those at which a phase begins or ends are exact.
  level = np.isin(want, (1.0, knobs.get('final', 0.0)))
  np.testing.assert_array_equal(got[level], np.float32(want[level]))
  np.testing.assert_array_equal(got[0], np.float32(want[0]))
  if 'warmup' in knobs or 'warmup_steps' in knobs:
    assert got[0] == np.float32(1) / np.float32(50)
    assert got[48] < 1 and got[49] == 1
  if name in ('wsd', 'wsd_s'):
    edge = 800 if name == 'wsd' else 880
    assert got[50] == got[edge - 1] == got[edge] == 1 > got[edge + 1]
  if name in ENDS:
    end = ENDS[name](knobs.get('final', 0.0))
    np.testing.assert_array_equal(got[num_steps:], np.float32(end))
    assert name in ('constant', 'table') or got[num_steps - 1] != got[-1]


# --- steps that float32 cannot hold: phases of 16 steps that begin at START

START, LATE = 2**26 - 8, 2**26 + 8
PART = 2.0**-22  # of LATE: 16 steps
FAR = {
  'anytime': {'warmup_steps': START, 'timescale_steps': 4},
  'cosine': {'warmup': 1 - PART, 'final': 0.1},
  'fsl': {'warmup': 0.0, 'hold': 1 - PART, 'capacity': 1.5},
  'inverse_sqrt': {'warmup': 1 - PART, 'decay': PART, 'timescale_steps': 4},
  'linear': {'warmup': 1 - PART, 'final': 0.1},
  'onecycle': {'rise': 1 - 2 * PART, 'fall': PART, 'start': 0.04, 'final': 0.0},
  'power': {
    'warmup': 0.0, 'decay': PART, 'knee_steps': 2**24, 'exponent': 0.5
  },
  'sgdr': {'warmup_steps': START, 'cycles': 2},
  'wsd': {'warmup': 0.0, 'decay': PART, 'final': 0.1},
  'wsd_s': {'warmup': 0.0, 'decay': 0.5, 'cycle_end_steps': (START,)},
}  # fmt: skip


# A constant rate has no phase there, and a table is looked up by the integer.
@pytest.mark.parametrize('name', sorted(FAR))
def test_late_steps_are_exact(name):
  knobs = FAR[name]
  config = spec.spec('schedules', name, **knobs)
  steps = np.arange(START - 20, LATE + 20)
  got = jax.jit(spec.build('schedules', config, LATE))(np.int32(steps))
  want = _reference(name, steps, LATE, knobs)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=3e-7)
  rounded = np.int64(np.float32(steps))
  lost = _reference(name, rounded, LATE, knobs) - want
  assert abs(lost).max() > 0.03, 'float32 steps would be seen'
