"""WSD-S: several budgets in one run, without rolling back."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from schedules.parts import phases, shapes


def wsd_s(
  num_steps: int,
  *,
  warmup: float = 0.02,
  decay: float = 0.1,
  shape: str = 'linear',
  final: float = 0.0,
  cycle_end_steps: tuple = (),
) -> Callable[[Any], Any]:
  """WSD, simplified (Wen et al. 2024, arXiv 2410.05192).

  Each cycle holds the peak and decays over its last round(decay * length)
  steps as `wsd` does; then the multiplier jumps back to 1 and training goes on
  from the decayed weights. Ends are absolute, so a longer run repeats the
  cycles of a shorter one, if its warm-up has as many steps.

  Args:
    num_steps: updates of the run, the end of the last cycle.
    warmup: fraction of the run.
    decay: fraction of each cycle.
    shape: a name of schedules/parts/shapes.py.
    final: floor of every decay as a fraction of the peak.
    cycle_end_steps: of the cycles before the last; () is `wsd`.

  Raises:
    ValueError: a fraction outside [0, 1], unknown shape, ends that do not
      increase between 0 and num_steps.
  """
  phases.check_steps(num_steps)
  phases.check_fractions(warmup=warmup, decay=decay, final=final)
  starts = np.array([0, *cycle_end_steps], np.int32)
  lengths = np.diff([*starts, num_steps])
  if (lengths <= 0).any():
    raise ValueError(
      f'cycle_end_steps={tuple(cycle_end_steps)} must increase between 0 and '
      f'num_steps={num_steps}.'
    )
  curve = shapes.shape(shape)
  num_warmup = phases.to_steps(warmup, num_steps)
  counts = [phases.to_steps(decay, int(n)) for n in lengths]
  # A warm-up takes its steps from the first decay.
  counts[0] = jnp.clip(lengths[0] - num_warmup, 0, counts[0])

  def multiplier(step):
    step = jnp.asarray(step, jnp.int32)
    cycle = jnp.searchsorted(starts, step, side='right') - 1
    num_decay = jnp.stack([jnp.asarray(n, jnp.int32) for n in counts])[cycle]
    end = jnp.asarray(starts + lengths, jnp.int32)[cycle]
    x = phases.elapsed(step, end - num_decay, num_decay)
    return jnp.minimum(
      phases.warm_up(step, num_warmup), phases.floored(curve(x), final)
    )

  return multiplier
