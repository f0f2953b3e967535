"""Fingerprints of arrays: they tell whether what is read is what was saved."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp


def of(tree: Any) -> Any:
  """Returns a uint32 per leaf that changes with any bit and with any swap.

  Orbax restores array data with a flipped byte without an error, so this is
  stored at save and compared at restore. It does not depend on the sharding.
  """
  # Leaf by leaf, so that equal shapes share a compilation; on several devices
  # in one program, as all processes must take the sums in the same order.
  if all(
    len(jnp.asarray(x).sharding.device_set) == 1 for x in jax.tree.leaves(tree)
  ):
    return jax.tree.map(lambda x: _sum(x, True), tree)
  return _sums(tree)


@jax.jit
def _sums(tree):
  return jax.tree.map(lambda x: _sum(x, False), tree)


@functools.partial(jax.jit, static_argnums=1)
def _sum(x, whole):
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  stride = 1
  for d in reversed(range(bits.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, d)
    index += iota * jnp.uint32(stride & 0xFFFFFFFF)
    stride *= bits.shape[d]
  # Odd multipliers of Knuth and xxHash: each bit and its place count.
  mixed = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
  place = (index * jnp.uint32(2654435761)) | jnp.uint32(1)
  terms = mixed * place
  # Eight at once: XLA's CPU backend adds up one number at a time (7 x).
  if whole and terms.size % 8 == 0:
    terms = sum(terms.reshape(8, -1))
  return jnp.sum(terms, dtype=jnp.uint32)


def by_path(tree: Any) -> dict[str, int]:
  """Returns {path: number} of a tree of fingerprints."""
  flat = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
  return {jax.tree_util.keystr(p): int(x) for p, x in flat}


def untyped(keystr: str) -> str:
  """Writes a field `.mu` or a place `[0]` as a dict key: `['mu']`, `['0']`."""
  keystr = re.sub(r'\[(\d+)\]', r"['\1']", keystr)
  return re.sub(r'\.(\w+)(?=[.\[]|$)', r"['\1']", keystr)
