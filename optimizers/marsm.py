"""MARS-M: Muon on gradients corrected by their last change."""

import optax

from optimizers.muon import scale_by_muon
from optimizers.parts import choices, hybrid, mars

FORMS = (*mars.FORMS, 'one_buffer')


def marsm(
  learning_rate,
  axes=None,
  peak=None,
  *,
  form: str = 'approximate',
  gamma: float = 0.025,
  clip: bool = True,
  momentum: float = 0.95,
  ns_steps: int = 5,
  coefficients: str = 'keller',
  ns_dtype: str = 'float32',
  scale: str = 'moonlight',
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
  adam_lr_ratio: float = 1.0,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """MARS-M (2510.21800, algorithm 2) for hidden matrices, AdamW for the rest.

    c = g + gamma momentum / (1 - momentum) (g - g'), see parts/mars.py
    M <- momentum M + (1 - momentum) c;  u = scale * NewtonSchulz(M)

  form 'one_buffer' is 'approximate' without clip and without g':
  M = gamma g + (1 - gamma) B, B the mean of g. So gamma = 1 - momentum is
  Muon with Nesterov momentum. State: previous gradient or parameters; that of
  Muon.
  Differs from the paper: any scale, other modes of decay.
  """
  choices.check('form', form, FORMS)
  if form == 'one_buffer' and clip:
    raise ValueError(
      "form='one_buffer' cannot clip: it never makes c; set clip=False."
    )

  def method(axes):
    direction = scale_by_muon(
      axes,
      momentum=momentum,
      nesterov=False,
      gradient_share=gamma if form == 'one_buffer' else None,
      scale=scale,
      coefficients=coefficients,
      steps=ns_steps,
      dtype=ns_dtype,
    )
    if form != 'approximate':
      return direction
    correct = mars.correct_gradient(axes, gamma, momentum, clip)
    return optax.chain(correct, direction)

  tx = hybrid.with_adamw(
    method,
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
    adam_lr_ratio=adam_lr_ratio,
    b1=b1,
    b2=b2,
    eps=eps,
  )
  if form != 'exact':
    return tx
  is_matrix = lambda a: a.role == 'matrix'
  return mars.exact(tx, axes, gamma, momentum, clip, is_matrix)


def previous_params(state, *, form: str):
  """Returns where `update` needs a second gradient, None if nowhere."""
  return state.iterate if form == 'exact' else None
