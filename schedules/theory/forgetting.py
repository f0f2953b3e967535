"""What weight decay does to past updates: a run as an average of its updates.

With x_{s+1} = x_s - lr_s (u_s + wd_s x_s), the parameters at the end are

  x_T = P x_0 - sum_s w_s u_s,   w_s = lr_s prod_{r > s} (1 - lr_r wd_r),
  P = prod_s (1 - lr_s wd_s),   and P + sum_s wd_s w_s = 1

(2405.13698, 2505.13738): with wd constant, x is an exponential average of
-u / wd. Exact for 'decoupled' decay and every method u; not for masked decay.
lr and wd are arrays: any schedule of both. The wd of other modes:
'independent' weight_decay / peak, 'corrected' weight_decay lr / peak.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Weights(NamedTuple):
  """x_T = initial x_0 - sum of updates * u."""

  initial: float
  updates: np.ndarray  # (T,)


def weights(lr: ArrayLike, weight_decay: ArrayLike) -> Weights:
  """Returns the weight of x_0 and of each update in the last parameters.

  Args:
    lr: the learning rates used, (T,).
    weight_decay: a number, or one per step, (T,).

  Raises:
    ValueError: other shapes; values that are negative or not finite.
  """
  lr, wd = _check(lr, weight_decay)
  keep = 1 - lr * wd
  later = np.append(np.cumprod(keep[:0:-1])[::-1], 1.0)
  return Weights(float(np.prod(keep)), lr * later)


def remaining(lr: ArrayLike, weight_decay: ArrayLike) -> np.ndarray:
  """Returns F_s = prod_{r >= s} (1 - lr_r wd_r), (T + 1,): F_T = 1.

  Of the parameters at step s the share F_s is left at the end: what forgetting
  owes to decay alone (2410.03249).
  """
  lr, wd = _check(lr, weight_decay)
  return np.append(np.cumprod((1 - lr * wd)[::-1])[::-1], 1.0)


class Parts(NamedTuple):
  """Of equal parts of a run, first to last."""

  remaining: np.ndarray  # F in the middle of each part
  shares: np.ndarray  # F in the middle times the sum of lr; sum 1


def parts(lr: ArrayLike, weight_decay: ArrayLike, *, num: int = 10) -> Parts:
  """Returns what is left of each of `num` parts of the data at the end.

  Raises:
    ValueError: as `weights`; fewer steps than parts.
  """
  left = remaining(lr, weight_decay)
  if not 1 <= num < left.size:
    raise ValueError(f'num={num} must be from 1 to the {left.size - 1} steps.')
  edges = np.arange(num + 1) * (left.size - 1) // num
  middle = left[(edges[:-1] + edges[1:]) // 2]
  sums = np.add.reduceat(np.asarray(lr, np.float64), edges[:-1])
  shares = middle * sums
  return Parts(middle, shares / shares.sum())


class Timescale(NamedTuple):
  """How far back the average reaches."""

  steps: float  # 1 / (lr wd)
  fraction: float  # of the run's data


def timescale(lr: float, weight_decay: float, *, num_steps: int) -> Timescale:
  """Returns the time constant of the average at a learning rate.

  As a fraction of the data it is B / (lr wd D), for a batch of B out of D
  tokens in all: what to keep when runs grow (2505.13738). Above 1 decay hardly
  acts.

  Raises:
    ValueError: a value that is not positive.
  """
  for name, value in (
    ('lr', lr), ('weight_decay', weight_decay), ('num_steps', num_steps),
  ):  # fmt: skip
    if not value > 0:
      raise ValueError(f'{name}={value} must be positive.')
  steps = 1 / (lr * weight_decay)
  return Timescale(steps, steps / num_steps)


class Equilibrium(NamedTuple):
  """Where norms settle if gradients are noise (2305.17212)."""

  rms: float  # of the parameters
  rotation: float  # norm of an update over norm of the parameters, per step


def equilibrium(
  lr: float, weight_decay: float, *, b1: float = 0.9
) -> Equilibrium:
  """Returns the equilibrium of AdamW at a constant learning rate."""
  rotation = (2 * lr * weight_decay * (1 - b1) / (1 + b1)) ** 0.5
  return Equilibrium((lr / (2 * weight_decay)) ** 0.5, rotation)


def _check(lr, weight_decay):
  lr = np.atleast_1d(np.asarray(lr, np.float64))
  wd = np.asarray(weight_decay, np.float64)
  if lr.ndim != 1 or not lr.size or wd.shape not in ((), lr.shape):
    raise ValueError(
      f'lr has the shape {lr.shape} and weight_decay {wd.shape}; legal: one '
      'list of equal length each, or a single weight_decay.'
    )
  for name, x in (('lr', lr), ('weight_decay', wd)):
    wrong = x[~(np.isfinite(x) & (x >= 0))]
    if wrong.size:
      raise ValueError(f'{name} contains {wrong.flat[0]}; legal: numbers >= 0.')
  return lr, wd
