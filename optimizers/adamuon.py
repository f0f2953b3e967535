"""AdaMuon: Muon with Adam's second moment on the orthogonal update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.muon import scale_by_muon
from optimizers.parts import hybrid, roles


class SquareState(NamedTuple):
  orthogonal_nu: Any  # of O: no mean of g^2, for a branch to carry over


def width_power() -> float:
  """Of the rate over the width (lm/width.py): updates have an RMS of 0.2."""
  return -0.5


def adamuon(
  learning_rate,
  axes=None,
  peak=None,
  *,
  momentum: float = 0.95,
  ns_steps: int = 5,
  coefficients: str = 'keller',
  ns_dtype: str = 'float32',
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
  adam_lr_ratio: float = 1.0,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """AdaMuon (2507.11005, algorithm 1) for hidden matrices, AdamW for the rest.

    O = NewtonSchulz(sign(Nesterov momentum))
    nu <- momentum nu + (1 - momentum) O^2;  P = O / sqrt(nu)
    u = 0.2 P / RMS(P)

  The RMS is that of AdamW's updates, so the learning rate is shared. State:
  that of Muon; nu.
  Differs from the paper: decay; any presets of Newton-Schulz.
  """

  def method(axes):
    direction = scale_by_muon(
      axes,
      momentum=momentum,
      nesterov=True,
      scale='keller',
      sign=True,
      coefficients=coefficients,
      steps=ns_steps,
      dtype=ns_dtype,
    )
    return optax.chain(direction, _normalize(axes, momentum))

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


def _normalize(axes, b2):
  def init(params):
    return SquareState(jax.tree.map(jnp.zeros_like, params))

  def normalized(u, v, a):
    p = u / (jnp.sqrt(v) + 1e-8)
    dims = tuple(i for i in range(u.ndim) if i not in a.batch)
    square = jnp.mean(p**2, axis=dims, keepdims=True)
    return 0.2 * p / jnp.sqrt(jnp.maximum(square, 1e-30))

  def update(updates, state, params=None):
    del params
    square = lambda u, v: b2 * v + (1 - b2) * u**2
    nu = jax.tree.map(square, updates, state.orthogonal_nu)
    meaning = roles.of(updates, axes)
    return jax.tree.map(normalized, updates, nu, meaning), SquareState(nu)

  return optax.GradientTransformation(init, update)
