"""Linear decay to zero over the whole run: the worst-case optimal schedule."""

from collections.abc import Callable
from typing import Any

from schedules.parts import phases, shapes


def linear(
  num_steps: int, *, warmup: float = 0.02, final: float = 0.0
) -> Callable[[Any], Any]:
  """Linear warm-up, then linear decay (Defazio et al. 2023, arXiv 2310.07831).

  With W = round(warmup * num_steps), multiplier(step) is (step + 1) / W below
  W, then final + (1 - final) * s(x), s = 1 - x and
  x = (step - W) / (num_steps - W); it stays at `final` from num_steps on.

  Args:
    num_steps: updates of the run.
    warmup: fraction of the run.
    final: floor as a fraction of the peak.

  Raises:
    ValueError: a fraction outside [0, 1].
  """
  phases.check_steps(num_steps)
  phases.check_fractions(warmup=warmup, final=final)
  curve = shapes.shape('linear')
  num_warmup = phases.to_steps(warmup, num_steps)
  left = num_steps - num_warmup
  return phases.decay(num_steps, num_warmup, left, curve, final)
