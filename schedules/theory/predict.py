"""Final losses of other schedules, from a few runs of one task.

loss = offset + slope * Omega(lr; D) with the bound of bound.py, G = 1. Three
numbers are fitted; the rest is the theory. It knows no divergence, and it
exaggerates the harm of a constant learning rate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from schedules.theory import bound


class Fit(NamedTuple):
  """distance: D / G of the task. slope, offset: from the bound to the loss."""

  distance: float
  slope: float
  offset: float


def fit(lrs: Sequence[ArrayLike], losses: ArrayLike) -> Fit:
  """Fits by least squares the final losses of runs.

  Args:
    lrs: the learning rates of each run, one per step.
    losses: their final losses.

  Raises:
    ValueError: fewer than three runs, fewer than two peak learning rates,
      losses that are not finite.
  """
  y = np.asarray(losses, np.float64)
  peaks = {float(np.max(lr)) for lr in lrs}
  if len(lrs) != y.size or y.size < 3 or not np.isfinite(y).all():
    raise ValueError(
      f'{len(lrs)} runs with the losses {y.tolist()} are not enough: three '
      'numbers are fitted, to finite losses.'
    )
  if max(peaks) < 1.01 * min(peaks):
    raise ValueError(
      f'all runs have the peak learning rate {max(peaks):.3g}; at least two '
      'are needed to find the scale.'
    )
  a, b = terms = np.array([bound.terms(lr) for lr in lrs]).T
  different = len(np.unique(np.round(np.log(terms), 6), axis=1).T)
  if different < 3:
    raise ValueError(
      f'{len(lrs)} runs of {different} different schedules or peak learning '
      'rates are not enough: three numbers are fitted, and other seeds '
      'of a run do not count.'
    )

  def residual(log_distance):
    return _affine(np.exp(2 * log_distance) * a + b, y)[0]

  grid = np.linspace(*_range(a, b), 61)
  best = int(np.argmin([residual(x) for x in grid]))
  low, high = grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)]
  found = optimize.minimize_scalar(
    residual, bounds=(low, high), method='bounded', options={'xatol': 1e-9}
  )
  distance = float(np.exp(found.x))
  _, slope, offset = _affine(distance**2 * a + b, y)
  return Fit(distance, slope, offset)


def loss(fitted: Fit, lr: ArrayLike) -> float:
  """Returns the predicted final loss after the learning rates `lr`."""
  value = bound.omega(lr, distance=fitted.distance)
  return fitted.offset + fitted.slope * value


def best_peak(fitted: Fit, multipliers: ArrayLike) -> float:
  """Returns the predicted best peak learning rate of a schedule."""
  return bound.best(multipliers, distance=fitted.distance).learning_rate


class Uncertainty(NamedTuple):
  """What the residuals of a fit say of its predictions.

  loss: half width of the interval of a new run's loss, for each of `lrs`.
  peak: factor by which the best peak may be higher or lower; infinite if the
    runs do not tell the distance D.
  """

  loss: np.ndarray
  peak: float


def uncertainty(
  fitted: Fit,
  used: Sequence[ArrayLike],
  losses: ArrayLike,
  lrs: Sequence[ArrayLike],
  *,
  level: float = 0.9,
) -> Uncertainty:
  """Returns prediction intervals by linearisation, with Student's t.

  With J the derivatives of the fit by (log D, slope, offset), j those of a new
  run and s^2 = |residuals|^2 / (n - 3): half = t s sqrt(1 + j (J'J)^-1 j').
  Infinite for three runs, which leave nothing to judge the fit by. It knows no
  error of the theory that the runs of the fit do not show.

  Args:
    fitted: of `used` and `losses`.
    used, losses: as for `fit`.
    lrs: learning rates of the runs to predict.
    level: probability of the interval.
  """
  y = np.asarray(losses, np.float64)
  free = y.size - 3
  if free < 1:
    return Uncertainty(np.full(len(lrs), np.inf), np.inf)
  rows = _derivatives(fitted, used)
  got = np.array([loss(fitted, lr) for lr in used])
  spread = np.sqrt(np.sum((y - got) ** 2) / free)
  t = stats.t.ppf((1 + level) / 2, free)
  covariance = np.linalg.pinv(rows.T @ rows)
  new = _derivatives(fitted, lrs)
  widen = np.einsum('ni,ij,nj->n', new, covariance, new)
  half = t * spread * np.sqrt(1 + widen)
  log_factor = t * spread * np.sqrt(covariance[0, 0])
  low, high = _range(*np.array([bound.terms(lr) for lr in used]).T)
  inside = low + 0.01 < np.log(fitted.distance) < high - 0.01
  known = inside and np.linalg.matrix_rank(rows) == 3
  return Uncertainty(
    half, float(np.exp(min(log_factor, 700.0))) if known else np.inf
  )


def _range(a, b):
  """Within these logs the two terms of the bound balance for some D."""
  logs = 0.5 * np.log(b / a)
  return logs.min() - 3, logs.max() + 3


def _derivatives(fitted, lrs):
  """Returns those of the loss by (log D, slope, offset), shape (n, 3)."""
  a, b = np.array([bound.terms(lr) for lr in lrs]).T
  initial = fitted.distance**2 * a
  return np.stack([2 * fitted.slope * initial, initial + b, 1 + 0 * a], 1)


def _affine(x, y) -> tuple[float, float, float]:
  """Returns (sum of squared residuals, slope >= 0, offset)."""
  centred = x - x.mean()
  slope = max(float(centred @ (y - y.mean()) / (centred @ centred)), 0.0)
  offset = float(y.mean() - slope * x.mean())
  return float(np.sum((y - offset - slope * x) ** 2)), slope, offset
