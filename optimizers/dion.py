"""Dion: orthogonal updates of low rank by one power iteration per step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import choices, hybrid, roles, shape_scale


class DionState(NamedTuple):
  buffer: Any  # M, a sum: no mean of gradients, for a branch to carry over
  basis: Any  # (batch, inputs, rank) for each matrix


def dion(
  learning_rate,
  axes=None,
  peak=None,
  *,
  momentum: float = 0.95,
  rank: int = 128,
  scale: str = 'spectral',
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
  adam_lr_ratio: float = 0.2,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """Dion (2504.05295, algorithm 1) for hidden matrices, AdamW for the rest.

    B = M + G, (outputs, inputs);  P = qr(B Q);  R = B^T P
    M <- B - (1 - momentum) P R^T;  Q <- R with columns of norm 1
    u = scale * P Q^T

  rank: at most the smaller side is used. State: buffer = M; basis = Q, which
  begins as random orthogonal columns of a fixed key.
  Differs from the paper: a column of R that is 0 keeps its old direction.
  """
  shape_scale.check(scale)
  choices.at_least(1, rank=rank)
  return hybrid.with_adamw(
    lambda axes: scale_by_dion(axes, momentum, rank, scale),
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


def scale_by_dion(
  axes: Any, momentum: float | jax.Array, rank: int, scale: str
) -> optax.GradientTransformation:
  """The direction of Dion; every leaf must be a matrix or a stack of them."""

  def basis(x, a):
    b, m, n = roles.to_matrices(x, a).shape
    noise = jax.random.normal(jax.random.key(0), (m, min(rank, m, n)))
    q = jnp.linalg.qr(noise.astype(x.dtype))[0]
    return jnp.tile(q, (b, 1, 1))  # the same in each layer, scanned or not

  def init(params):
    meaning = roles.of(params, axes)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return DionState(zeros, jax.tree.map(basis, params, meaning))

  def one(g, m, q, a):
    b = roles.to_matrices(m + g, a)  # (batch, inputs, outputs): B transposed
    p = jnp.linalg.qr(jnp.swapaxes(b, 1, 2) @ q)[0]
    r = b @ p
    b = b - (1 - momentum) * r @ jnp.swapaxes(p, 1, 2)
    norm = jnp.linalg.norm(r, axis=1, keepdims=True)
    column = r / jnp.where(norm > 0, norm, 1)
    u = shape_scale.factor(scale, g.shape, a) * column @ jnp.swapaxes(p, 1, 2)
    back = lambda x: roles.from_matrices(x, a, g.shape)
    return back(u), back(b), jnp.where(norm > 0, column, q)

  def update(updates, state, params=None):
    del params
    meaning = roles.of(updates, axes)
    out = jax.tree.map(one, updates, state.buffer, state.basis, meaning)
    u, m, q = (
      jax.tree.map(lambda _, o, i=i: o[i], updates, out) for i in range(3)
    )
    return u, DionState(m, q)

  return optax.GradientTransformation(init, update)
