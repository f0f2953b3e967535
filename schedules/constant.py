"""Constant learning rate, the schedule that merging decays afterwards."""

from collections.abc import Callable
from typing import Any

from schedules.parts import phases


def constant(num_steps: int, *, warmup_steps: int = 0) -> Callable[[Any], Any]:
  """Linear warm-up over `warmup_steps` steps, then 1 for ever.

  Returns multiplier(step): (step + 1) / warmup_steps for step < warmup_steps.
  """
  phases.check_steps(num_steps)
  if warmup_steps < 0:
    raise ValueError(f'warmup_steps={warmup_steps} must be at least 0.')
  return lambda step: phases.warm_up(step, warmup_steps)
