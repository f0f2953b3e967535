"""NAdamW: AdamW with Nesterov momentum."""

import optax

from optimizers.parts.decay import descend


def nadamw(
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
  """NAdam (Dozat 2016) with decoupled decay, the baseline of AlgoPerf.

    mu, nu as in adamw.py
    u = (b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t))
        / (sqrt(nu / (1 - b2^t)) + eps)

  State: count, mu, nu.
  Differs from the paper: b1 is constant, nu is not multiplied by b2; b2 = 0.95
  as in adamw.py.
  """
  return descend(
    optax.scale_by_adam(b1, b2, eps, nesterov=True),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
