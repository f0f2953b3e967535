"""Coefficients of checkpoints <-> multipliers of the learning rate.

With checkpoints theta_0 (oldest) .. theta_k, displacements D_i = theta_{i-1} -
theta_i and coefficients c of sum 1 (WSM, arXiv 2507.17634, theorem 3.1),

  sum_j c_j theta_j = theta_0 - sum_i w_i D_i,    w_i = sum_{j >= i} c_j:

the average scales everything that happened in block i by w_i. The identity is
algebra and holds for every optimizer; that a real decay would have taken the
same steps, only shorter, is the assumption of the method.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from merging.engine import shapes


def check_steps(steps: Sequence[int]) -> np.ndarray:
  """Returns the steps as int64; refuses any that do not strictly increase."""
  array = np.asarray(steps)
  if array.ndim != 1 or not array.size:
    raise ValueError(f'steps={steps} must be a list of at least one step.')
  if not np.issubdtype(array.dtype, np.integer):
    raise ValueError(f'steps={list(steps)} must be whole numbers.')
  if array[0] < 0 or (np.diff(array.astype(np.int64)) <= 0).any():
    raise ValueError(
      f'steps={array.tolist()} must increase, oldest first, without repeats.'
    )
  return array.astype(np.int64)


def checked(c: Sequence[float], steps: Sequence[int], name: str) -> np.ndarray:
  """Returns what the method `name` gave for `steps`, float64.

  Raises:
    ValueError: these are not as many coefficients, of the sum 1.
  """
  c = np.asarray(c)
  if c.shape != (len(steps),) or not abs(math.fsum(c) - 1) <= 1e-9:
    raise ValueError(
      f'merging/{name}.py must return {len(steps)} coefficients of sum 1, not '
      f'{c.tolist()}.'
    )
  return c.astype(np.float64)


def forward(coefficients: Sequence[float]) -> np.ndarray:
  """Returns w_1..w_k, the multiplier of each block, for c_0..c_k."""
  c = np.asarray(coefficients, np.float64)
  return np.cumsum(c[::-1])[::-1][1:]


def inverse(
  multipliers: Sequence[float], *, allow_negative: bool = False
) -> np.ndarray:
  """Returns c_0..c_k for the multipliers w_1..w_k of the k blocks.

  Raises:
    ValueError: a negative coefficient (the multipliers rise, exceed 1 or are
      negative) unless `allow_negative`; a value that is not finite.
  """
  w = np.asarray(multipliers, np.float64)
  if w.ndim != 1 or not np.isfinite(w).all():
    raise ValueError(f'multipliers={w.tolist()} must be finite numbers.')
  edges = np.concatenate([[1.0], w, [0.0]])
  c = edges[:-1] - edges[1:]
  if not allow_negative and (c < 0).any():
    j = int(np.argmax(c < 0))
    raise ValueError(
      f'multipliers={w.tolist()} give checkpoint {j + 1} of {c.size} the '
      f'coefficient {c[j]:.6g}; a merge emulates what falls from at most 1 to '
      'at least 0, and more with signed=True, where a method has it.'
    )
  return c


def correct(target: Sequence[float], actual: Sequence[float]) -> np.ndarray:
  """Returns w_i = target_i / actual_i for a learning rate that varied.

  Displacement i already contains the learning rate that was used, so the merge
  has the effective learning rate w_i * actual_i (all arrays: one per block).
  Infeasible targets are refused by `inverse`.

  Raises:
    ValueError: different lengths, a learning rate that is not positive.
  """
  goal = np.asarray(target, np.float64)
  used = np.asarray(actual, np.float64)
  if goal.shape != used.shape:
    raise ValueError(
      f'{goal.size} target learning rates for {used.size} that were used.'
    )
  if not (legal := np.isfinite(used) & (used > 0)).all():
    raise ValueError(f'learning rate {used[~legal][0]:g} must be positive.')
  return goal / used


def effective_count(coefficients: Sequence[float]) -> float:
  """Returns 1 / sum c^2: n for a uniform mean of n checkpoints."""
  c = np.asarray(coefficients, np.float64)
  return float(1 / np.sum(c * c))


def target(x: np.ndarray, shape: str, floor: float) -> np.ndarray:
  """Returns floor + (1 - floor) * s(x), the multiplier of the decay."""
  return floor + (1 - floor) * shapes.shape(shape).value(np.clip(x, 0, 1))


def check_floor(floor: float) -> None:
  """Refuses a floor outside [0, 1]."""
  if not 0 <= floor <= 1:
    raise ValueError(f'floor={floor} must be a fraction of the peak in [0, 1].')


class IntervalMeans(NamedTuple):
  """Coefficients of theta_{s_0}, of the means M_1..M_k and of theta_{s_k}."""

  first: float
  means: np.ndarray
  last: float


def interval_means(
  steps: Sequence[int], shape: str = 'linear', floor: float = 0.0
) -> IntervalMeans:
  """Emulates a decay over [s_0, s_k] from the means between checkpoints.

  M_i is the mean of the iterates theta_s, s_{i-1} < s <= s_i. With W the
  target at the knots s_i, and linear between them, exactly

    theta_hat = (1 - W_0) theta_{s_0} + sum_i (W_{i-1} - W_i) M_i
                + W_k theta_{s_k},

  where the update that turns s into s + 1 has the weight W(s).

  Raises:
    ValueError: steps that do not increase, an unknown shape, a bad floor.
  """
  s = check_steps(steps)
  check_floor(floor)
  if s.size < 2:
    raise ValueError(f'steps={s.tolist()} must be two or more: the intervals.')
  return from_knots(target((s - s[0]) / (s[-1] - s[0]), shape, floor))


def from_knots(
  multipliers: Sequence[float], *, allow_negative: bool = False
) -> IntervalMeans:
  """Returns the coefficients for any multipliers W_0..W_k at the knots.

  Raises:
    ValueError: as `inverse`.
  """
  c = inverse(multipliers, allow_negative=allow_negative)
  return IntervalMeans(float(c[0]), c[1:-1], float(c[-1]))
