"""Power EMAs and moments: profiles against closed forms and every iterate."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from launch.parts import emulation, stored
from lm import averages, checkpoint, log, loop
from lm import run as run_lib
from lm.errors import UserError
from merging.engine import coefficients, moments, posthoc, stream
from merging.power_ema import power_ema
from tests import helpers, tools

END = 4000
STEPS = posthoc.grid(END)


def _snapshots(n):
  """Trackers of widths .05 and .10 at n equidistant steps."""
  return [
    posthoc.power(STEPS, END * i / n, posthoc.gamma(sigma))
    for sigma in (0.05, 0.1)
    for i in range(1, n + 1)
  ]


def _ema(sigma):
  return posthoc.power(STEPS, END, posthoc.gamma(sigma))


def test_inner_products_of_profiles():
  """2312.02696, algorithm 3, in units of the time that is 1 at the end."""

  def closed(ta, ga, tb, gb):
    power = (ta / tb) ** (gb if ta < tb else -ga)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) / max(ta, tb) * power

  g = {sigma: posthoc.gamma(sigma) for sigma in (0.05, 0.1)}
  assert closed(0.5, g[0.05], 1, g[0.1]) == pytest.approx(0.0467303, abs=5e-8)
  steps = posthoc.grid(20_000)
  for ta, tb in ((0.5, 1), (1, 0.5), (1, 1)):
    a = np.diff(posthoc.power(steps, ta * 20_000, g[0.05]))
    b = np.diff(posthoc.power(steps, tb * 20_000, g[0.1]))
    want = closed(ta, g[0.05], tb, g[0.1])
    assert a @ b * 20_000 == pytest.approx(want, rel=2e-6)


def test_a_stored_profile_is_itself():
  for i in range(8):
    stored_ = _snapshots(4)
    fit = posthoc.fit(stored_, stored_[i], STEPS)
    np.testing.assert_allclose(fit.coefficients, np.eye(8)[i], atol=1e-15)
    assert fit.error < 1e-15


@pytest.mark.parametrize(
  ('n', 'sigma', 'error'),
  [(4, 0.07, 0.036), (4, 0.12, 0.041), (4, 0.15, 0.106), (4, 0.2, 0.223),
   (16, 0.15, 0.0090), (16, 0.2, 0.0233), (16, 0.25, 0.0793)],
)  # fmt: skip
def test_errors_of_other_widths(n, sigma, error):
  fit = posthoc.fit(_snapshots(n), _ema(sigma), STEPS)
  assert fit.error == pytest.approx(error, abs=5e-4 if n == 4 else 5e-5)
  assert fit.coefficients.sum() == pytest.approx(1, abs=1e-12)
  if n == 16:
    assert fit.condition == pytest.approx(5.9e3, rel=0.01)
  if (n, sigma) == (16, 0.15):
    assert fit.coefficients.min() == pytest.approx(-0.126, abs=5e-4)


def test_linear_cooldowns_from_trackers():
  half = posthoc.fit(
    _snapshots(16), posthoc.decay(STEPS, 2000, 'linear'), STEPS
  )
  assert half.error == pytest.approx(0.035, abs=5e-4)
  # Where decays act, .0022 and .0170; 2312.02696 has no such numbers, and the
  # normal equations of the closed inner products give these.
  assert half.multiplier_error == pytest.approx(0.00221, abs=2e-5)
  fifth = posthoc.fit(
    _snapshots(16), posthoc.decay(STEPS, 800, 'linear'), STEPS
  )
  assert fifth.multiplier_error == pytest.approx(0.01699, abs=2e-5)
  assert fifth.coefficients.min() == pytest.approx(-1.38, abs=0.01)
  assert fifth.absolute == pytest.approx(
    np.abs(fifth.coefficients).sum(), rel=1e-12
  )
  # The multiplier that a merge would have, by hand.
  w = 1 - np.tensordot(fifth.coefficients, np.stack(_snapshots(16)), 1)
  target = np.clip((END - STEPS) / 800, 0, 1)
  assert np.abs(w - target).max() == pytest.approx(fifth.multiplier_error)


def test_constraints():
  free = posthoc.fit(_snapshots(16), _ema(0.2), STEPS)
  convex = posthoc.fit(_snapshots(16), _ema(0.2), STEPS, nonnegative=True)
  small = posthoc.fit(_snapshots(16), _ema(0.2), STEPS, ridge=1e-2)
  assert free.coefficients.min() < -0.1
  assert convex.coefficients.min() >= 0 and convex.absolute <= 1 + 1e-12
  assert free.error < small.error < convex.error
  assert small.absolute < free.absolute
  for fit in (convex, small):
    assert fit.coefficients.sum() == pytest.approx(1, abs=1e-12)


def test_a_coarse_grid_gives_the_same_fit(monkeypatch):
  want = posthoc.fit(_snapshots(4), _ema(0.12), STEPS)
  monkeypatch.setattr(posthoc, 'CELLS', 500)
  steps = posthoc.grid(END, [777])
  assert steps.size == 502
  rows = [
    posthoc.power(steps, 1000 * i, posthoc.gamma(sigma))
    for sigma in (0.05, 0.1)
    for i in range(1, 5)
  ]
  got = posthoc.fit(rows, posthoc.power(steps, END, posthoc.gamma(0.12)), steps)
  np.testing.assert_allclose(got.coefficients, want.coefficients, atol=2e-3)


def test_widths_are_those_of_the_trackers():
  for sigma in (0.01, 0.05, 0.1, 0.2, 0.288):
    assert posthoc.gamma(sigma) == averages.gamma(sigma)
  c = power_ema(np.arange(1, 1001), sigma=0.1)
  assert np.sqrt(c @ (np.arange(1, 1001) - c @ np.arange(1, 1001)) ** 2) == (
    pytest.approx(100, rel=1e-3)
  )
  with pytest.raises(ValueError, match='sigma=0.3 must lie'):
    power_ema([1, 2], sigma=0.3)


def test_moments_of_short_intervals_are_exact_too():
  theta = np.cumsum(np.random.default_rng(0).standard_normal(13))
  knots = [0, 5, 10, 12]
  w = coefficients.target(np.arange(12) / 12, 'square', 0.0)
  c = moments.interval_moments(knots, 'square')
  got = c.first * theta[0] + c.last * theta[12]
  for a, b, mean, moment in zip(
    knots, knots[1:], c.means, c.moments, strict=False
  ):
    inside = theta[a + 1 : b + 1]
    j = np.arange(1, b - a + 1)
    got += mean * inside.mean() + moment * (inside @ j) / j.sum()
  assert got == pytest.approx(theta[0] + w @ np.diff(theta), abs=1e-12)


@pytest.mark.parametrize('shape', ['linear', 'square', 'cosine', '1-sqrt'])
def test_moments_against_the_weight_of_every_update(shape):
  """In float64; the averages are those of the train state, inside jit."""
  rng = np.random.default_rng(0)
  theta = np.cumsum(rng.standard_normal((41, 3)), 0) / 10
  config = ConfigDict({'checkpoint': {'every_steps': 10, 'mean': True,
                                      'moment': True, 'ema': ''}})  # fmt: skip
  stored_ = []
  with jax.enable_x64(True):
    update = jax.jit(lambda a, s, x: averages.update(config, a, s, {'x': x}))
    state = {'moment': {'x': jnp.zeros(3)}}
    for s in range(40):
      state = update(state, jnp.int32(s), jnp.asarray(theta[s + 1]))
      if (s + 1) % 10 == 0:
        stored_.append(np.asarray(state['moment']['x']))
  means = [theta[a + 1 : a + 11].mean(0) for a in range(0, 40, 10)]
  knots = [0, 10, 20, 30, 40]
  w = coefficients.target(np.arange(40) / 40, shape, 0.1)
  want = theta[0] + w @ np.diff(theta, axis=0)
  c = moments.interval_moments(knots, shape, 0.1)
  assert c.first + sum(c.means) + sum(c.moments) + c.last == pytest.approx(1)
  ends = c.first * theta[0] + c.last * theta[40]
  got = ends + c.means @ means + c.moments @ stored_
  plain = coefficients.interval_means(knots, shape, 0.1)
  without = (
    plain.first * theta[0] + plain.means @ means + plain.last * theta[40]
  )
  error, before = np.abs(got - want).max(), np.abs(without - want).max()
  if shape in ('linear', 'square'):  # quadratic in every interval
    assert error < 5e-16 * 10
    assert shape == 'linear' or before > 1e-4
  else:
    assert error < before / 2


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs') / 'run'
  config = helpers.config(
    'schedule=constant', num_steps=40, checkpoint__every_steps=5,
    checkpoint__ema='0.05,0.1,0.15', checkpoint__moment=True,
    eval__every_steps=0, learning_rate=0.01,
  )  # fmt: skip
  loop.train(config, path)
  for item in path.glob('checkpoints/*/ema_0.15'):
    if item.parent.name != '40':
      shutil.rmtree(item)
  (path / 'checkpoints/40/ema_0.15').rename(path / 'third')
  return run_lib.Run(path)


def _merged(run, method, text, **at):
  p = stored.plan(run, emulation.parse_method(method), text, **at)
  return p, helpers.flat(stream.combine(p.sources))


def test_a_third_tracker_after_the_fact(run):
  """Against the EMA of width .15 that the run tracked online."""
  p, merged = _merged(run, 'power_ema:sigma=0.15', 'trackers')
  third = run.path / 'third'
  online = checkpoint.restore_tree(third, checkpoint.abstract_item(third))
  online = helpers.flat(online)
  start, last = (helpers.flat(run.params(s)) for s in (0, 40))
  size = lambda a, b: np.sqrt(sum(((a[k] - b[k]) ** 2).sum() for k in a))
  moved = size(last, start)
  assert p.about['fit']['error'] < 0.03
  assert size(merged, online) < p.about['fit']['error'] * moved
  assert size(last, online) > 20 * size(merged, online)


def test_a_decay_from_trackers_and_from_moments(run):
  q, exact = _merged(run, 'decay:floor=0.2', 'moments', end=40, window=20)
  knots = {'20': 1, '25': 0.8, '30': 0.6, '35': 0.4}
  assert q.about['multipliers'] == pytest.approx(knots)
  # 19 iterates of weight .04 and the newest with .2 more.
  assert 1 / q.about['iterates'] == pytest.approx(19 * 0.04**2 + 0.24**2)
  p, fitted = _merged(run, 'decay:floor=0.2', 'trackers', end=40, window=20)
  assert sum(c for _, c in p.sources) == pytest.approx(1, abs=1e-12)
  assert dict(p.sources)[run.path / 'checkpoints/40/params'] == 0.2
  absolute = sum(abs(c) for _, c in p.sources)
  assert p.about['fit']['absolute'] == pytest.approx(absolute)
  off, w = p.about['fit']['multiplier_error'], p.about['multipliers']
  assert w == pytest.approx(knots, abs=off)
  means = emulation.plan(
    run, emulation.parse_method('decay:floor=0.2'), means=True, window=20
  )
  means = helpers.flat(stream.combine(means.sources))
  last = helpers.flat(run.params(40))
  for key, value in means.items():  # linear: moments add nothing
    np.testing.assert_allclose(exact[key], value, atol=1e-6)
    off = np.abs(fitted[key] - value).max()
    assert off < 0.2 * np.abs(last[key] - value).max()


def test_the_quality_of_a_fit_is_that_of_the_average_with_its_floor():
  steps, g = np.arange(41), posthoc.gamma(0.1)
  rows = [posthoc.power(steps, s, g) for s in (20, 30, 40)]
  wanted = posthoc.decay(steps, 20, 'cosine')
  found = posthoc.fit(rows, wanted, steps)
  assert posthoc.floored(found, 0.0, wanted, steps)[1:] == pytest.approx(
    found[1:]
  )
  got = posthoc.floored(found, 0.3, wanted, steps)
  profiles = []
  for total in (got.coefficients @ np.stack(rows), 0.7 * wanted):
    profiles.append(np.diff(total))
    profiles[-1][-1] += 0.3  # the share of the last iterate
  fitted, exact = profiles
  off = np.linalg.norm(fitted - exact) / np.linalg.norm(exact)
  assert got.error == pytest.approx(off)
  largest = np.abs(np.cumsum(fitted) - np.cumsum(exact)).max()
  assert got.multiplier_error == pytest.approx(largest)
  assert got.absolute == pytest.approx(np.abs(got.coefficients).sum() + 0.3)


@pytest.mark.parametrize(
  ('method', 'text', 'sentence'),
  [
    ('decay', 'moment', "Did you mean 'moments'"),
    ('decay', 'trackers:ridge=x', "ridge='x' must be a number"),
    ('decay', 'trackers:ridge=-1', 'ridge=-1.0'),
    ('decay', 'trackers:ridge=inf', 'ridge=inf must be a finite number'),
    ('decay', 'trackers:nonnegative=1', 'must be True or False'),
    ('decay', 'moments:ridge=1', 'is not a choice'),
    ('uniform', 'trackers', "needs decay or power_ema, not 'uniform'"),
    ('power_ema', 'moments', "needs decay, not 'power_ema'"),
    ('power_ema:sigma=0.4', 'trackers', 'sigma=0.4'),
  ],
)
def test_mistakes(run, method, text, sentence):
  with pytest.raises((UserError, ValueError), match=sentence):
    stored.plan(run, emulation.parse_method(method), text)


@pytest.mark.parametrize('window', [-5, 41])
@pytest.mark.parametrize('text', ['moments', 'trackers'])
def test_windows_that_do_not_fit(run, text, window):
  with pytest.raises(UserError, match=f'window={window} must be from 1 to'):
    stored.plan(run, {'name': 'decay'}, text, window=window)


def test_a_window_before_a_branch_began(run, tmp_path):
  """Its learning rates are not those of the schedule of the branch."""
  branch = tmp_path / 'branch'
  shutil.copytree(run.path, branch)
  config = {**log.read_config(branch), 'branch': f'{run.path}@20'}
  log.write_json(branch / 'config.json', config)
  branch = run_lib.Run(branch)
  stored.plan(branch, emulation.parse_method('decay'), 'trackers', window=20)
  with pytest.raises(UserError, match='begins at step 20; legal: at most 20'):
    stored.plan(branch, emulation.parse_method('decay'), 'trackers', window=25)


def test_the_command(run, monkeypatch, capsys):
  arguments = [f'--run={run.path}', '--method=power_ema:sigma=0.15']
  arguments.append('--stored=trackers:nonnegative=True')
  assert tools.call(monkeypatch, 'merge', *arguments) == 0
  output = capsys.readouterr().out
  assert 'condition number' in output and 'effective LR' in output
  (name,) = run.merged
  assert run.params(name).keys() == run.params(40).keys()
  about = json.loads((run.path / 'merged' / name / 'merge.json').read_text())
  assert about['method']['fit']['absolute'] == pytest.approx(1)
  assert tools.call(monkeypatch, 'merge', *arguments) == 0
  assert 'is this very merge already' in capsys.readouterr().out
  assert tools.call(monkeypatch, 'merge', *arguments, '--means') == 2
  assert '--means does not go with --stored' in capsys.readouterr().err
  assert tools.call(monkeypatch, 'merge', *arguments, '--control=reverse') == 2
  assert '--control does not go with --stored' in capsys.readouterr().err


def test_a_grid_of_two_widths_fits_as_a_fine_one():
  """Cells are weighted by their steps."""
  fits = []
  for grid in (
    np.arange(4001.0),
    np.concatenate([np.arange(2500.0), np.arange(2500.0, 4001.0, 20)]),
  ):
    stored = [
      posthoc.power(grid, end, posthoc.gamma(sigma))
      for end in (1000, 2000, 3000, 4000)
      for sigma in (0.05, 0.1)
    ]
    wanted = posthoc.power(grid, 4000, posthoc.gamma(0.2))
    fits.append(posthoc.fit(stored, wanted, grid).coefficients)
  np.testing.assert_allclose(fits[1], fits[0], atol=2e-3)
