"""Two methods in one optimizer: one for matrices, AdamW for all the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from optimizers.adamw import adamw
from optimizers.parts import roles
from optimizers.parts.decay import Rate, descend, scaled

PyTree = Any


def with_adamw(
  method: Callable[[PyTree], optax.GradientTransformation],
  learning_rate: Rate,
  axes: PyTree | None,
  peak: float | jax.Array | None,
  *,
  weight_decay: float | jax.Array,
  decay: str,
  adam_lr_ratio: float | jax.Array,
  b1: float | jax.Array,
  b2: float | jax.Array,
  eps: float | jax.Array,
) -> optax.GradientTransformation:
  """Completes a method for matrices: decay, learning rate, AdamW for the rest.

  `method` makes the transformation of the matrices from their axes. AdamW runs
  at adam_lr_ratio times the learning rate and has the same decay. Which leaf
  gets what: `roles.treatment`.
  """
  return split(
    axes,
    lambda mine: descend(
      method(mine),
      learning_rate,
      mine,
      peak,
      weight_decay=weight_decay,
      decay=decay,
    ),
    lambda mine: adamw(
      scaled(learning_rate, adam_lr_ratio),
      mine,
      scaled(peak, adam_lr_ratio),
      b1=b1,
      b2=b2,
      eps=eps,
      weight_decay=weight_decay,
      decay=decay,
    ),
  )


class SplitState(NamedTuple):
  """States of the two transformations; None where a leaf is the other's."""

  matrices: optax.OptState
  rest: optax.OptState


def split(
  axes: PyTree | None,
  matrices: Callable[[PyTree], optax.GradientTransformation],
  rest: Callable[[PyTree], optax.GradientTransformation],
) -> optax.GradientTransformation:
  """Gives leaves of role 'matrix' to one transformation, the rest to another.

  `matrices` and `rest` make a transformation from their part of `axes` (None
  if `axes` is None). The leaves that a transformation does not own are None in
  its parameters, updates and state, so they take no memory.
  """
  parts = (None, None) if axes is None else _parts(axes, axes)
  first, second = matrices(parts[0]), rest(parts[1])

  def init(params):
    p = _parts(params, roles.of(params, axes))
    return SplitState(first.init(p[0]), second.init(p[1]))

  def update(updates, state, params=None):
    meaning = roles.of(updates if params is None else params, axes)
    u = _parts(updates, meaning)
    p = (None, None) if params is None else _parts(params, meaning)
    u1, s1 = first.update(u[0], state.matrices, p[0])
    u2, s2 = second.update(u[1], state.rest, p[1])
    u = jax.tree.map(lambda _, a, b: b if a is None else a, updates, u1, u2)
    return u, SplitState(s1, s2)

  return optax.GradientTransformation(init, update)


def _parts(tree, axes):
  """Returns the matrices of `tree` and the rest, each with None elsewhere."""
  return (
    jax.tree.map(lambda x, a: x if a.role == 'matrix' else None, tree, axes),
    jax.tree.map(lambda x, a: None if a.role == 'matrix' else x, tree, axes),
  )
