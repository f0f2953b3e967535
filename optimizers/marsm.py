"""MARS-M: Muon on gradients corrected by their last change."""

import optax

from optimizers.muon import scale_by_muon
from optimizers.parts import hybrid, mars, newton_schulz, shape_scale


def marsm(
  learning_rate,
  axes=None,
  peak=None,
  *,
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

    c = g + gamma momentum / (1 - momentum) (g - g_previous), see parts/mars.py
    M <- momentum M + (1 - momentum) c;  u = scale * NewtonSchulz(M)

  gamma = 1 - momentum without clip is Muon with Nesterov momentum. State:
  previous gradient; that of Muon.
  """
  shape_scale.check(scale)
  newton_schulz.check(coefficients, ns_steps, ns_dtype)

  def method(axes):
    return optax.chain(
      mars.correct_gradient(axes, gamma, momentum, clip),
      scale_by_muon(
        axes,
        momentum=momentum,
        nesterov=False,
        bias_correction=False,
        scale=scale,
        coefficients=coefficients,
        steps=ns_steps,
        dtype=ns_dtype,
      ),
    )

  return hybrid.with_adamw(
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
