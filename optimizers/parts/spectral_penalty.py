"""Spectral regularisation: keeps the largest singular values near 1."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import roles


class SpectralState(NamedTuple):
  vectors: Any  # right singular, (batch, outputs); None if not a matrix
  inner: optax.OptState


def spectral_penalty(
  method: optax.GradientTransformation,
  axes: Any,
  weight: float | jax.Array,
  power: int = 2,
) -> optax.GradientTransformationExtraArgs:
  """Adds weight times a gradient to those that an optimizer gets (2406.06811).

    R = sum over matrices (s^power - 1)^2, s the largest singular value
    grad R = 2 (s^power - 1) power s^(power - 1) u v^T

  u and v make one power iteration per step from where the last one ended, at
  first from fixed random vectors, so s is exact only after some steps. State:
  vectors, inner.
  Differs from the paper: matrices only, no term for norm scales. The gradient
  that MARS subtracts (`previous_grads`) gets the same term, which has no noise
  for that difference to remove.
  """
  method = optax.with_extra_args_support(method)

  def start(x, a):
    if a.role != 'matrix':
      return None
    b, _, n = roles.to_matrices(x, a).shape
    same = jnp.tile(jax.random.normal(jax.random.key(0), (1, n)), (b, 1))
    return _unit(same)  # in each layer, scanned or not

  def init(params):
    vectors = jax.tree.map(start, params, roles.of(params, axes))
    return SpectralState(vectors, method.init(params))

  def penalty(x, a, v):
    if v is None:
      return None, None
    w = roles.to_matrices(x, a)
    left = _unit(jnp.einsum('bmn,bn->bm', w, v))
    s_v = jnp.einsum('bmn,bm->bn', w, left)
    s = jnp.linalg.norm(s_v, axis=1)
    v = jnp.where(s[:, None] > 0, _unit(s_v), v)  # of 0 it learns nothing
    slope = 2 * (s**power - 1) * power * s ** (power - 1)
    outer = jnp.einsum('b,bm,bn->bmn', weight * slope, left, v)
    return roles.from_matrices(outer, a, x.shape), v

  def update(updates, state, params=None, **extra):
    meaning = roles.of(params, axes)
    out = jax.tree.map(penalty, params, meaning, state.vectors)
    v = jax.tree.map(lambda _, o: o[1], updates, out)
    one = lambda g, o: g if o[0] is None else g + o[0]
    add = lambda grads: jax.tree.map(one, grads, out)
    if 'previous_grads' in extra:
      extra = {**extra, 'previous_grads': add(extra['previous_grads'])}
    u, inner = method.update(add(updates), state.inner, params, **extra)
    return u, SpectralState(v, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def _unit(x):
  norm = jnp.linalg.norm(x, axis=1, keepdims=True)
  return x / jnp.where(norm > 0, norm, 1)
