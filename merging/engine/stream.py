"""Weighted sums of checkpoints, block by block, in bounded memory."""

import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from merging.engine import atomic, items, plan
from merging.engine.plan import Leaf, Options, Path, Plan, Sources

Block = tuple[tuple[slice, ...], np.ndarray]


def merge(sources: Sources, out: Path, **options: Any) -> None:
  """Writes the weighted sum of Orbax items as an ordinary Orbax item.

  Whatever devices wrote the sources, however they are stored (zarr 2 or 3,
  OCDBT or files) and in whatever order they are listed: they are added from
  the oldest step to the newest and cast once.

  Args:
    sources: pairs (item directory, coefficient).
    out: directory to create; it appears complete or not at all.
    **options: the fields of `Options`. accumulate: 'float32' or 'float64', at
      least the precision of the leaf. dtype: of the result; None keeps that of
      the sources. max_bytes: of memory for arrays, but never less than a few
      stored chunks of the sources. observe: called with every block read and
      written, e.g. to verify fingerprints.

  Raises:
    ValueError: `out` exists; sources that are missing, repeated or differ in
      leaves, shapes or dtypes; leaves that are not floating point or finite;
      coefficients whose sum is not 1.
  """
  with atomic.directory(out) as temporary:
    write_item(sources, temporary, **options)


def write_item(sources: Sources, out: pathlib.Path, **options: Any) -> None:
  """Does what `merge` does in an existing directory, not atomically."""
  p = plan.plan(sources, Options(**options))
  for leaf in plan.leaves(p):
    with plan.named(out, leaf.name, 'written'):
      target = items.create_leaf(
        out,
        leaf.name,
        shape=leaf.shape,
        dtype=leaf.dtype,
        chunk=leaf.chunk,
        limits=p.limits,
      )
    for index, block in _blocks(p, leaf):
      with plan.named(out, leaf.name, 'written'):
        target[index].write(block).result()
  items.write_metadata(out, p.metas[0])


def combine(sources: Sources, **options: Any) -> dict[str, Any]:
  """Returns what `merge` would write, bit for bit, as a nested dict of arrays.

  Arguments and errors are those of `merge`.
  """
  p = plan.plan(sources, Options(**options))
  paths = items.leaves(p.metas[0])
  tree: dict[str, Any] = {}
  for leaf in plan.leaves(p):
    whole = np.empty(leaf.shape, _numpy(leaf.dtype))
    for index, block in _blocks(p, leaf):
      whole[index] = block
    *parents, last = paths[leaf.name]
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = whole
  return tree


def _numpy(name) -> np.dtype:
  return ts.dtype(name).numpy_dtype  # numpy alone does not know bfloat16


def _blocks(p: Plan, leaf: Leaf) -> Iterator[Block]:
  """Yields (slices, weighted sum) over the whole leaf."""
  ranges = [
    [slice(i, min(i + b, n)) for i in range(0, n, b)]
    for b, n in zip(_block_shape(p, leaf), leaf.shape, strict=True)
  ]
  for index in itertools.product(*ranges):
    total = _sum(p, leaf, index)
    with np.errstate(over='ignore'):
      block = total.astype(_numpy(leaf.dtype), copy=False)
    if not np.isfinite(block).all():
      raise ValueError(
        f"leaf '{leaf.name}' of the result does not fit {leaf.dtype}."
      )
    if p.options.observe:
      p.options.observe(None, leaf.name, index, block)
    yield index, block


def _block_shape(p: Plan, leaf: Leaf) -> list[int]:
  """Returns a multiple of the chunk that fits max_bytes, at least a chunk."""
  # The sum and the product; what is read, twice while decoded; the result and
  # its encoding.
  source = leaf.arrays[0].dtype.numpy_dtype.itemsize
  result = _numpy(leaf.dtype).itemsize
  each = 2 * (leaf.sum_dtype.itemsize + source + result)
  room = p.options.max_bytes // (each * math.prod(leaf.chunk))
  block = list(leaf.chunk)
  for axis in reversed(range(len(block))):
    wanted = -(-leaf.shape[axis] // block[axis])
    factor = max(min(wanted, room), 1)
    block[axis] *= factor
    room //= factor
    if factor < wanted:
      break
  return block


def _sum(p: Plan, leaf: Leaf, index: tuple[slice, ...]) -> np.ndarray:
  """Adds one block of all sources, oldest first."""
  total = product = None
  for path, c, array in zip(p.paths, p.coefficients, leaf.arrays, strict=True):
    with plan.named(path, leaf.name):
      block = np.asarray(array[index].read().result())
    if not np.isfinite(block).all():
      raise ValueError(f"leaf '{leaf.name}' of '{path}' is not finite.")
    if p.options.observe:
      p.options.observe(path, leaf.name, index, block)
    first = total is None
    if first:
      total = np.empty(block.shape, leaf.sum_dtype)
      product = np.empty(block.shape, leaf.sum_dtype)
    # The first product is the sum: 0 + c x would lose the sign of a zero.
    weight = leaf.sum_dtype.type(c)
    into = total if first else product
    np.multiply(block, weight, out=into, dtype=leaf.sum_dtype)
    if not first:
      total += product
  return total
