"""Every schedule: range, edges, exact steps, traced equals Python."""

import json

import hypothesis as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from lm import spec
from lm.errors import UserError
from schedules.constant import constant
from schedules.cosine import cosine
from schedules.inverse_sqrt import inverse_sqrt
from schedules.linear import linear
from schedules.parts import shapes
from schedules.wsd import wsd

NAMES = spec.names('schedules')
BIG = 2**24 + 3  # the first odd number that float32 cannot hold is 2^24 + 1
quick = h.settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(scope='module')
def table_path(tmp_path_factory):
  path = tmp_path_factory.mktemp('table') / 'schedule.json'
  path.write_text(json.dumps({'multiplier': [0.25, 1.0, 0.5, 0.125]}))
  return str(path)


def _config(name, table_path, **knobs):
  if name == 'table':
    knobs['path'] = table_path
  return spec.spec('schedules', name, **knobs)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('num_steps', [1, 2, 3, 10, 1000])
def test_values_lie_in_the_unit_interval_and_repeat(
  name, num_steps, table_path
):
  config = _config(name, table_path)
  multiplier = spec.build('schedules', config, num_steps)
  steps = np.r_[0 : num_steps + 3, num_steps + 1000, BIG, 2**31 - 1]
  values = np.asarray(jax.jit(multiplier)(steps.astype(np.int32)))
  assert values.shape == steps.shape and values.dtype == np.float32
  assert np.isfinite(values).all()
  assert values.min() >= 0 and values.max() <= 1
  assert values.max() > 0.1, 'a schedule that never trains'
  assert values[0] > 0, 'step 0 is wasted'
  again = spec.build('schedules', config, num_steps)
  np.testing.assert_array_equal(values, jax.jit(again)(steps.astype(np.int32)))


VARIANTS = [(name, {}) for name in NAMES] + [
  (name, {'shape': shape})
  for name in NAMES
  for shape in shapes.names()
  if 'shape' in spec.knobs('schedules', name)
]


@pytest.mark.parametrize(('name', 'knobs'), VARIANTS, ids=str)
def test_jit_traced_floats_and_python_agree_bit_for_bit(
  name, knobs, table_path
):
  num_steps = 97
  config = _config(name, table_path, **knobs)
  floats = spec.floats('schedules', config)
  plain = spec.build('schedules', config, num_steps)

  @jax.jit
  def traced(step, floats):
    return spec.build('schedules', config, num_steps, floats=floats)(step)

  compiled = jax.jit(plain)
  steps = np.r_[0:9, 13, 31, 50, 77:99, 1097, BIG].astype(np.int32)
  together = compiled(steps)
  for i, step in enumerate(steps):
    want = np.float32(plain(int(step)))
    np.testing.assert_array_equal(compiled(step), want, str(step))
    np.testing.assert_array_equal(traced(step, floats), want, str(step))
    np.testing.assert_array_equal(together[i], want, str(step))


@pytest.mark.parametrize('name', NAMES)
def test_a_sweep_over_every_float_compiles_once(name, table_path):
  config = _config(name, table_path)
  floats = spec.floats('schedules', config)
  count = 0

  @jax.jit
  def at(step, floats):
    nonlocal count
    count += 1
    return spec.build('schedules', config, 50, floats=floats)(step)

  for scale in (1.0, 0.9, 0.5):
    scaled = {k: v * scale for k, v in floats.items()}
    values = [at(s, scaled) for s in (0, 20, 49)]
    assert np.isfinite(values).all()
  assert count == 1


@pytest.mark.parametrize('name', NAMES)
def test_settings_can_be_mapped_over(name, table_path):
  config = _config(name, table_path)
  floats = spec.floats('schedules', config)
  scales = [1.0, 0.8, 0.5]
  many = {k: jnp.float32([v * x for x in scales]) for k, v in floats.items()}

  def at(step, floats):
    return spec.build('schedules', config, 40, floats=floats)(step)

  one, mapped = jax.jit(at), jax.jit(jax.vmap(at, (None, 0), axis_size=3))
  for step in (0, 3, 20, 39):
    want = [
      one(step, jax.tree.map(lambda v, i=i: v[i], many)) for i in range(3)
    ]
    np.testing.assert_allclose(mapped(step, many), want, rtol=1e-6)


