"""NorMuon: Muon whose neurons all move by the same amount."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.muon import scale_by_muon
from optimizers.parts import hybrid, roles


class NeuronState(NamedTuple):
  nu: Any


def normuon(
  learning_rate,
  axes=None,
  peak=None,
  *,
  momentum: float = 0.95,
  neuron_b2: float = 0.95,
  ns_steps: int = 5,
  coefficients: str = 'keller',
  ns_dtype: str = 'float32',
  scale: str = 'keller',
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
  adam_lr_ratio: float = 0.2,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """NorMuon (2510.05491, algorithm 1) for hidden matrices, AdamW for the rest.

    O = NewtonSchulz(Nesterov momentum), as in muon.py
    nu <- neuron_b2 nu + (1 - neuron_b2) mean over the inputs of O^2
    u = scale * norm(O) P / norm(P),  P = O / sqrt(nu)

  State: that of Muon; nu, one number per output neuron.
  Differs from the paper: Nesterov momentum and norm(O), as in the authors' code
  (algorithm 1: neither, and 0.2 sqrt(m n) for norm(O)); any scale;
  adam_lr_ratio for the rest.
  """

  def method(axes):
    direction = scale_by_muon(
      axes,
      momentum=momentum,
      nesterov=True,
      scale=scale,
      coefficients=coefficients,
      steps=ns_steps,
      dtype=ns_dtype,
    )
    return optax.chain(direction, normalize_neurons(axes, neuron_b2))

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


def normalize_neurons(
  axes: Any, b2: float | jax.Array
) -> optax.GradientTransformation:
  """Divides by the RMS over the inputs; keeps the norm of each matrix."""

  def mean_square(u, a):
    return jnp.mean(u**2, axis=tuple(a.inputs), keepdims=True)

  def init(params):
    meaning = roles.of(params, axes)
    zeros = lambda x, a: jnp.zeros_like(mean_square(x, a))
    return NeuronState(jax.tree.map(zeros, params, meaning))

  def update(updates, state, params=None):
    del params
    meaning = roles.of(updates, axes)
    square = jax.tree.map(mean_square, updates, meaning)
    nu = jax.tree.map(lambda s, v: b2 * v + (1 - b2) * s, square, state.nu)

    def normalized(u, s, v, a):  # norms of u and p from their rows: one pass
      inverse = 1 / (jnp.sqrt(v) + 1e-10)
      dims = tuple(i for i in range(u.ndim) if i not in a.batch)
      total = lambda x: jnp.sum(x, axis=dims, keepdims=True)
      kept = total(s) / jnp.maximum(total(s * inverse**2), 1e-30)
      return u * (inverse * jnp.sqrt(kept))

    u = jax.tree.map(normalized, updates, square, nu, meaning)
    return u, NeuronState(nu)

  return optax.GradientTransformation(init, update)
