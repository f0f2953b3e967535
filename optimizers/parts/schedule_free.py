"""Schedule-free learning around any method without momentum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import decay


class ScheduleFreeState(NamedTuple):
  z: Any  # the iterate of the method; the parameters are y
  weight_sum: jax.Array
  max_lr: jax.Array
  inner: optax.OptState


def schedule_free(
  step: optax.GradientTransformation,
  learning_rate: float | jax.Array,
  b1: float | jax.Array,
) -> optax.GradientTransformation:
  """Trains y = (1 - b1) z + b1 x, where x is the running mean of z.

    z <- z + step(gradient at y);  x <- (1 - c) x + c z,
    c = w / (sum of all w), w = (largest learning rate so far)^2

  2405.15682, equations 3 to 5. `step` is a complete optimizer without
  momentum, 0 < b1 <= 1. Evaluate `eval_params`, not the parameters.
  """

  def init(params):
    z = jax.tree.map(jnp.array, decay.widen(params))
    zero = jnp.zeros((), jnp.float32)
    return ScheduleFreeState(z, zero, zero, step.init(params))

  def update(updates, state, params=None):
    moved, inner = step.update(updates, state.inner, params)
    max_lr = jnp.maximum(state.max_lr, learning_rate).astype(jnp.float32)
    total = state.weight_sum + max_lr**2
    c = jnp.where(total > 0, max_lr**2 / jnp.where(total > 0, total, 1), 0)
    z = jax.tree.map(jnp.add, state.z, moved)
    # The change of y without x: exact where y = z, and without division.
    change = jax.tree.map(
      lambda y, z, step: (1 - b1 + b1 * c) * step + c * (z - y),
      decay.widen(params),
      state.z,
      moved,
    )
    return change, ScheduleFreeState(z, total, max_lr, inner)

  return optax.GradientTransformation(init, update)


def eval_params(state: Any, params: Any, b1: float | jax.Array) -> Any:
  """Returns x, to evaluate, merge and publish; exactly y where y = z."""
  away = lambda y, z: (y + (1 - b1) / b1 * (y - z)).astype(y.dtype)
  return jax.tree.map(away, params, _state(state).z)


def train_params(state: Any, params: Any, b1: float | jax.Array) -> Any:
  """Returns y, where to take the gradient, from x: undoes `eval_params`."""
  mixed = lambda x, z: (x + (1 - b1) * (z - x)).astype(x.dtype)
  return jax.tree.map(mixed, params, _state(state).z)


def _state(state):
  return state.inner if isinstance(state, decay.ScheduledState) else state
