"""MARS: AdamW on gradients corrected by their last change."""

import optax

from optimizers.parts import choices
from optimizers.parts import mars as part
from optimizers.parts.decay import descend


def mars(
  learning_rate,
  axes=None,
  peak=None,
  *,
  form: str = 'approximate',
  gamma: float = 0.025,
  clip: bool = True,
  b1: float = 0.95,
  b2: float = 0.99,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """MARS-AdamW (2411.10438, algorithm 2; form='exact': algorithm 1).

    c = g + gamma b1 / (1 - b1) (g - g'), norm at most 1 if clip
    u = Adam(b1, b2, eps) of c

  form: what g' is, see parts/mars.py; 'exact' costs a second gradient per
  step. State: previous gradient or parameters; count, mu, nu.
  Differs from the paper: vectors and embeddings are treated like matrices.
  """
  choices.check('form', form, part.FORMS)
  correct = axes, gamma, b1, clip
  method = optax.scale_by_adam(b1, b2, eps)
  if form == 'approximate':
    method = optax.chain(part.correct_gradient(*correct), method)
  tx = descend(
    method,
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
  return part.exact(tx, *correct) if form == 'exact' else tx


def previous_params(state, *, form: str):
  """Returns where `update` needs a second gradient, None if nowhere."""
  return state.iterate if form == 'exact' else None
