"""Normalize and project: every matrix keeps the norm that it began with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import roles


class NapState(NamedTuple):
  norms: Any  # of each matrix of each layer; None for other parameters
  inner: optax.OptState


def nap(
  method: optax.GradientTransformation, axes: Any
) -> optax.GradientTransformationExtraArgs:
  """Projects after each update of a complete optimizer (2407.01800, section 3).

    x <- norm(x_0) (x + u) / norm(x + u), Frobenius

  The effective learning rate lr / norm(x) then follows the schedule alone.
  Each layer of a stack has its norm. Embeddings, heads and vectors are left
  alone, since no normalisation follows them, and so is a matrix that begins
  with 0. With axes=None every matrix is projected. State: norms, inner.
  """
  method = optax.with_extra_args_support(method)

  def norm(x, a):
    if a.role != 'matrix':
      return None
    dims = tuple(i for i in range(x.ndim) if i not in a.batch)
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), dims, keepdims=True)
    return jnp.sqrt(square)

  def init(params):
    norms = jax.tree.map(norm, params, roles.of(params, axes))
    return NapState(norms, method.init(params))

  def update(updates, state, params=None, **extra):
    u, inner = method.update(updates, state.inner, params, **extra)

    def projected(u, x, a, want):
      new = x + u
      if want is None:
        return u
      have = norm(new, a)
      ratio = want / jnp.where(have > 0, have, 1)
      return jnp.where((want > 0) & (have > 0), ratio * new - x, u)

    meaning = roles.of(params, axes)
    u = jax.tree.map(projected, u, params, meaning, state.norms)
    return u, NapState(state.norms, inner)

  return optax.GradientTransformationExtraArgs(init, update)
