"""Signum: the sign of a momentum."""

import optax

from optimizers.parts.decay import descend


def signum(
  learning_rate,
  axes=None,
  peak=None,
  *,
  b1: float = 0.9,
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Signum (1802.04434, algorithm 2): u = sign(ema of g by b1).

  State: count, ema. Differs from the paper: it has a decay.
  """
  return descend(
    optax.chain(optax.ema(b1, debias=False), optax.scale_by_sign()),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
