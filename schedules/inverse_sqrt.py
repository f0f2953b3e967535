"""Inverse square root: needs no horizon, but a cooldown at the end."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from schedules.parts import phases, shapes


def inverse_sqrt(
  num_steps: int,
  *,
  warmup: float = 0.02,
  decay: float = 0.0,
  shape: str = 'linear',
  timescale_steps: int = 0,
) -> Callable[[Any], Any]:
  """Linear warm-up, then sqrt(tau / (step - W + tau)) (Vaswani et al. 2017).

  W = round(warmup * num_steps) and tau = timescale_steps, or W (at least 1)
  when that is 0: the paper's sqrt(W / step). A cooldown multiplies the last
  round(decay * num_steps) steps by s(x), which is 0 from num_steps on.

  Args:
    num_steps: updates of the run.
    warmup, decay: fractions of the run; 0 = no cooldown.
    shape: of the cooldown, a name of schedules/parts/shapes.py.
    timescale_steps: tau; 0 = the length of the warm-up.

  Raises:
    ValueError: a fraction outside [0, 1], warmup + decay > 1, unknown shape,
      a negative timescale.
  """
  phases.check_steps(num_steps)
  phases.check_durations(warmup=warmup, decay=decay)
  if timescale_steps < 0:
    raise ValueError(f'timescale_steps={timescale_steps} must be at least 0.')
  curve = shapes.shape(shape)
  num_warmup, num_decay = phases.split(num_steps, warmup, decay)
  tau = timescale_steps or jnp.maximum(num_warmup, 1)
  start = num_steps - num_decay

  def multiplier(step):
    root = jnp.sqrt(phases.hyperbola(step, num_warmup, tau))
    cooled = root * curve(phases.elapsed(step, start, num_decay))
    return jnp.minimum(phases.warm_up(step, num_warmup), cooled)

  return multiplier