# A table is looked up by the integer itself.
@pytest.mark.parametrize('name', sorted({*NAMES} - {'table'}))
def test_steps_above_two_to_the_24_are_exact(name):
  multiplier = spec.build('schedules', spec.spec('schedules', name), BIG)
  at = jax.jit(multiplier)
  for step in [int(BIG * x) for x in (0.3, 0.999)] + [BIG - 1, BIG, BIG + 1]:
    assert float(at(step)) == float(multiplier(step))


def test_neighbouring_steps_differ_above_two_to_the_24():
  multiplier = wsd(BIG, warmup=0.0, decay=1e-5)
  start = BIG - round(BIG * 1e-5)
  first = [float(multiplier(start + i)) for i in range(4)]
  n = BIG - start
  np.testing.assert_allclose(first, 1 - np.arange(4) / n, atol=6e-8)
  assert len({*first}) == 4


def _reference(step, num_steps, warmup, decay, shape, final):
  """Float64, written from the convention in DESIGN 4."""
  w, n = round(warmup * num_steps), round(decay * num_steps)
  n = min(n, num_steps - w)
  if step < w:
    return (step + 1) / w
  if step <= num_steps - n or n == 0:
    return 1.0
  x = np.float64(min(step - (num_steps - n), n) / n)
  return final + (1 - final) * shapes.shape(shape)(x)


@pytest.mark.parametrize('shape', shapes.names())
@pytest.mark.parametrize('final', [0.0, 0.1])
def test_wsd_is_exact_at_its_edges(shape, final):
  num_steps, w, t0 = 1000, 50, 800
  multiplier = wsd(num_steps, warmup=0.05, decay=0.2, shape=shape, final=final)
  assert multiplier(0) == np.float32(1) / np.float32(w)
  for step in (w - 1, w, t0 - 1, t0):
    assert multiplier(step) == 1
  assert multiplier(t0 + 1) < 1
  last = multiplier(num_steps - 1)
  want = _reference(num_steps - 1, num_steps, 0.05, 0.2, shape, final)
  np.testing.assert_allclose(last, want, rtol=2e-4)
  assert last > np.float32(final)
  for step in (num_steps, num_steps + 1, num_steps + 1000, BIG):
    assert multiplier(step) == np.float32(final)


@quick
@h.given(
  num_steps=st.integers(1, 400),
  warmup=st.floats(0, 0.5, width=32),
  decay=st.floats(0, 0.5, width=32),
  final=st.floats(0, 1, width=32),
  shape=st.sampled_from(shapes.names()),
)
def test_wsd_is_its_definition_and_monotone(
  num_steps, warmup, decay, final, shape
):
  knobs = {'warmup': warmup, 'decay': decay, 'shape': shape, 'final': final}
  steps = np.arange(402)  # of one length: compiled once
  values = np.asarray(wsd(num_steps, **knobs)(steps))
  want = [_reference(int(s), num_steps, **knobs) for s in steps]
  np.testing.assert_allclose(values, want, atol=3e-7)
  assert values.min() >= 0 and values.max() <= 1
  peak = int(values.argmax())
  assert (np.diff(values[: peak + 1]) >= 0).all()
  assert (np.diff(values[peak:]) <= 1e-7).all()


@pytest.mark.parametrize('final', [0.0, 0.1])
def test_against_optax(final):
  steps = np.arange(0, 130)
  want = optax.linear_schedule(1.0, final, 100)(steps)
  got = linear(100, warmup=0.0, final=final)(steps)
  np.testing.assert_allclose(got, want, atol=2e-7)
  want = optax.cosine_decay_schedule(1.0, 100, alpha=final)(steps)
  got = cosine(100, warmup=0.0, final=final)(steps)
  np.testing.assert_allclose(got, want, atol=2e-7)
  cooldown = optax.linear_schedule(1.0, final, 30)
  want = optax.join_schedules([lambda s: 1.0, cooldown], [70])
  got = wsd(100, warmup=0.0, decay=0.3, final=final)(steps)
  np.testing.assert_allclose(got, [want(s) for s in steps], atol=2e-7)


