"""What a schedule guarantees: the last-iterate bound of convex SGD.

For x_{t+1} = x_t - lr_t g_t on a convex function with E|g_t|^2 <= G_t^2 and
|x_1 - x*| <= D, E f(x_T) - f* <= Omega_T (Schaipp et al. 2025, arXiv
2501.18965, theorem 3). It ranks real language-model schedules well with G = 1;
with measured l2 norms of an adaptive method worse; it exaggerates the harm of
a constant learning rate.

published_losses.csv beside this file has the final validation losses of 49 runs
from the logs that the authors of that paper published: 124M parameters, 50,000
steps, of which 300 are warm-up; `decay` and `final` are fractions.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

_ZERO = 1e-15  # of the largest: a learning rate that counts as none


class Best(NamedTuple):
  """The peak learning rate that minimises the bound, and that minimum."""

  learning_rate: float
  bound: float


def omega(
  lr: ArrayLike, *, grad_norms: ArrayLike = 1.0, distance: float = 1.0
) -> float:
  """Returns the bound after the last update, in O(T) and float64.

  With tail sums S_k = sum_{s >= k} lr_s and Q_k = sum_{s >= k} lr_s^2 G_s^2,

    Omega = (D^2 + Q_1) / (2 S_1)
            + 1/2 sum_{k < T} lr_k / S_{k+1} * Q_k / S_k.

  Trailing zeros are dropped: they change no iterate, but the bound would
  diverge.

  Args:
    lr: the learning rates used, shape (T,).
    grad_norms: G, a number or one per step, shape (T,).
    distance: D.

  Raises:
    ValueError: no positive learning rate, one that is negative or not finite,
      shapes that differ.
  """
  initial, noise = terms(lr, grad_norms=grad_norms)
  return distance**2 * initial + noise


def terms(lr: ArrayLike, *, grad_norms: ArrayLike = 1.0) -> tuple[float, float]:
  """Returns (a, b) with Omega = D^2 a + b, for fits of D."""
  lr, norms = _check(lr, grad_norms)
  squares = _tail_sums((lr * norms) ** 2)
  sums = _tail_sums(lr)
  middle = lr[:-1] / sums[1:] * squares[:-1] / sums[:-1]
  noise = squares[0] / (2 * sums[0]) + 0.5 * np.sum(middle)
  return float(1 / (2 * sums[0])), float(noise)


def best(
  shape: ArrayLike, *, grad_norms: ArrayLike = 1.0, distance: float = 1.0
) -> Best:
  """Returns the best multiple gamma* of a schedule and its bound Omega*.

  Omega(gamma * shape) = A / gamma + B * gamma, least at sqrt(A / B).
  Arguments and errors are those of `omega`.
  """
  initial, noise = terms(shape, grad_norms=grad_norms)
  root = distance * float(np.sqrt(initial * noise))
  return Best(root / noise, 2 * root)


def average_iterate(
  lr: ArrayLike, *, grad_norms: ArrayLike = 1.0, distance: float = 1.0
) -> float:
  """Returns the classical bound of the lr-weighted mean of the iterates.

  It knows no difference between schedules of equal sums: the null of `omega`.
  """
  lr, norms = _check(lr, grad_norms)
  return float((distance**2 + np.sum((lr * norms) ** 2)) / (2 * np.sum(lr)))


def wsd_upper_bound(
  num_steps: int, start: int, *, grad_norm: float = 1.0, distance: float = 1.0
) -> float:
  """Returns the closed form above Omega* of a WSD with a linear cooldown.

  Theorem 9 of the paper, for a cooldown from `start` to `num_steps`. Without
  the term log T that a constant learning rate has, for a fixed fraction.

  Raises:
    ValueError: unless 1 < start < num_steps - 1; at 1 the form of the paper is
      below Omega*, by up to 1.2 %.
  """
  t, t0 = num_steps, start
  if not 1 < t0 < t - 1:
    raise ValueError(f'start={start} must lie between 1 and {num_steps - 1}.')
  n, total = t - t0, t + t0
  inner = (
    2 / 3
    + (t + 2 * t0) / (3 * total)
    + _harmonic(total - 2)
    - _harmonic(n + 1)
    - n * (t0 - 1) / (3 * (n + 2) * total)
    + 1 / n**2
    + _harmonic(n - 1) / (n + 1)
  )
  return distance * grad_norm * float(np.sqrt(4 / total * inner))


def _check(lr, grad_norms):
  lr = np.atleast_1d(np.asarray(lr, np.float64))
  norms = np.asarray(grad_norms, np.float64)
  if lr.ndim != 1 or norms.shape not in ((), lr.shape):
    raise ValueError(
      f'lr has the shape {lr.shape} and grad_norms {norms.shape}; legal: one '
      'list each, of equal length, or a single norm.'
    )
  for name, x in (('lr', lr), ('grad_norms', norms)):
    if not (np.isfinite(x) & (x >= 0)).all():
      bad = x[~(np.isfinite(x) & (x >= 0))].flat[0]
      raise ValueError(f'{name} contains {bad}; legal: numbers >= 0.')
  if not norms.any():
    raise ValueError('grad_norms contains no positive norm.')
  used = np.flatnonzero(lr > _ZERO * lr.max(initial=0))
  if not used.size:
    raise ValueError('lr contains no positive learning rate.')
  end = used[-1] + 1
  return lr[:end], norms[:end] if norms.ndim else np.broadcast_to(norms, end)


def _tail_sums(x):
  return np.cumsum(x[::-1])[::-1]


def _harmonic(n):
  return special.digamma(n + 1) + np.euler_gamma
