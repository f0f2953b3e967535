"""Power scheduler: agnostic to batch size and number of tokens."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from schedules.parts import phases, shapes


def power(
  num_steps: int,
  *,
  warmup: float = 0.02,
  decay: float = 0.1,
  shape: str = 'linear',
  final: float = 0.0,
  knee_steps: int = 1000,
  exponent: float = 0.51,
) -> Callable[[Any], Any]:
  """Power scheduler (Shen et al. 2024, arXiv 2408.13359).

  The paper's learning rate min(peak, B a n^-exponent) after n tokens in
  batches of B sequences, as a multiplier: min(1, (knee_steps / step)^exponent)
  with knee_steps = (B a / peak)^(1 / exponent) / (tokens per step), a = 4.6.
  A cooldown at the end, as in `wsd`, multiplies it; it never exceeds the linear
  warm-up.

  Args:
    num_steps: updates of the run.
    warmup, decay: fractions of the run.
    shape, final: of the cooldown, see `wsd`.
    knee_steps: where the power law leaves the peak.
    exponent: of the power law.

  Raises:
    ValueError: a fraction outside [0, 1], warmup + decay > 1, unknown shape,
      knee_steps < 1.
  """
  phases.check_steps(num_steps)
  phases.check_durations(warmup=warmup, decay=decay)
  phases.check_fractions(final=final, exponent=exponent)
  if knee_steps < 1:
    raise ValueError(f'knee_steps={knee_steps} must be at least 1.')
  curve = shapes.shape(shape)
  num_warmup, num_decay = phases.split(num_steps, warmup, decay)
  start = num_steps - num_decay

  def multiplier(step):
    step = jnp.asarray(step, jnp.int32)
    law = phases.ratio(jnp.int32(knee_steps), jnp.maximum(step, knee_steps))
    cooled = curve(phases.elapsed(step, start, num_decay))
    decayed = phases.power(law, exponent) * phases.floored(cooled, final)
    return jnp.minimum(phases.warm_up(step, num_warmup), decayed)

  return multiplier
