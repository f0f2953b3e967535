"""Lion: the sign of an interpolated momentum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import saturation
from optimizers.parts.decay import descend, rate


class LionState(NamedTuple):
  mu: Any


def lion(
  learning_rate,
  axes=None,
  peak=None,
  *,
  b1: float = 0.9,
  b2: float = 0.99,
  weight_decay: float = 1.0,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Lion (2302.06675, algorithm 2).

    u = sign(b1 mu + (1 - b1) g);  mu <- b2 mu + (1 - b2) g

  Learning rates are 3 to 10 times smaller than AdamW's and weight decay as
  much larger. State: mu.
  Differs from the paper: the algebra of `scale_by_lion`; other modes of decay.
  Optax's weight_decay is 0.001.
  """
  return descend(
    scale_by_lion(b1, b2),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )


def scale_by_lion(b1, b2) -> optax.GradientTransformation:
  """The sign alone, as sign(r mu_new + (1 - r) g) with r = b1 / b2 > 0.

  The same by algebra, but only so does XLA update mu in place, without a copy;
  where the paper's mean rounds to 0 its sign can differ.
  """
  if isinstance(b2, int | float) and b2 <= 0:
    raise ValueError(f'b2={b2} must exceed 0: see the algebra of Lion.')

  def init(params):
    return LionState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    mu = jax.tree.map(lambda g, m: (1 - b2) * g + b2 * m, updates, state.mu)
    r = b1 / b2
    u = jax.tree.map(lambda g, m: jnp.sign((1 - r) * g + r * m), updates, mu)
    return u, LionState(mu)

  return optax.GradientTransformation(init, update)


def diagnostics(
  params, opt_state, axes, learning_rate, peak, *, weight_decay, decay
):
  """What a run may log: see parts/saturation.py."""
  wd = rate(decay, weight_decay, learning_rate, peak)
  return saturation.measure(
    'l1', params, opt_state, axes, weight_decay=wd, decay=decay
  )
