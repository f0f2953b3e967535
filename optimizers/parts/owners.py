"""Whole matrices on several devices: each device owns some of a stack."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def apply(
  function: Callable[[jax.Array], jax.Array], x_BMN: jax.Array
) -> jax.Array:
  """Returns function(x_BMN) for a function of each matrix by itself.

  Under `jax.set_mesh` with several devices, the matrices are dealt out over all
  of its axes of type Auto, the function runs on whole matrices, and the result
  goes back to where its reader wants it: the values are those of one device,
  the work is divided by the number of devices. A sharded matrix moves by one
  all-to-all for each mesh axis and direction; a replicated one comes back by an
  all-gather. The stack is padded with zeros, which the function must accept.
  Without a mesh, or where a surrounding `shard_map` took all axes, it is
  function(x_BMN).
  """
  names = axes()
  if not names:
    return function(x_BMN)
  mesh = jax.sharding.get_abstract_mesh()
  n, owners = len(x_BMN), math.prod(mesh.shape[a] for a in names)
  x_BMN = jnp.pad(x_BMN, ((0, -n % owners), (0, 0), (0, 0)))
  # One axis after the other: XLA turns each of these changes into a single
  # all-to-all, but gathers everything if it has to do several at once.
  for i in range(len(names)):
    x_BMN = _deal(x_BMN, names[:i])
  dealt = P(names)
  x_BMN = jax.shard_map(
    function, in_specs=dealt, out_specs=dealt, axis_names=set(names)
  )(x_BMN)
  for i in reversed(range(len(names))):
    x_BMN = _deal(x_BMN, names[:i])
  return x_BMN[:n]


def axes() -> tuple[str, ...]:
  """Returns the mesh axes over which `apply` deals; none on one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(n for n in mesh.auto_axes if mesh.shape[n] > 1)


def _deal(x_BMN, names):
  """Shards the stack over `names`; XLA chooses for the matrices."""
  spec = P(names or None, P.UNCONSTRAINED, P.UNCONSTRAINED)
  return jax.lax.with_sharding_constraint(x_BMN, spec)
