"""Power-law decay to zero, optimal under a functional scaling law."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from schedules.parts import phases


def fsl(
  num_steps: int,
  *,
  warmup: float = 0.02,
  hold: float = 0.0,
  capacity: float = 1.5,
) -> Callable[[Any], Any]:
  """FSL-optimal schedule (arXiv 2602.06797): (1 - x)^(2 capacity - 1).

  x runs from 0 at the end of warm-up and hold to 1 at num_steps. For easy
  tasks the paper decays at once (hold = 0), for hard ones it holds the peak
  first, which is a WSD.

  Args:
    num_steps: updates of the run.
    warmup, hold: fractions of the run.
    capacity: the capacity exponent, above 1.

  Raises:
    ValueError: a fraction outside [0, 1], warmup + hold > 1, capacity <= 1.
  """
  phases.check_steps(num_steps)
  phases.check_durations(warmup=warmup, hold=hold)
  value = phases.concrete(capacity)
  if value is not None and not 1 < value < 100:
    raise ValueError(f'capacity={value} must be above 1 (and below 100).')
  num_warmup, num_hold = phases.split(num_steps, warmup, hold)
  start = num_warmup + num_hold
  exponent = 2.0 * jnp.float32(capacity) - 1.0

  def multiplier(step):
    x = phases.elapsed(step, start, num_steps - start)
    return jnp.minimum(
      phases.warm_up(step, num_warmup), phases.power(1.0 - x, exponent)
    )

  return multiplier
