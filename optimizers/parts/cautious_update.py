"""Cautious optimizers: no step against the gradient of the moment.

Not to be confused with cautious decay (parts/decay.py), which masks the decay
by the parameter; this masks the update by the gradient (2411.16085). The two
can be combined.
"""

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import choices

NORMALIZATIONS = ('mean', 'sum')


def cautious(
  method: optax.GradientTransformation, normalization: str
) -> optax.GradientTransformation:
  """Keeps u where u g > 0 and enlarges what is left, leaf by leaf.

  normalization: 'mean' divides by max(mean of the mask, 1e-3), as the authors'
  code does; 'sum' multiplies by size / (sum of the mask + 1), algorithm 1.
  The state is that of `method`.
  """
  choices.check('normalization', normalization, NORMALIZATIONS)

  def masked(u, g):
    # By signs, because the product of two small numbers underflows to 0.
    mask = (jnp.sign(u) * jnp.sign(g) > 0).astype(u.dtype)
    if normalization == 'mean':
      return u * mask / jnp.maximum(jnp.mean(mask), 1e-3)
    return u * mask * (mask.size / (jnp.sum(mask) + 1))

  def update(updates, state, params=None):
    u, state = method.update(updates, state, params)
    return jax.tree.map(masked, u, updates), state

  return optax.GradientTransformation(method.init, update)
