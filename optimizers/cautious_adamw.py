"""C-AdamW: AdamW without steps against the gradient."""

import optax

from optimizers.parts.cautious_update import cautious
from optimizers.parts.decay import descend


def cautious_adamw(
  learning_rate,
  axes=None,
  peak=None,
  *,
  normalization: str = 'mean',
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Cautious AdamW (2411.16085, algorithm 1).

    u = that of adamw.py, 0 where u g <= 0, enlarged by the share that is left

  normalization: see parts/cautious_update.py. State: count, mu, nu.
  Differs from the paper: normalization='mean' is the authors' code, 'sum' is
  algorithm 1; the decay is as in adamw.py; decay='cautious' masks it as well.
  """
  # By mu, not by u, whose root and quotient XLA would compute twice.
  method = optax.scale_by_adam(b1, b2, eps)
  return descend(
    cautious(method, axes, normalization, lambda u, state: state.mu),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
