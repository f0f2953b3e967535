"""SGDW: momentum with decoupled weight decay."""

import optax

from optimizers.parts.decay import descend


def width_power() -> float:
  """Of the rate over the width (lm/width.py): 2203.03466, table 8."""
  return 0.0


def sgdw(
  learning_rate=0.1,
  axes=None,
  peak=None,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 1e-3,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """SGD with momentum and decoupled decay (1711.05101, algorithm 1).

    v <- momentum v + g;  u = v   [g + momentum v if nesterov]

  State: trace = v. weight_decay is small next to AdamW's because learning
  rates are large.
  Differs from the paper: v holds gradients, not gradients times lr.
  """
  return descend(
    optax.trace(momentum, nesterov),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
