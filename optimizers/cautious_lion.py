"""C-Lion: Lion without steps against the gradient."""

import optax

from optimizers.lion import scale_by_lion
from optimizers.parts.cautious_update import cautious
from optimizers.parts.decay import descend


def cautious_lion(
  learning_rate,
  axes=None,
  peak=None,
  *,
  normalization: str = 'sum',
  b1: float = 0.9,
  b2: float = 0.99,
  weight_decay: float = 1.0,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Cautious Lion (2411.16085, algorithm 1 around Lion).

    u = that of lion.py, 0 where u g <= 0, enlarged by the share that is left

  normalization: see parts/cautious_update.py; 'sum' is the authors' c_lion.py.
  State: mu. Where g is 0 nothing agrees: at a large vocabulary, most of whose
  tokens a batch has not, the rest of the embedding takes far larger steps.
  Differs from the paper: the decay is as in lion.py and may be masked as well.
  """
  return descend(
    cautious(scale_by_lion(b1, b2), axes, normalization),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
