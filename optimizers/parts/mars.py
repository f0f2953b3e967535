"""The gradient correction of MARS, with the gradient of before or of now.

c = g + gamma b1 / (1 - b1) (g - g'), norm at most 1 for each parameter if
clip, for each layer of a stack by itself (2411.10438, equation 8)

form           g'                                       remembers
'approximate'  gradient of the last step, at first 0    that gradient
'exact'        gradient of this batch at the            those parameters
               parameters of the last step
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import roles
from optimizers.parts.decay import widen

FORMS = ('approximate', 'exact')


class MarsState(NamedTuple):
  previous: Any  # gradient of the last step


class ExactState(NamedTuple):
  iterate: Any  # before the last step; never taken for a gradient at a branch
  inner: optax.OptState


def correct_gradient(
  axes: Any, gamma: float | jax.Array, b1: float | jax.Array, clip: bool
) -> optax.GradientTransformation:
  """Replaces g by c of the approximate form. State: previous."""

  def init(params):
    return MarsState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    c = _corrected(updates, state.previous, axes, gamma, b1, clip)
    return c, MarsState(updates)

  return optax.GradientTransformation(init, update)


def exact(
  method: optax.GradientTransformation,
  axes: Any,
  gamma: float | jax.Array,
  b1: float | jax.Array,
  clip: bool,
  treats: Callable[[Any], bool] = lambda axes: True,
) -> optax.GradientTransformationExtraArgs:
  """Gives a complete optimizer c of the exact form in place of gradients.

  `update` needs previous_grads, the gradient of this batch at
  `state.iterate`; at first these are the parameters themselves. `treats`
  says of the axes of a leaf whether it is corrected. Decay that looks at the
  gradient ('coupled', 'cautious-gradient') sees c.
  """

  def init(params):
    copy = jax.tree.map(jnp.array, widen(params))
    return ExactState(copy, method.init(params))

  def update(updates, state, params=None, *, previous_grads=None, **extra):
    del extra
    if params is not None and previous_grads is None:
      raise ValueError(
        "form='exact' needs update(..., previous_grads=), the gradient of this "
        'batch at state.iterate.'
      )
    if params is None:
      return method.update(updates, state.inner)  # which refuses it
    c = _corrected(updates, previous_grads, axes, gamma, b1, clip, treats)
    u, inner = method.update(c, state.inner, params)
    return u, ExactState(jax.tree.map(jnp.array, widen(params)), inner)

  return optax.GradientTransformationExtraArgs(init, update)


def _corrected(updates, previous, axes, gamma, b1, clip, treats=None):
  def one(g, old, a):
    if treats and not treats(a):
      return g
    c = g + gamma * b1 / (1 - b1) * (g - old)
    if not clip:
      return c
    dims = tuple(i for i in range(g.ndim) if i not in a.batch)
    square = jnp.sum(c**2, axis=dims, keepdims=True)
    return c / jnp.sqrt(jnp.maximum(square, 1))

  return jax.tree.map(one, updates, previous, roles.of(updates, axes))
