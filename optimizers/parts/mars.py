"""The gradient correction of MARS."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import roles


class MarsState(NamedTuple):
  previous: Any  # gradient of the last step


def correct_gradient(
  axes: Any, gamma: float | jax.Array, b1: float | jax.Array, clip: bool
) -> optax.GradientTransformation:
  """c = g + gamma b1 / (1 - b1) (g - g_previous) (2411.10438, equation 8).

  `clip` bounds the norm of c by 1 for each parameter, for each layer of a
  stack by itself. The approximate form: the previous gradient is that of the
  previous batch. g_previous is 0 at the first step. State: previous.
  """

  def corrected(g, old, a):
    c = g + gamma * b1 / (1 - b1) * (g - old)
    if not clip:
      return c
    dims = tuple(i for i in range(g.ndim) if i not in a.batch)
    square = jnp.sum(c**2, axis=dims, keepdims=True)
    return c / jnp.sqrt(jnp.maximum(square, 1))

  def init(params):
    return MarsState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    c = jax.tree.map(
      corrected, updates, state.previous, roles.of(updates, axes)
    )
    return c, MarsState(updates)

  return optax.GradientTransformation(init, update)
