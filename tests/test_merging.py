"""Coefficients of merges: published tables, algebra, closed forms."""

import hypothesis as h
import numpy as np
import pytest
from hypothesis import strategies as st

from lm import spec
from lm.errors import UserError
from merging.decay import decay
from merging.ema import ema
from merging.engine import coefficients, controls, sources
from merging.engine import shapes as merge_shapes
from merging.from_run import from_run, from_run_means
from merging.interpolate import interpolate
from merging.uniform import uniform
from merging.wma import wma

NAMES = spec.names('merging')
EQUAL = np.arange(1, 11) * 100


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('steps', [[7], [0, 3], [1, 2, 10], list(EQUAL)])
def test_contract(name, steps):
  c = spec.build('merging', spec.spec('merging', name), steps)
  assert c.dtype == np.float64 and c.shape == (len(steps),)
  assert abs(c.sum() - 1) < 1e-12
  assert (c >= 0).all()
  assert c[-1] > 0, 'the newest checkpoint is dropped'


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('steps', [[], [3, 2], [1, 1], [-1, 2], [0.5, 1.0]])
def test_bad_steps_are_answered_with_a_sentence(name, steps):
  with pytest.raises(UserError, match='steps='):
    spec.build('merging', spec.spec('merging', name), steps)


@pytest.mark.parametrize('value', [None, [1.0], [0.5, 0.4], [0.5, np.nan]])
def test_a_method_that_returns_no_coefficients_is_named(value):
  with pytest.raises(ValueError, match='mine.py must return 2 coefficients'):
    coefficients.checked(value, [1, 2], 'mine')


# Figure 2 of arXiv 2507.17634, as printed.
FIGURE_2 = {
  'linear': '.100 .100 .100 .100 .100 .100 .100 .100 .100 .100',
  'cosine': '.024 .071 .111 .139 .155 .155 .139 .111 .071 .024',
  '1-sqrt': '.316 .131 .101 .085 .075 .067 .062 .058 .054 .051',
  'ema': '.126 .033 .041 .052 .065 .082 .103 .130 .163 .206',
}


@pytest.mark.parametrize('shape', FIGURE_2)
def test_figure_2_of_the_paper(shape):
  want = np.array(FIGURE_2[shape].split(), float)
  np.testing.assert_allclose(decay(EQUAL, shape=shape), want, atol=5e-4)


@pytest.mark.parametrize(
  ('knobs', 'want'),
  [
    ({}, [0.25] * 4),
    ({'shape': '1-sqrt'}, [0.5, 0.2071068, 0.1589186, 0.1339746]),
    (
      {'shape': 'cosine'},
      [0.1464466, 0.3535534, 0.3535534, 0.1464466],
    ),
    ({'shape': 'square'}, [0.0625, 0.1875, 0.3125, 0.4375]),
    ({'floor': 0.1}, [0.225, 0.225, 0.225, 0.325]),
    ({'floor': 1.0}, [0, 0, 0, 1]),
  ],
)
def test_four_checkpoints(knobs, want):
  np.testing.assert_allclose(decay([1, 2, 3, 4], **knobs), want, atol=5e-8)


def test_block_means_are_the_trapezoid_rule_for_linear():
  five = [0, 10, 20, 30, 40]
  want = [0.125, 0.25, 0.25, 0.25, 0.125]
  np.testing.assert_allclose(decay(five, grid='block'), want, atol=1e-15)
  got = decay(five, shape='1-sqrt', grid='block')
  want = [0.3333, 0.2761, 0.1798, 0.1454, 0.0654]
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_unequal_spacing_is_sampled_at_the_true_steps():
  # Mean interval 20: the window is [0, 60], left edges at 1/3 and 2/3 of it
  # for equal spacing; here the block edges lie at 20 and 50.
  c = decay([20, 50, 60])
  np.testing.assert_allclose(c, [1 / 3, 1 / 2, 1 / 6], atol=1e-15)
  # Block means: at 20 + 15 and 50 + 5 of the window [20, 60].
  c = decay([20, 50, 60], grid='block')
  np.testing.assert_allclose(c, [0.375, 0.5, 0.125], atol=1e-15)


