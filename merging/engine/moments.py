"""Decays from interval means and first moments: quadratic in every interval."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from merging.engine import coefficients


class Moments(NamedTuple):
  """Coefficients of theta_{s_0}, of M_1.., of L_1.. and of theta_{s_k}."""

  first: float
  means: np.ndarray
  moments: np.ndarray
  last: float


def interval_moments(
  steps: Sequence[int], shape: str = 'linear', floor: float = 0.0
) -> Moments:
  """Emulates a decay over [s_0, s_k], W(s), from what intervals store.

  Of the n iterates after s_{i-1} up to s_i, M_i is the mean and L_i the mean
  with weights j = 1..n. The decay weights iterate s with W(s-1) - W(s); in each
  interval this is replaced by the straight line a + b j nearest to it in least
  squares, which keeps its sum: n a M_i + b n (n+1)/2 L_i. Exact where W is
  quadratic in every interval (linear, square, and between any knots); for
  other shapes the error falls with the cube of the interval.

  Raises:
    ValueError: as `coefficients.interval_means`.
  """
  s = coefficients.check_steps(steps)
  coefficients.check_floor(floor)
  if s.size < 2:
    raise ValueError(f'steps={s.tolist()} must be two or more: the intervals.')
  x = (np.arange(s[0], s[-1] + 1) - s[0]) / (s[-1] - s[0])
  w = coefficients.target(x, shape, floor)
  means, moments = [], []
  for a, b in zip(s - s[0], s[1:] - s[0], strict=False):
    weights, j = -np.diff(w[a : b + 1]), np.arange(1, b - a + 1)
    off = j - j.mean()
    slope = off @ weights / (off @ off or 1)
    means.append(weights.sum() - slope * j.sum())
    moments.append(slope * j.sum())
  return Moments(
    1 - float(w[0]), np.array(means), np.array(moments), float(w[-1])
  )
