"""Averages after the fact: any profile from stored power EMAs (2312.02696).

An average of a trajectory is a profile: the weight of the iterate after each
step. A stored power EMA of step t and exponent g has the cumulative weight
(s/t)^(g+1); a decay of the learning rate with multiplier W(s) has 1 - W(s),
since the update that turns s into s + 1 is weighted by what comes after it.
The coefficients of the stored averages are the least-squares fit of the wanted
profile; the fit says how far it is off, since nothing else would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from merging.engine import shapes

CELLS = 20_000  # of the grid of steps, over which profiles are compared


class Fit(NamedTuple):
  """Coefficients of stored averages, sum 1, and how good they are.

  error: |fitted - wanted| / |wanted|, l2 norms of the profiles.
  multiplier_error: largest |W fitted - W wanted| at any step.
  condition: condition number of the matrix of inner products.
  absolute: sum of |coefficients|, which multiplies rounding in what is stored.
  """

  coefficients: np.ndarray
  error: float
  multiplier_error: float
  condition: float
  absolute: float


def floored(
  found: Fit, floor: float, wanted: np.ndarray, steps: np.ndarray
) -> Fit:
  """Returns the fit of (1 - floor) x `wanted` + floor x the last iterate.

  Arguments are those of `fit`. The last iterate is stored, and costs no error.
  """
  each = np.diff(wanted) / np.diff(steps)  # of the iterates in a cell
  size = np.diff(steps) @ each**2
  last = (1 - floor) * each[-1]
  both = (1 - floor) ** 2 * size + (last + floor) ** 2 - last**2
  return found._replace(
    coefficients=found.coefficients * (1 - floor),
    error=found.error * (1 - floor) * float(np.sqrt(size / both)),
    multiplier_error=found.multiplier_error * (1 - floor),
    absolute=found.absolute * (1 - floor) + floor,
  )


def gamma(sigma: float) -> float:
  """Returns the exponent g of relative width `sigma` (eq. 126 of the paper).

  Raises:
    ValueError: a width that no exponent above 0 has.
  """
  if not 0 < sigma <= 0.288:
    raise ValueError(f'sigma={sigma} must lie above 0 and up to 0.288.')
  t = sigma**-2
  return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def grid(end: int, knots: Sequence[int] = ()) -> np.ndarray:
  """Returns steps 0 .. end: all of them, or CELLS intervals and the knots."""
  if end < 1:
    raise ValueError(f'end={end} must be at least 1.')
  steps = np.linspace(0, end, min(end, CELLS) + 1).round()
  return np.union1d(steps, [k for k in knots if 0 <= k <= end])


def power(steps: np.ndarray, end: float, exponent: float) -> np.ndarray:
  """Returns the cumulative weight of a power EMA of step `end`, float64."""
  return np.clip(steps / end, 0, 1) ** (exponent + 1)


def decay(steps: np.ndarray, window: int, shape: str) -> np.ndarray:
  """Returns the cumulative weight of a decay to zero that ends at steps[-1].

  Raises:
    ValueError: an unknown shape; a window that begins before step 0.
  """
  begin = steps[-1] - window
  if begin < 0 or window < 1:
    raise ValueError(f'window={window} must be from 1 to {steps[-1]:.0f}.')
  x = np.clip((steps - begin) / window, 0, 1)
  w = shapes.shape(shape).value(x)
  return 1 - np.append(w[:-1], 0)  # what is left at the end is dropped there


def fit(
  stored: Sequence[np.ndarray],
  wanted: np.ndarray,
  steps: np.ndarray,
  *,
  nonnegative: bool = False,
  ridge: float = 0.0,
) -> Fit:
  """Fits the profile `wanted` by those of stored averages.

  The least squares solution, divided by its sum: with a large ridge, which
  makes it smaller, not the best of those of sum 1.

  Args:
    stored: cumulative weights at `steps`, one row per average.
    wanted: cumulative weights of the wanted average.
    steps: the grid, from 0 to the end.
    nonnegative: no coefficient below 0: an average of averages.
    ridge: penalty of the squared coefficients, in units of the mean squared
      norm of the stored profiles; smaller coefficients for a larger error.

  Raises:
    ValueError: nothing stored; stored profiles that do not reach the wanted.
  """
  if not len(stored):
    raise ValueError('there are no stored averages to fit.')
  if not 0 <= ridge < np.inf:
    raise ValueError(f'ridge={ridge} must be a finite number of at least 0.')
  root = np.sqrt(np.diff(steps))
  columns = (np.diff(np.stack(stored)) / root).T
  target = np.diff(wanted) / root
  q, r = np.linalg.qr(columns)
  penalty = np.sqrt(ridge * np.mean(np.sum(columns**2, axis=0)))
  n = r.shape[1]
  a = np.concatenate([r, penalty * np.eye(n)])
  b = np.concatenate([q.T @ target, np.zeros(n)])
  x = optimize.nnls(a, b)[0] if nonnegative else np.linalg.lstsq(a, b)[0]
  if not nonnegative:  # refined once, by a residual of extended precision
    off = (target - columns.astype(np.longdouble) @ x).astype(np.float64)
    x += np.linalg.lstsq(a, np.concatenate([q.T @ off, -penalty * x]))[0]
  if not abs(x.sum()) > 1e-6:
    raise ValueError('the stored averages have nothing of the wanted one.')
  x = x / x.sum()
  off = np.tensordot(x, np.stack(stored), 1) - wanted
  return Fit(
    x,
    float(np.linalg.norm(columns @ x - target) / np.linalg.norm(target)),
    float(np.abs(off).max()),
    float(np.linalg.cond(r) ** 2),
    float(np.abs(x).sum()),
  )
