"""The schedule that the gradient norms of a run ask for.

Defazio, Cutkosky, Mehta and Mishchenko 2023 (arXiv 2310.07831): any weights of
the steps give a schedule for the last iterate; the best weights are inverse to
the gradient norms. Refinement has lost as well as won against a linear decay:
compare at equal budget with both peaks tuned.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage


def refine(
  grad_norms: ArrayLike, *, power: float = 1.0, tau: float = 0.1
) -> np.ndarray:
  """Returns multipliers of maximum 1, one per norm, the last 0 (algorithm 1).

  The norms G are median-filtered, w = G^-power, and s_t = w_t sum_{p > t} w_p.
  Constant norms give the linear decay. The peak learning rate is to be tuned
  anew; norms of a run with warm-up ask for another explicit warm-up.

  Args:
    grad_norms: raw norms of the mean gradient, before clipping, one per step
      of a whole run. Zeros and values that are not finite (skipped steps) are
      interpolated.
    power: 2 for l2 norms and SGD, 1 for l1 norms and Adam, or for the dual
      norm of another method.
    tau: width of the median filter as a fraction of the run; 0 = none.

  Raises:
    ValueError: fewer than two norms, none of them usable, a negative power,
      tau outside [0, 1].
  """
  norms = _clean(grad_norms)
  if not (np.isfinite(power) and power >= 0):
    raise ValueError(f'power={power} must be at least 0; 1 or 2 is usual.')
  if not 0 <= tau <= 1:
    raise ValueError(f'tau={tau} must be a fraction of the run in [0, 1].')
  smooth = median(norms, width(norms.size, tau))
  # Relative to the mean, so that a power cannot overflow.
  w = (smooth / smooth.mean()) ** -power
  s = w * _later(w)
  return s / s.max()


class Conversion(NamedTuple):
  """Learning rates for weights, and the guarantee that comes with them."""

  learning_rates: np.ndarray
  bound: float


def conversion(
  weights: ArrayLike, *, grad_norms: ArrayLike, distance: float = 1.0
) -> Conversion:
  """Returns the learning rates of SGD for any weights, at the best scale.

  lr_t = eta w_t sum_{p > t} w_p / sum w with eta = D / sqrt(sum w^2 G^2), and
  E f(x_T) - f* <= D sqrt(sum w^2 G^2) / sum w (theorem 1).
  """
  w = np.asarray(weights, np.float64)
  total = w.sum()
  spread = np.sqrt(np.sum((w * np.asarray(grad_norms, np.float64)) ** 2))
  return Conversion(
    distance / spread * w * _later(w) / total, float(distance * spread / total)
  )


def width(num_norms: int, tau: float) -> int:
  """Returns the odd width of the filter for a fraction of the run."""
  return 2 * (int(tau * num_norms) // 2) + 1


def median(x: np.ndarray, size: int) -> np.ndarray:
  """Median filter that repeats the first value and reflects at the end.

  Repeating the last value instead would freeze it over half a window and
  distort the end of the schedule.
  """
  if size == 1:
    return x
  padded = np.pad(x, (0, 2 * size), mode='reflect')
  return ndimage.median_filter(padded, size, mode='nearest')[: x.size]


def resample(values: ArrayLike, num_steps: int) -> np.ndarray:
  """Returns the same curve in relative time with another number of steps."""
  y = np.asarray(values, np.float64)
  at = np.linspace(0, y.size - 1, num_steps)
  return np.interp(at, np.arange(y.size), y)


def _clean(grad_norms):
  g = np.asarray(grad_norms, np.float64)
  if g.ndim != 1 or g.size < 2:
    raise ValueError(
      f'grad_norms has the shape {g.shape}; legal: a list of at least two.'
    )
  usable = np.isfinite(g) & (g > 0)
  if not usable.any():
    raise ValueError('grad_norms contains no positive, finite norm.')
  steps = np.arange(g.size)
  return np.interp(steps, steps[usable], g[usable])


def _later(w):
  """Returns the sum of all later weights, exactly 0 for the last."""
  return np.append(np.cumsum(w[:0:-1])[::-1], 0.0)