def test_linear_and_cosine_are_wsd_that_decays_at_once():
  steps = np.arange(120)
  for function in (linear, cosine):
    got = function(100, warmup=0.1, final=0.2)(steps)
    shape = function.__name__
    want = wsd(100, warmup=0.1, decay=0.9, shape=shape, final=0.2)(steps)
    np.testing.assert_array_equal(got, want)


def test_logged_learning_rates_of_a_published_run():
  # Schaipp et al. 2025 (arXiv 2501.18965), logs: 124M, lr 1e-3, 50,000 steps,
  # linear cooldown of the last 20 %.
  multiplier = wsd(50_000, warmup=0.006, decay=0.2)
  for step, lr in [(40_050, 9.95e-4), (49_950, 5e-6), (50_000, 0.0)]:
    np.testing.assert_allclose(1e-3 * multiplier(step), lr, rtol=1e-5)


def test_inverse_sqrt_by_hand():
  multiplier = inverse_sqrt(1000, warmup=0.1)
  got = [float(multiplier(s)) for s in (0, 99, 100, 200, 400, 10_000)]
  want = [0.01, 1, 1, 0.5**0.5, 0.5, 0.1]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  without = inverse_sqrt(1000, warmup=0.0)
  np.testing.assert_allclose([without(0), without(3)], [1, 0.5], rtol=1e-6)
  cooled = inverse_sqrt(1000, warmup=0.1, decay=0.5, timescale_steps=400)
  got = [float(cooled(s)) for s in (100, 500, 750, 1000)]
  want = [1, 0.5**0.5, 0.5 * (4 / 10.5) ** 0.5, 0]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_constant_by_hand():
  multiplier = constant(10, warmup_steps=4)
  got = [float(multiplier(s)) for s in (0, 1, 2, 3, 4, 9, 10, 10**6)]
  assert got == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
  assert float(constant(10)(0)) == 1


@pytest.mark.parametrize('name', shapes.names())
def test_shapes(name):
  x = np.linspace(0, 1, 101)
  y = shapes.shape(name)(x)
  assert y.dtype == np.float64 and y[0] == 1 and abs(y[-1]) < 1e-15
  assert (np.diff(y) < 0).all()
  with jax.enable_x64(True):
    traced = shapes.shape(name)(jnp.asarray(x))
    np.testing.assert_allclose(traced, y, atol=1e-15)
  # The value at one half, by hand.
  half = {
    'linear': 0.5,
    'cosine': 0.5,
    '1-sqrt': 1 - 0.5**0.5,
    'square': 0.75,
    'mirror-cosine': 0.5,
    'exponential': (0.1**0.5 - 0.1) / 0.9,
  }
  np.testing.assert_allclose(y[50], half[name], rtol=1e-14)


@pytest.mark.parametrize(
  ('name', 'knobs', 'message'),
  [
    ('wsd', {'warmup': 0.5, 'decay': 0.6}, 'warmup=0.5 + decay=0.6'),
    ('wsd', {'decay': -0.1}, 'decay=-0.1 must be a fraction'),
    ('wsd', {'final': 1.5}, 'final=1.5 must be a fraction'),
    ('wsd', {'final': float('nan')}, 'final=nan must be a fraction'),
    ('wsd', {'shape': 'liner'}, "Did you mean 'linear'"),
    ('linear', {'warmup': 2.0}, 'warmup=2.0 must be a fraction'),
    ('constant', {'warmup_steps': -1}, 'warmup_steps=-1'),
    ('inverse_sqrt', {'timescale_steps': -1}, 'timescale_steps=-1'),
  ],
)
def test_bad_knobs_are_answered_with_a_sentence(name, knobs, message):
  config = spec.spec('schedules', name, **knobs)
  with pytest.raises(UserError, match=message.replace('+', r'\+')):
    spec.build('schedules', config, 100)


@pytest.mark.parametrize('name', NAMES)
def test_a_run_without_steps_is_refused(name, table_path):
  with pytest.raises(UserError, match='num_steps=0'):
    spec.build('schedules', _config(name, table_path), 0)


def test_fractions_that_fill_the_run_are_accepted():
  for warmup in (0.1, 0.3, 0.7, 0.9):
    assert wsd(3, warmup=warmup, decay=1 - warmup)(0) > 0
