"""What each parameter is, and which of its dimensions are inputs and outputs.

Optimizers read the logical axes of a model, never the order of its shapes: a
(4, 64, 256) stack of kernels, a (64, 8, 32) query projection and a transposed
weight all become batches of (inputs, outputs) matrices here.

Without axes the shapes decide: rank below 2 is a vector, rank 2 is a matrix
(inputs, outputs), and of a higher rank the last two dimensions are a matrix and
all leading ones stack independent matrices. Embeddings and heads cannot be told
from other matrices then.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from optimizers.parts import choices

PyTree = Any
ROLES = ('embedding', 'head', 'matrix', 'vector')


@dataclasses.dataclass(frozen=True)
class Axes:
  """The meaning of one parameter's dimensions (a leaf, not a pytree).

  role: 'embedding', 'head', 'matrix' or 'vector'. inputs, outputs, batch and
  heads are indices of dimensions; `batch` dimensions stack independent matrices
  and `heads` are those of `inputs` or `outputs` that index attention heads.
  lr_scale and decay_scale multiply its learning rate and weight decay.
  Any object with these fields will do.
  """

  names: tuple[str, ...]
  role: str
  inputs: tuple[int, ...] = ()
  outputs: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  heads: tuple[int, ...] = ()
  lr_scale: float = 1.0
  decay_scale: float = 1.0


def infer(shape: tuple[int, ...]) -> Axes:
  """Returns the axes that a shape suggests (see the top of this file)."""
  n = len(shape)
  if n < 2:
    return Axes(('',) * n, 'vector')
  names = ('batch',) * (n - 2) + ('in', 'out')
  return Axes(names, 'matrix', (n - 2,), (n - 1,), tuple(range(n - 2)))


def of(params: PyTree, axes: PyTree | None = None) -> PyTree:
  """Returns a tree of axes for `params`: those given, or those inferred."""
  if axes is None:
    return jax.tree.map(lambda x: infer(jnp.shape(x)), params)
  if jax.tree.structure(params) != jax.tree.structure(axes):
    one_sided = sorted(_paths(params).keys() ^ _paths(axes).keys())
    raise ValueError(
      'axes must be a tree like the parameters; only one of the two has: '
      f'{", ".join(one_sided) or "other containers"}.'
    )
  return jax.tree.map(_checked, params, axes)


def _checked(x, axes):
  choices.check('role', axes.role, ROLES)
  if len(axes.names) != jnp.ndim(x):
    raise ValueError(
      f'axes {axes.names} name {len(axes.names)} dimensions of a parameter of '
      f'shape {jnp.shape(x)}.'
    )
  dims = sorted((*axes.inputs, *axes.outputs, *axes.batch))
  both = axes.inputs and axes.outputs  # or it is no matrix: `to_matrices`
  if both and dims != list(range(jnp.ndim(x))):
    raise ValueError(
      f'axes inputs={axes.inputs}, outputs={axes.outputs}, batch={axes.batch} '
      f'must have each dimension of a parameter of shape {jnp.shape(x)} once.'
    )
  return axes


def _paths(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  key = jax.tree_util.keystr
  return {key(path, simple=True, separator='/'): leaf for path, leaf in flat}


def treatment(params: PyTree, axes: PyTree | None = None) -> dict[str, str]:
  """Lists what optimizers of matrices do with each parameter.

  Returns:
    path -> 'matrix' (treated as a matrix or a stack of them) or 'rest'
    (embeddings, heads and vectors, which AdamW updates).
  """
  return {
    path: 'matrix' if a.role == 'matrix' else 'rest'
    for path, a in _paths(of(params, axes)).items()
  }


def to_matrices(x: jax.Array, axes: Axes) -> jax.Array:
  """Reshapes a parameter to (batch, inputs, outputs); see `from_matrices`.

  Raises:
    ValueError: it has no inputs or no outputs, as a vector.
  """
  if not (axes.inputs and axes.outputs):
    raise ValueError(
      f'a parameter of shape {x.shape} and role {axes.role!r} is no matrix; '
      'legal: at least one dimension of inputs and one of outputs.'
    )
  order = (*axes.batch, *axes.inputs, *axes.outputs)
  return jnp.transpose(x, order).reshape(_shape3(x.shape, axes))


def from_matrices(
  x: jax.Array, axes: Axes, shape: tuple[int, ...]
) -> jax.Array:
  """The inverse of `to_matrices` for a parameter of `shape`."""
  order = (*axes.batch, *axes.inputs, *axes.outputs)
  x = x.reshape([shape[i] for i in order])
  return jnp.transpose(x, [order.index(i) for i in range(len(order))])


def _shape3(shape, axes):
  dims = (axes.batch, axes.inputs, axes.outputs)
  return [math.prod(shape[i] for i in group) for group in dims]


def split_heads(axes: Axes) -> Axes:
  """Makes each head of a query, key or value projection a matrix of its own.

  Heads among the outputs move to the batch; an output projection, whose heads
  are inputs, stays one matrix.
  """
  heads = tuple(i for i in axes.heads if i in axes.outputs)
  return Axes(
    tuple(axes.names),
    axes.role,
    tuple(axes.inputs),
    tuple(i for i in axes.outputs if i not in heads),
    (*axes.batch, *heads),
  )
