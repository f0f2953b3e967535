"""Coefficients for a run whose learning rate varied, and for any schedule."""

from collections.abc import Sequence

import numpy as np

from merging.engine import coefficients


def from_run(
  steps: Sequence[int],
  learning_rates: Sequence[float] | None = None,
  target: Sequence[float] | None = None,
  *,
  shape: str = 'linear',
  floor: float = 0.0,
  signed: bool = False,
) -> np.ndarray:
  """WSM with the learning rates that were used (arXiv 2507.17634).

  A block's displacement already contains the learning rate that was used, so
  w_i = (sum of the target over block i) / (sum of what was used over block i):
  the merge has the mean learning rate of the target in every block.

  Args:
    steps: of the checkpoints, oldest first.
    learning_rates: used by each update of the run; None = constant.
    target: wanted for each update; None = a decay from the first checkpoint to
      the last, from the largest learning rate used between them.
    shape, floor: of that decay, as in `decay`.
    signed: permits negative coefficients.

  Returns:
    float64 coefficients of sum 1.

  Raises:
    ValueError: a target above what was used, or that rises against it, unless
      `signed`; that differs before the first checkpoint, where no merge can
      change anything; rates that are missing or not positive.
  """
  s = coefficients.check_steps(steps)
  if s.size == 1:
    return np.ones(1)
  used, goal = _rates(s, learning_rates, target, shape, floor)
  sums = [np.add.reduceat(x[s[0] : s[-1]], s[:-1] - s[0]) for x in (goal, used)]
  w = coefficients.correct(*sums)
  return coefficients.inverse(_round(w), allow_negative=signed)


def from_run_means(
  steps: Sequence[int],
  learning_rates: Sequence[float] | None = None,
  target: Sequence[float] | None = None,
  *,
  shape: str = 'linear',
  floor: float = 0.0,
  signed: bool = False,
) -> coefficients.IntervalMeans:
  """As `from_run`, from interval means: target / used, linear between knots.

  At a knot the ratio is that of the update after it, at the last one what the
  updates before it tend to.

  Raises:
    ValueError: as `from_run`; a ratio that turns inside an interval, so that
      the line misses the target by over a tenth of what was used there.
  """
  s = coefficients.check_steps(steps)
  if s.size == 1:
    return coefficients.from_knots([1.0])
  used, goal = _rates(s, learning_rates, target, shape, floor)
  used, goal = used[: s[-1]], goal[: s[-1]]
  ratio = np.ones(s[-1])  # before the window nothing is asked for
  ratio[s[0] :] = coefficients.correct(goal[s[0] :], used[s[0] :])
  w = _round(_knots(ratio, s))
  found = coefficients.from_knots(w, allow_negative=signed)
  line = lambda knots: np.interp(np.arange(s[-1]), s, knots)
  sums = lambda x: np.add.reduceat(x, s[:-1])
  off = sums(abs(line(w) * used - goal))
  # A shape is asked for as a line between the knots, a target as it is.
  curved = sums(abs(line(_knots(goal, s)) - goal)) if target is None else 0
  wrong = off > curved + 0.1 * sums(used)
  if wrong.any():
    i = int(np.argmax(wrong))
    raise ValueError(
      f'target / used is far from a line between the checkpoints {s[i]} and '
      f'{s[i + 1]}, so that a mean cannot be corrected; leave out the means, '
      'or save where the learning rate turns.'
    )
  return found


def _knots(x, s):
  """Returns x at the steps s, at the last of them as the steps before tell."""
  end = 2 * x[s[-1] - 1] - x[s[-1] - 2] if s[-1] > 1 else x[0]
  return np.append(x[s[:-1]], end)


def _rates(s, learning_rates, target, shape, floor):
  """Returns what was used and what is wanted for each update up to s_k."""
  coefficients.check_floor(floor)
  last = int(s[-1])
  given = np.ones(last) if learning_rates is None else learning_rates
  used = np.asarray(given, np.float64)
  if used.size < last:
    raise ValueError(
      f'learning rates are known for {used.size} updates, but the last '
      f'checkpoint is step {last}.'
    )
  if target is None:
    x = (np.arange(last + 1) - s[0]) / (last - s[0])
    decay = coefficients.target(x, shape, floor)
    return used, decay * used[s[0] : last].max()
  goal = np.asarray(target, np.float64)
  if goal.size < last:
    raise ValueError(f'the target has {goal.size} updates; {last} are done.')
  before = slice(0, s[0])
  if not np.allclose(goal[before], used[before], rtol=1e-5, atol=0):
    j = int(np.argmax(~np.isclose(goal[before], used[before], 1e-5, 0)))
    raise ValueError(
      f'the target is {goal[j]:.6e} at step {j}, where {used[j]:.6e} was used; '
      f'this merge changes nothing before its first checkpoint, {s[0]}: until '
      'there it must be that of the run, with the same warm-up.'
    )
  return used, goal


def _round(w):
  """Removes rises of rounding size, which are no request for a rise."""
  lowest = np.minimum.accumulate(np.minimum(w, 1))
  return np.where(w - lowest <= 1e-6, np.maximum(lowest, 0), w)
