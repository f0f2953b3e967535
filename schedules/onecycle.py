"""One cycle: up, down, and a tail far below the start."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from schedules.parts import phases


def onecycle(
  num_steps: int,
  *,
  rise: float = 0.3,
  fall: float = 0.55,
  start: float = 0.04,
  final: float = 4e-6,
) -> Callable[[Any], Any]:
  """The 1-cycle policy (Smith and Topin 2017, arXiv 1708.07120).

  Linear from `start` to 1 over round(rise * num_steps) steps, back to `start`
  over round(fall * num_steps), then to `final` over what is left.

  Args:
    num_steps: updates of the run.
    rise, fall: fractions of the run.
    start, final: fractions of the peak; the defaults are those of optax.

  Raises:
    ValueError: a fraction outside [0, 1], rise + fall > 1.
  """
  phases.check_steps(num_steps)
  phases.check_durations(rise=rise, fall=fall)
  phases.check_fractions(start=start, final=final)
  num_rise, num_fall = phases.split(num_steps, rise, fall)
  turn = num_rise + num_fall

  def multiplier(step):
    step = jnp.asarray(step, jnp.int32)
    up = phases.elapsed(step, 0, num_rise)
    down = phases.elapsed(step, num_rise, num_fall)
    tail = phases.elapsed(step, turn, num_steps - turn)
    return jnp.where(
      step < num_rise,
      phases.blend(start, 1.0, up),
      jnp.where(
        step < turn,
        phases.blend(start, 1.0, 1.0 - down),
        phases.blend(final, start, 1.0 - tail),
      ),
    )

  return multiplier
