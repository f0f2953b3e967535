"""Adafactor: Adam with a second moment of rank one."""

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import roles
from optimizers.parts.decay import descend


def width_power(*, multiply_by_parameter_scale: bool) -> float:
  """Of the rate over the width (lm/width.py): parameters go as m^-1/2."""
  return -0.5 if multiply_by_parameter_scale else -1.0


def _rms(x, a):
  dims = tuple(i for i in range(x.ndim) if i not in a.batch)
  return jnp.sqrt(jnp.mean(x**2, axis=dims, keepdims=True))


def adafactor(
  learning_rate=1e-2,
  axes=None,
  peak=None,
  *,
  decay_rate: float = 0.8,
  clipping_threshold: float = 1.0,
  min_dim_size_to_factor: int = 128,
  multiply_by_parameter_scale: bool = True,
  eps: float = 1e-30,
  weight_decay: float = 0.0,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Adafactor (1804.04235, algorithm 4), no momentum.

    V <- b V + (1 - b) (g^2 + eps), b = 1 - t^-decay_rate, as row and column
    means if both of the two largest dimensions reach min_dim_size_to_factor
    u = g / sqrt(V);  u / max(1, RMS(u) / clipping_threshold)
    times max(RMS(x), 1e-3), if multiply_by_parameter_scale

  State: count, v_row, v_col, v.
  Differs from the paper: decay exists; each layer of a stack has its own RMS.
  """
  method = optax.scale_by_factored_rms(
    decay_rate=decay_rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    epsilon=eps,
  )

  def bounded(u, x, a):  # optax's own have one RMS for a stack
    u = u / jnp.maximum(1, _rms(u, a) / clipping_threshold)
    scale = multiply_by_parameter_scale
    return u * jnp.maximum(_rms(x, a), 1e-3) if scale else u

  def bound(updates, params):
    return jax.tree.map(bounded, updates, params, roles.of(updates, axes))

  return descend(
    optax.chain(method, optax.stateless(bound)),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
