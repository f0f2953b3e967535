"""Horizon-free decay, to be used with an average of the weights."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from schedules.parts import phases


def anytime(
  num_steps: int,
  *,
  warmup_steps: int = 0,
  timescale_steps: int = 100,
  exponent: float = 0.5,
) -> Callable[[Any], Any]:
  """Anytime schedule (arXiv 2602.03702): (tau / (tau + t))^exponent.

  t counts from the end of the warm-up and tau = timescale_steps. Nothing
  depends on num_steps: the run may stop or go on at any step.

  Args:
    num_steps: not used, but checked.
    warmup_steps: linear warm-up.
    timescale_steps: tau.
    exponent: 0.5 for the square root.

  Raises:
    ValueError: negative steps, an exponent outside [0, 1].
  """
  phases.check_steps(num_steps)
  phases.check_fractions(exponent=exponent)
  if warmup_steps < 0 or timescale_steps < 1:
    raise ValueError(
      f'warmup_steps={warmup_steps} must be at least 0 and '
      f'timescale_steps={timescale_steps} at least 1.'
    )

  def multiplier(step):
    law = phases.hyperbola(step, warmup_steps, timescale_steps)
    return jnp.minimum(
      phases.warm_up(step, warmup_steps), phases.power(law, exponent)
    )

  return multiplier
