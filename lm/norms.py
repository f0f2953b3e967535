"""Norms of a gradient that need to know which dimensions are a matrix."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def nuclear(grads: Any, axes: Any) -> jax.Array:
  """Sum over all matrices of their singular values: dual to Muon's norm.

  The norm whose unit ball an orthogonalized step fills is the largest spectral
  norm of any matrix; its dual is the sum of nuclear norms (2310.07831, section
  4, asks for the dual norm). Each layer of a stack counts on its own; heads are
  joined; embeddings, heads and vectors, which AdamW moves, are left out.

  Args:
    grads: gradient, a tree of arrays.
    axes: a tree of `lm.axes.Axes` like it.
  """
  sums = jax.tree.map(_matrix, axes, grads)
  return sum(jax.tree.leaves(sums), jnp.zeros(()))


def _matrix(axes, g):
  if axes.role != 'matrix':
    return jnp.zeros(())
  dims = (axes.batch, axes.inputs, axes.outputs)
  shape = [math.prod(g.shape[i] for i in group) for group in dims]
  g_NIO = jnp.transpose(g, sum(dims, ())).reshape(shape)
  return jnp.linalg.svd(g_NIO, compute_uv=False).sum()
