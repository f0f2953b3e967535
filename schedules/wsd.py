"""WSD: warm-up, stable, decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395)."""

from collections.abc import Callable
from typing import Any

from schedules.parts import phases, shapes


def wsd(
  num_steps: int,
  *,
  warmup: float = 0.02,
  decay: float = 0.2,
  shape: str = 'linear',
  final: float = 0.0,
) -> Callable[[Any], Any]:
  """Linear warm-up, the peak, then a decay that ends with the run.

  multiplier(step) scales the update that turns `step` into `step + 1`. With
  W = round(warmup * num_steps), N = round(decay * num_steps), T0 = num_steps -
  N: (step + 1) / W below W, 1 up to T0, then final + (1 - final) * s(x) with
  x = (step - T0) / N, which stays at `final` from num_steps on.

  Args:
    num_steps: updates of the run.
    warmup, decay: fractions of the run.
    shape: a name of schedules/parts/shapes.py.
    final: floor as a fraction of the peak.

  Raises:
    ValueError: a fraction outside [0, 1], warmup + decay > 1, unknown shape.
  """
  phases.check_steps(num_steps)
  phases.check_durations(warmup=warmup, decay=decay)
  phases.check_fractions(final=final)
  curve = shapes.shape(shape)
  num_warmup, num_decay = phases.split(num_steps, warmup, decay)
  return phases.decay(num_steps, num_warmup, num_decay, curve, final)
