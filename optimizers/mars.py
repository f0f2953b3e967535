"""MARS: AdamW on gradients corrected by their last change."""

import optax

from optimizers.parts import mars as part
from optimizers.parts.decay import descend


def mars(
  learning_rate,
  axes=None,
  peak=None,
  *,
  gamma: float = 0.025,
  clip: bool = True,
  b1: float = 0.95,
  b2: float = 0.99,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """MARS-AdamW, approximate (2411.10438, algorithm 2).

    c = g + gamma b1 / (1 - b1) (g - g_previous), norm at most 1 if clip
    u = Adam(b1, b2, eps) of c

  State: previous gradient; count, mu, nu.
  Differs from the paper: vectors and embeddings are treated like matrices.
  """
  return descend(
    optax.chain(
      part.correct_gradient(axes, gamma, b1, clip),
      optax.scale_by_adam(b1, b2, eps),
    ),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
