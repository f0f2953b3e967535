"""AdEMAMix: AdamW with a second, much slower momentum."""

import jax.numpy as jnp
import optax

from optimizers.parts import choices
from optimizers.parts.decay import descend


def ademamix(
  learning_rate,
  axes=None,
  peak=None,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  b3: float = 0.9999,
  alpha: float = 8.0,
  warmup_steps: int = 0,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """AdEMAMix (2409.03137, algorithm 1).

    m1, nu as Adam's mu, nu with bias correction;  m2 <- b3 m2 + (1 - b3) g
    u = (m1 + alpha m2) / (sqrt(nu) + eps)

  In the first warmup_steps, alpha grows linearly from 0 and the half-life of
  b3 from that of b1. State: count, count_m2, m1, m2, nu.
  Differs from the paper: warmup_steps = 0; it advises the length of the run.
  """
  choices.at_least(0, warmup_steps=warmup_steps)
  slow, weight = b3, alpha
  if warmup_steps:
    slow = _half_life_schedule(b1, b3, warmup_steps)
    weight = lambda count: alpha * _part(count, warmup_steps)
  return descend(
    optax.contrib.scale_by_ademamix(b1, b2, slow, weight, eps),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )


def _half_life_schedule(start, end, steps):
  """Interpolates the half-life of a decay linearly (equation 4)."""

  def schedule(count):
    part = _part(count, steps)
    half = lambda b: jnp.log(0.5) / jnp.log(b)
    life = (1 - part) * half(start) + part * half(end)
    return 0.5 ** (1 / life)

  return schedule


def _part(count, steps):
  """How much of the warm-up is over; the first update has 1 / steps."""
  return jnp.minimum((count + 1) / steps, 1.0)
