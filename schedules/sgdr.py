"""Cosine with warm restarts, also called cyclic cosine."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from schedules.parts import phases, shapes


def sgdr(
  num_steps: int,
  *,
  warmup_steps: int = 0,
  cycles: int = 4,
  growth: int = 1,
  final: float = 0.0,
) -> Callable[[Any], Any]:
  """SGDR (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5).

  After the warm-up the run is divided into `cycles` half cosines from 1 to
  `final`, each `growth` times as long as the one before, with ends rounded to
  steps. A checkpoint at the end of a cycle is the result of that cycle.

  Args:
    num_steps: updates of the run.
    warmup_steps: linear warm-up before the first cycle.
    cycles: their number; those shorter than a step are left out.
    growth: T_mult of the paper, 1 or 2.
    final: floor as a fraction of the peak.

  Raises:
    ValueError: `final` outside [0, 1], a warm-up longer than the run, fewer
      than one cycle or a growth below 1.
  """
  phases.check_steps(num_steps)
  phases.check_fractions(final=final)
  if not 0 <= warmup_steps < num_steps:
    raise ValueError(
      f'warmup_steps={warmup_steps} must be at least 0 and less than '
      f'num_steps={num_steps}.'
    )
  if cycles < 1 or growth < 1:
    raise ValueError(f'cycles={cycles} and growth={growth} must be at least 1.')
  with np.errstate(over='ignore'):
    edges = np.cumsum([0.0, *(float(growth) ** np.arange(cycles))])
  if not np.isfinite(edges[-1]):
    raise ValueError(f'growth={growth} to the power cycles={cycles} overflows.')
  edges = np.rint(edges / edges[-1] * (num_steps - warmup_steps))
  edges = np.unique(edges.astype(np.int32)) + warmup_steps
  curve = shapes.shape('cosine')

  def multiplier(step):
    step = jnp.asarray(step, jnp.int32)
    cycle = jnp.searchsorted(edges[:-1], step, side='right') - 1
    cycle = jnp.maximum(cycle, 0)
    start = jnp.asarray(edges[:-1])[cycle]
    length = jnp.asarray(np.diff(edges))[cycle]
    decayed = curve(phases.elapsed(step, start, length))
    return jnp.minimum(
      phases.warm_up(step, warmup_steps), phases.floored(decayed, final)
    )

  return multiplier
