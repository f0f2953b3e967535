"""Final losses of other schedules, from a few runs of one task.

loss = offset + slope * Omega(lr; D) with the bound of bound.py, G = 1. Three
numbers are fitted; the rest is the theory. It knows no divergence, and it
exaggerates the harm of a constant learning rate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

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
  a, b = np.array([bound.terms(lr) for lr in lrs]).T

  def residual(log_distance):
    return _affine(np.exp(2 * log_distance) * a + b, y)[0]

  # The two terms of the bound balance for some D within these.
  logs = 0.5 * np.log(b / a)
  grid = np.linspace(logs.min() - 3, logs.max() + 3, 61)
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


def _affine(x, y) -> tuple[float, float, float]:
  """Returns (sum of squared residuals, slope >= 0, offset)."""
  centred = x - x.mean()
  slope = max(float(centred @ (y - y.mean()) / (centred @ centred)), 0.0)
  offset = float(y.mean() - slope * x.mean())
  return float(np.sum((y - offset - slope * x) ** 2)), slope, offset
