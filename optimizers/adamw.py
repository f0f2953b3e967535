"""AdamW: Adam with weight decay outside of the moments."""

import optax

from optimizers.parts.decay import descend


def adamw(
  learning_rate,
  axes=None,
  peak=None,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Adam (1412.6980, algorithm 1) with decoupled decay (1711.05101, alg. 2).

    mu <- b1 mu + (1 - b1) g;  nu <- b2 nu + (1 - b2) g^2
    u = mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps)

  State: count, mu, nu. Decay: see parts/decay.py.
  Differs from the paper: b2 = 0.95 and decay times the learning rate, as usual
  for language models.
  """
  return descend(
    optax.scale_by_adam(b1, b2, eps),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
