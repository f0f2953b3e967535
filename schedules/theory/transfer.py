"""Keeping a tuned learning rate when the horizon or the shape changes.

The best peak gamma* of a schedule falls with its length (schedules/theory/
bound.py). A run that was tuned for num_steps and goes on to `new_steps` at the
same peak needs a schedule whose gamma* is that of the old one (Schaipp et al.
2025, arXiv 2501.18965, section 5). Warm-up is left out.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from schedules.parts import shapes
from schedules.theory import bound


def ratio(old: ArrayLike, new: ArrayLike, *, grad_norms: float = 1.0) -> float:
  """Returns what to multiply the peak with when the schedule changes.

  Args:
    old, new: multipliers of the two schedules, one per step.
    grad_norms: G of both.
  """
  peaks = [
    bound.best(m, grad_norms=grad_norms).learning_rate for m in (new, old)
  ]
  return peaks[0] / peaks[1]


def longer_decay(
  num_steps: int, new_steps: int, *, decay: float, shape: str = 'linear'
) -> float | None:
  """Returns the fraction of cooldown of the longer run for the same peak.

  Args:
    num_steps: of the WSD run that was tuned.
    new_steps: its new length.
    decay: fraction of its cooldown.
    shape: of both cooldowns.

  Returns:
    A fraction of `new_steps`, at least `decay`; None when even a decay over
    the whole run is not enough.

  Raises:
    ValueError: a horizon that does not grow, a fraction outside (0, 1).
  """
  _check(num_steps, new_steps, decay)
  goal = _peak(_wsd(num_steps, decay, shape))

  def excess(fraction):
    return _peak(_wsd(new_steps, fraction, shape)) - goal

  if new_steps == num_steps:
    return decay
  return _root(excess, decay, 1.0)


def lower_rate(
  num_steps: int,
  new_steps: int,
  *,
  decay: float,
  switch: int | None = None,
  shape: str = 'linear',
) -> float:
  """Returns rho, the peak of the extension relative to that before it.

  The longer run keeps the multiplier 1 up to `switch`, then rho, and cools
  down from rho to 0 over the same fraction of the new length.

  Args:
    num_steps, new_steps, decay, shape: as for `longer_decay`.
    switch: the step of the extension; None = where the old cooldown began.

  Raises:
    ValueError: as `longer_decay`; a switch after the new cooldown began.
  """
  _check(num_steps, new_steps, decay)
  begun = round((1 - decay) * num_steps)
  switch = begun if switch is None else switch
  if not 0 < switch <= (1 - decay) * new_steps:
    raise ValueError(
      f'switch={switch} must lie between 0 and the new cooldown, which begins '
      f'at {round((1 - decay) * new_steps)}.'
    )
  goal = _peak(_wsd(num_steps, decay, shape))
  longer = _wsd(new_steps, decay, shape)
  before = np.arange(new_steps) < switch

  def excess(rho):
    return _peak(np.where(before, 1.0, rho * longer)) - goal

  if new_steps == num_steps:
    return 1.0
  # Far below the first root the bound treats the extension as wasted, and the
  # best peak falls again: search from above.
  for high in 0.9 ** np.arange(60):
    rho = _root(excess, 0.9 * high, high)
    if rho is not None:
      return rho
  raise ValueError(
    f'no lower rate keeps the peak from {num_steps} to {new_steps} steps.'
  )


def _check(num_steps, new_steps, decay):
  if not 2 <= num_steps <= new_steps:
    raise ValueError(
      f'num_steps={num_steps} must be at least 2 and new_steps={new_steps} not '
      'less.'
    )
  if not 0 < decay < 1:
    raise ValueError(f'decay={decay} must be a fraction between 0 and 1.')


def _wsd(num_steps: int, decay: float, shape: str) -> np.ndarray:
  """Returns multipliers; the start of the decay need not be a whole step."""
  length = decay * num_steps
  x = (np.arange(num_steps) - (num_steps - length)) / length
  return shapes.shape(shape)(np.clip(x, 0, 1))


def _peak(multipliers: np.ndarray) -> float:
  return bound.best(multipliers).learning_rate


def _root(f: Callable[[float], float], low: float, high: float) -> float | None:
  if f(low) * f(high) > 0:
    return None
  return float(optimize.brentq(f, low, high, xtol=1e-6))