@pytest.mark.parametrize('shape', merge_shapes.names())
def test_block_means_against_quadrature(shape):
  steps = np.array([3, 10, 11, 40])
  fine = np.linspace(3, 40, 37_001)
  y = merge_shapes.shape(shape).value((fine - 3) / 37)
  middle = (y[1:] + y[:-1]) / 2
  edges = np.searchsorted(fine, steps - 1e-9)
  w = [middle[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
  got = coefficients.forward(decay(steps, shape=shape, grid='block'))
  np.testing.assert_allclose(got, w, atol=3e-6)


def test_the_right_edge_does_not_exist():
  with pytest.raises(ValueError, match='newest checkpoint the coefficient 0'):
    decay([1, 2], grid='right')
  with pytest.raises(ValueError, match="'centre' does not exist. Legal: left"):
    decay([1, 2], grid='centre')


@pytest.mark.parametrize(
  ('name', 'knobs', 'message'),
  [
    ('decay', {'shape': 'sqrt'}, "Did you mean '1-sqrt'"),
    ('decay', {'floor': 1.5}, 'floor=1.5'),
    ('decay', {'floor': float('nan')}, 'floor=nan'),
    ('ema', {'alpha': 0.0}, 'alpha=0.0'),
    ('ema', {'alpha': 1.0}, 'alpha=1.0'),
    ('ema', {'form': 'other'}, 'renormalised, recursive'),
    ('decay', {'shape': 'power-0'}, 'NUMBER must be > 0'),
    ('interpolate', {'weight': 1.5}, 'weight=1.5 is outside'),
    ('interpolate', {'weight': float('nan'), 'signed': True}, 'weight=nan'),
    ('from_run', {'floor': 1.5}, 'floor=1.5'),
  ],
)
def test_bad_knobs(name, knobs, message):
  with pytest.raises(UserError, match=message):
    spec.build('merging', spec.spec('merging', name, **knobs), [1, 2])


def test_wma_and_ema_numbers():
  six = [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(wma(six), np.arange(1, 7) / 21, atol=1e-16)
  w = coefficients.forward(wma(six))
  want = [0.9524, 0.8571, 0.7143, 0.5238, 0.2857]
  np.testing.assert_allclose(w, want, atol=5e-5)
  recursive = ema(six, form='recursive')
  want = [0.32768, 0.08192, 0.1024, 0.128, 0.16, 0.2]
  np.testing.assert_allclose(recursive, want, atol=1e-15)
  want = [0.67232, 0.5904, 0.488, 0.36, 0.2]
  np.testing.assert_allclose(coefficients.forward(recursive), want, atol=1e-15)
  want = [0.0888, 0.1110, 0.1388, 0.1735, 0.2168, 0.2711]
  np.testing.assert_allclose(ema(six), want, atol=5e-5)
  want = [0.9112, 0.8002, 0.6614, 0.4879, 0.2711]
  np.testing.assert_allclose(coefficients.forward(ema(six)), want, atol=5e-5)


@pytest.mark.parametrize(
  ('power', 'same'), [('1', 'linear'), ('0.5', '1-sqrt'), ('2', 'square')]
)
@pytest.mark.parametrize('grid', ['left', 'block'])
def test_powers_include_other_shapes(power, same, grid):
  got = decay(EQUAL, shape=f'power-{power}', grid=grid)
  want = decay(EQUAL, shape=same, grid=grid)
  np.testing.assert_allclose(got, want, atol=1e-15)
  third = coefficients.forward(decay([1, 2, 3], shape='power-3'))
  np.testing.assert_allclose(third, [26 / 27, 19 / 27], atol=1e-15)


def test_from_run_without_rates_is_the_decay_at_constant_rate():
  # Sums over single steps and the exact integral differ by O(1 / block).
  got = from_run(np.arange(5) * 1000, shape='cosine')
  want = decay(np.arange(5) * 1000, shape='cosine', grid='block')
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_means_from_run_at_the_end_and_where_the_rate_turns():
  t = np.arange(1001)
  cooled = np.minimum(1, (1000 - t) / 200)
  # What was done is asked for: the last parameters, whether the run goes on.
  for used in (cooled[:1000], np.append(cooled[:1000], 1.0)):
    first, means, last = from_run_means([800, 900, 1000], used, cooled)
    assert last == pytest.approx(1) and abs(first) + abs(means).sum() < 1e-9
  assert from_run_means([800], cooled[:1000], cooled).means.size == 0
  # From a constant rate, a quarter left: linear between any knots.
  quarter = from_run_means(
    [800, 850, 1000], np.ones(1000), 0.25 + 0.75 * cooled
  )
  assert quarter.last == pytest.approx(0.25)
  np.testing.assert_allclose(quarter.means, [0.75 / 4, 0.75 * 3 / 4])
  # What is too high at first and too low later does not cancel.
  step = np.where(t < 900, 1.0, 0.0)
  with pytest.raises(ValueError, match='between the checkpoints 800 and 1000'):
    from_run_means([800, 1000], np.ones(1000), step)
  # A warm-up from 0 before the window is no reason to refuse.
  warm = np.minimum(1, t / 100)
  want = from_run_means([800, 1000], np.ones(1000))
  assert from_run_means([800, 1000], warm[:1000])[1] == want[1]
  # A target is meant as it is, also by a run at constant rate.
  late = np.minimum(1, (1000 - t) / 50)
  with pytest.raises(ValueError, match='between the checkpoints 900 and 1000'):
    from_run_means([800, 900, 1000], np.ones(1000), late)
  linear = np.where(t < 800, 1, (1000 - t) / 200)
  turned = np.minimum(1, (1000 - t[:1000]) / 150)
  with pytest.raises(ValueError, match='between the checkpoints 800 and 1000'):
    from_run_means([800, 1000], turned, linear)
  cycles = 1 - (t[:1000] % 200) / 200
  goal = np.where(t < 200, np.append(cycles, 0), (1000 - t) / 800)
  with pytest.raises(ValueError, match='line between the checkpoints 200 and'):
    from_run_means([200, 400, 600, 800, 1000], cycles, goal)


def test_from_run_divides_by_what_was_used():
  # Methods, 1.2: eta = (1, .8, .6, .4), target (.75, .5, .25, 0), per block.
  used = np.repeat([1, 1, 0.8, 0.6, 0.4], 3)
  target = np.repeat([1, 0.75, 0.5, 0.25, 0], 3)
  got = from_run([3, 6, 9, 12, 15], used, target)
  want = [0.25, 0.125, 5 / 24, 5 / 12, 0]
  np.testing.assert_allclose(got, want, atol=1e-15)
  # The uniform mean there is no linear decay: effective rates .8 .48 .24 .08.
  w = coefficients.forward(uniform([3, 6, 9, 12, 15]))
  np.testing.assert_allclose(w * used[3::3], [0.8, 0.48, 0.24, 0.08])
  steep = np.repeat([1, 1, 0.9, 0.8, 0.1], 3)
  with pytest.raises(ValueError, match='2 of 5 the coefficient -0.125'):
    from_run([3, 6, 9, 12, 15], used, steep)
  got = from_run([3, 6, 9, 12, 15], used, steep, signed=True)
  want = [0, -0.125, -0.2083333, 1.0833333, 0.25]
  np.testing.assert_allclose(got, want, atol=5e-8)
  with pytest.raises(
    ValueError, match='at step 0, where 1.000000e.00 was used'
  ):
    from_run([3, 15], used, target / 2)
  with pytest.raises(ValueError, match='known for 15 updates.*step 18'):
    from_run([3, 18], used, target)
  with pytest.raises(ValueError, match='must be positive'):
    from_run([3, 15], used * 0, target * 0)


def test_from_run_means_replay_the_updates_with_the_target():
  # Each update is scaled by target / used, exactly, where that is linear.
  rng = np.random.default_rng(3)
  used = np.linspace(1.0, 0.6, 12)
  ratio = np.interp(np.arange(12), [0, 4, 7, 11], [1, 1, 0.5, 0.2])
  theta = np.cumsum(rng.standard_normal((13, 5)), axis=0)
  steps = [4, 7, 11]
  c = from_run_means(steps, used, used * ratio)
  means = [theta[5:8].mean(0), theta[8:12].mean(0)]
  got = c.first * theta[4] + c.means @ means + c.last * theta[11]
  want = theta[4] + ratio[4:11] @ np.diff(theta[4:12], axis=0)
  np.testing.assert_allclose(got, want, atol=1e-14)


def test_interpolation_and_extrapolation():
  np.testing.assert_allclose(interpolate([1, 2], weight=0.3), [0.7, 0.3])
  np.testing.assert_allclose(
    interpolate([1, 2, 3], weight=1.2, signed=True), [-0.2, 0.6, 0.6]
  )
  got = interpolate([1, 5], weight=-0.5, signed=True)
  np.testing.assert_allclose(got, [1.5, -0.5])


def test_controls_are_the_same_numbers_in_a_wrong_order():
  c = wma(EQUAL)
  np.testing.assert_array_equal(controls.control(c, 'reverse'), c[::-1])
  one, two = (controls.control(c, 'scramble', seed) for seed in (0, 1))
  np.testing.assert_array_equal(np.sort(one), c)
  assert (one != c).any() and (one != two).any()
  again = controls.control(c, 'scramble', 0)
  np.testing.assert_array_equal(one, again)
  with pytest.raises(ValueError, match='controls nothing'):
    controls.control(uniform(EQUAL), 'scramble')
  with pytest.raises(ValueError, match='controls nothing'):
    controls.control(decay(EQUAL, shape='cosine'), 'reverse')
  with pytest.raises(ValueError, match="control='x' is unknown"):
    controls.control(c, 'x')


def test_uniform_is_the_linear_decay():
  np.testing.assert_allclose(uniform(EQUAL), decay(EQUAL), atol=1e-15)
  want = 1 - np.arange(1, 10) / 10
  got = coefficients.forward(uniform(EQUAL))
  np.testing.assert_allclose(got, want, atol=1e-15)


def test_rule_of_another_merger():
  # Megatron-LM's weighted_merge, 'minus-sqrt': decay_i = 1 - sqrt(i / N).
  n = 7
  w = 1 - np.sqrt(np.arange(1, n) / n)
  c = np.append(w[:-1] - w[1:], w[-1])
  c = np.insert(c, 0, 1 - c.sum())
  got = decay(np.arange(n), shape='1-sqrt')
  np.testing.assert_allclose(got, c, atol=1e-15)


def test_ling_example_and_round_trips():
  c = coefficients.inverse([0.9, 0.6])
  np.testing.assert_allclose(c, [0.1, 0.3, 0.6], atol=1e-15)
  rng = np.random.default_rng(0)
  c = rng.dirichlet(np.ones(9))
  back = coefficients.inverse(coefficients.forward(c))
  np.testing.assert_allclose(back, c, atol=1e-15)
  w = np.sort(rng.random(9))[::-1]
  again = coefficients.forward(coefficients.inverse(w))
  np.testing.assert_allclose(again, w, atol=1e-15)


@h.settings(max_examples=30, deadline=None, derandomize=True)
@h.given(
  steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True),
  shape=st.sampled_from(merge_shapes.names()),
  floor=st.floats(0, 1),
  grid=st.sampled_from(['left', 'block']),
)
def test_every_decay_is_feasible(steps, shape, floor, grid):
  c = decay(sorted(steps), shape=shape, floor=floor, grid=grid)
  assert abs(c.sum() - 1) < 1e-12 and (c >= 0).all()
  w = coefficients.forward(c)
  assert (w <= 1 + 1e-12).all() and (w >= floor - 1e-12).all()


def test_effective_counts():
  """1 / sum c^2, also of coefficients of both signs."""
  count = coefficients.effective_count
  assert count([0.25] * 4) == pytest.approx(4)
  assert count([-1.0, 2.0]) == pytest.approx(1 / 5)


def test_the_least_distance_of_checkpoints_is_kept_between_neighbours():
  steps = [10, 20, 30, 40, 50, 60]
  found = sources.raw_steps(steps, end=60, window=60, every=20)
  assert found == [20, 40, 60]
  with pytest.raises(ValueError, match='holds one checkpoint'):
    sources.raw_steps(steps, end=60, window=10)
