"""Cautious optimizers: no step against the gradient of the moment.

Not to be confused with cautious decay (parts/decay.py), which masks the decay
by the parameter; this masks the update by the gradient (2411.16085). The two
can be combined.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import choices, roles

NORMALIZATIONS = ('mean', 'sum')


def cautious(
  method: optax.GradientTransformation,
  axes: Any,
  normalization: str,
  direction: Callable[[Any, Any], Any] = lambda u, state: u,
) -> optax.GradientTransformation:
  """Keeps u where u g > 0 and enlarges what is left, each layer by itself.

  normalization: 'mean' divides by max(mean of the mask, 1e-3), as the authors'
  code does; 'sum' multiplies by size / (sum of the mask + 1), algorithm 1.
  direction: a tree with the signs of u, where the new state has a cheaper one.
  The state is that of `method`.
  """
  choices.check('normalization', normalization, NORMALIZATIONS)

  def masked(u, g, d, a):
    # By signs, because the product of two small numbers underflows to 0.
    mask = jnp.maximum(jnp.sign(d) * jnp.sign(g), 0)
    dims = tuple(i for i in range(u.ndim) if i not in a.batch)
    share = jnp.mean(mask, axis=dims, keepdims=True)
    if normalization == 'mean':
      return u * mask / jnp.maximum(share, 1e-3)
    size = math.prod(u.shape[i] for i in dims)
    return u * mask / (share + 1 / size)

  def update(updates, state, params=None):
    u, state = method.update(updates, state, params)
    d, meaning = direction(u, state), roles.of(updates, axes)
    return jax.tree.map(masked, u, updates, d, meaning), state

  return optax.GradientTransformation(method.init, update)
