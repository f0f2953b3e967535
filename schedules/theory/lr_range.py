"""The learning-rate range test: one run in which the rate grows.

Smith 2018 (arXiv 1803.09820): the largest usable rate is where the smoothed
loss turns up; a peak of a tenth to a third of it is a good first guess.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

SPACINGS = ('exponential', 'linear')
_BLOW_UP = 4.0  # times the best smoothed loss: diverged
_MEMORY = 0.9  # of the running mean that decides when to stop
_RISE = 0.05  # of the whole fall: the loss has turned up
_WIDTH = 0.02  # standard deviation of the smoothing / number of values


def values(
  low: float, high: float, num_steps: int, *, spacing: str = 'exponential'
) -> np.ndarray:
  """Returns the value of each step, float64 (num_steps,), from low to high.

  Raises:
    ValueError: fewer than 10 steps, an empty range, an unknown spacing.
  """
  if spacing not in SPACINGS:
    raise ValueError(f"spacing='{spacing}'; legal: {', '.join(SPACINGS)}.")
  if num_steps < 10:
    raise ValueError(f'num_steps={num_steps} must be at least 10.')
  if not (low < high < np.inf and (low > 0 or spacing == 'linear')):
    raise ValueError(
      f'low={low} and high={high} are no range; legal: low < high, and above 0 '
      'for exponential spacing.'
    )
  space = np.geomspace if spacing == 'exponential' else np.linspace
  return space(low, high, num_steps)


class Watch:
  """Says when to stop: not finite, or a running mean 4 times its best."""

  def __init__(self) -> None:
    self._mean, self._best, self._n = 0.0, np.inf, 0

  def diverged(self, loss: float) -> bool:
    """Takes the next loss (at least 0)."""
    self._n += 1
    self._mean = _MEMORY * self._mean + (1 - _MEMORY) * loss
    mean = self._mean / (1 - _MEMORY**self._n)
    self._best = min(self._best, mean)
    return not np.isfinite(loss) or mean > _BLOW_UP * self._best


class Reading(NamedTuple):
  """What a range test shows.

  smooth: the loss without its noise, one per value.
  turn: the last value before it is for good more than 5 % of its whole fall
    above its least. steepest: the value where it falls fastest.
  at_end: it had not turned up, nor diverged, at the last value. at_start: it
    never fell.
  clear: it changes by more than the smoothed noise of the batches could.
  """

  smooth: np.ndarray
  turn: float
  steepest: float
  at_end: bool
  at_start: bool
  clear: bool


def read(swept: ArrayLike, losses: Sequence[float]) -> Reading:
  """Reads off where the loss turns up; `losses[i]` follows from `swept[i]`.

  Raises:
    ValueError: fewer than five finite losses.
  """
  y = np.asarray(losses, np.float64)
  x = np.asarray(swept, np.float64)[: y.size]
  good = np.isfinite(y)
  if good.sum() < 5:
    raise ValueError(
      f'{good.sum()} finite losses are too few; begin at a lower value.'
    )
  # The last losses of a diverged run would be smeared over those before.
  y = np.minimum(y[good], _BLOW_UP * max(y[good][0], y[good].min()))
  x = x[good]
  sigma = max(1.0, _WIDTH * np.size(swept))
  smooth = ndimage.gaussian_filter1d(y, sigma, mode='nearest')
  least = int(smooth.argmin())
  level = smooth[least] + _RISE * (smooth[0] - smooth[least])
  turn = int(np.flatnonzero(smooth <= level)[-1])
  slopes = np.diff(smooth[: max(turn, 1) + 1])
  steepest = x[int(slopes.argmin())]
  # Standard deviation of the noise (1.05 times the median of its differences),
  # and what the smoothing leaves of it.
  noise = 1.05 * np.median(abs(np.diff(y))) / np.sqrt(3.54 * sigma)
  return Reading(
    smooth,
    float(x[turn]),
    float(steepest),
    at_end=bool(turn >= y.size - 1 and good.all()),
    at_start=turn < int(2 * sigma),
    clear=bool(np.ptp(smooth[: turn + 1]) > 8 * noise),
  )
