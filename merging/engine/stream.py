"""Weighted sums of checkpoints, block by block, in bounded memory."""

import contextlib
import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from merging.engine import atomic, plan
from merging.engine.plan import Leaf, Options, Path, Plan, Sources

_BLOCK = 4 << 20  # bytes of one source: a sum that stays in the cache
_PIECE = 1 << 16  # elements that stay in the processor's cache


def merge(sources: Sources, out: Path, **options: Any) -> None:
  """Writes the weighted sum of checkpoints as one of the same format.

  Sources are Orbax items, whatever devices wrote them and however they are
  stored (zarr 2 or 3, OCDBT or files), or safetensors folders. In whatever
  order they are listed, they are added from the oldest step to the newest and
  cast once; the next block is read while one is added.

  Args:
    sources: pairs (item directory, coefficient).
    out: directory to create; it appears complete or not at all.
    **options: the fields of `Options`. accumulate: 'float32' or 'float64', at
      least the precision of the leaf. dtype: of the result; None keeps that of
      the sources. max_bytes: of memory for arrays. observe: called with every
      block read and written, e.g. to verify fingerprints. tree: the part of an
      Orbax tree to merge, as 'state.params'. integers: take leaves that are not
      floating point, as counters, from the newest source.

  Raises:
    ValueError: `out` exists; sources that are missing, repeated or differ in
      leaves, shapes or dtypes; leaves that are not floating point or finite;
      stored chunks that do not fit max_bytes; coefficients whose sum is not 1.
  """
  with atomic.directory(out) as temporary:
    write_item(sources, temporary, **options)


def write_item(sources: Sources, out: pathlib.Path, **options: Any) -> None:
  """Does what `merge` does in an existing directory, not atomically."""
  finish = write_part(sources, out, (0, 1), **options)
  finish()


def write_part(
  sources: Sources, out: pathlib.Path, part: tuple[int, int], **options: Any
) -> Any:
  """Writes every part[1]-th block, from block part[0] on.

  Returns a function that completes `out`, to be called in one process when all
  have returned.
  """
  p = plan.plan(sources, Options(**options))
  with plan.named(out, 'all', 'written'):
    writer = p.items[0].writer(out, p.options.dtype, part)
  end = lambda: None
  try:
    for read, block in _blocks(p, _created(p, writer, out), part):
      end()
      end = _start(writer, out, read.leaf.name, read.index, block)
      if not read.ahead:
        end()
  except BaseException:
    with contextlib.suppress(ValueError):
      end()  # a late write would bring removed files back
    raise
  end()

  def finish():
    with plan.named(out, 'all', 'written'):
      writer.finish()

  return finish


def _start(writer, out, name, index, block):
  """Starts a write; returns what waits for its end."""
  with plan.named(out, name, 'written'):
    pending = writer.write(name, index, block)

  def end():
    with plan.named(out, name, 'written'):
      return pending and pending.result()

  return end


def _created(p, writer, out) -> Iterator[Leaf]:
  for leaf in plan.leaves(p):
    with plan.named(out, leaf.name, 'written'):
      writer.create(leaf.name, leaf.shape, leaf.dtype, leaf.chunk)
    yield leaf


def combine(sources: Sources, **options: Any) -> dict[str, Any]:
  """Returns what `merge` would write, bit for bit, as a nested dict of arrays.

  Arguments and errors are those of `merge`.
  """
  p = plan.plan(sources, Options(**options))
  tree: dict[str, Any] = {}
  wholes = {}
  leaves = list(plan.leaves(p))
  for leaf in leaves:
    *parents, last = p.items[0].leaves[leaf.name]
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = wholes[leaf.name] = np.empty(leaf.shape, _numpy(leaf.dtype))
  for read, block in _blocks(p, leaves, (0, 1)):
    wholes[read.leaf.name][read.index] = block
  return tree


def _numpy(name) -> np.dtype:
  return ts.dtype(name).numpy_dtype  # numpy alone does not know bfloat16


class _Read(NamedTuple):
  """One block of one source; `ahead`: memory holds the next one, too."""

  leaf: Leaf
  index: tuple[slice, ...]
  source: int
  ahead: bool


def _blocks(p, leaves, part) -> Iterator[tuple[_Read, np.ndarray]]:
  """Yields the last read and the weighted sum, for this part of the blocks."""
  total = None
  piece = np.empty(_PIECE, np.float64)
  for read, block in _read_ahead(p, _reads(p, leaves, part)):
    leaf, index, i, _ = read
    if p.options.observe:
      p.options.observe(p.paths[i], leaf.name, index, block)
    if i == 0:
      total = np.empty(block.shape, leaf.sum_dtype)
    if leaf.averaged:
      _add(total, block, p.coefficients[i], piece, i == 0)
    else:
      total = block
    if i + 1 < len(p.paths):
      continue
    result = _cast(p, leaf, index, total)
    if p.options.observe:
      p.options.observe(None, leaf.name, index, result)
    yield read, result


def _reads(p, leaves, part) -> Iterator[_Read]:
  """Yields what this part has to read, in order."""
  number = itertools.count()
  for leaf in leaves:
    shape, ahead = _block_shape(p, leaf)
    first = 0 if leaf.averaged else len(p.paths) - 1
    ranges = [
      [slice(i, min(i + b, n)) for i in range(0, n, b)]
      for b, n in zip(shape, leaf.shape, strict=True)
    ]
    for index in itertools.product(*ranges):
      if next(number) % part[1] == part[0]:
        for i in range(first, len(p.paths)):
          yield _Read(leaf, index, i, ahead)


def _read_ahead(p, reads) -> Iterator[tuple[_Read, np.ndarray]]:
  """Yields each read with its array; the next one is on its way by then."""

  def start(read):
    with plan.named(p.paths[read.source], read.leaf.name):
      return read, read.leaf.arrays[read.source].read(read.index)

  def end(read, future):
    with plan.named(p.paths[read.source], read.leaf.name):
      return read, np.asarray(future.result())

  waiting = None
  for read in reads:
    if waiting and not (waiting[0].ahead and read.ahead):
      yield end(*waiting)
      waiting = None
    started = start(read)
    if waiting:
      yield end(*waiting)
    waiting = started
  if waiting:
    yield end(*waiting)


def _block_shape(p: Plan, leaf: Leaf) -> tuple[list[int], bool]:
  """Returns a multiple of the chunk that fits max_bytes, and whether two do.

  Raises:
    ValueError: not even one chunk fits.
  """
  source = leaf.arrays[0].dtype.numpy_dtype.itemsize
  result = _numpy(leaf.dtype).itemsize
  # The sum; of a block that is read or written itself, its chunks and their
  # encoding. Ahead: while one is added, one is read and one is written.
  least = leaf.sum_dtype.itemsize + 3 * max(source, result)
  each = leaf.sum_dtype.itemsize + 4 * source + 3 * result
  chunk = math.prod(leaf.chunk)
  ahead = each * chunk <= p.options.max_bytes
  room = p.options.max_bytes // ((each if ahead else least) * chunk)
  if not room:
    need = -(-least * chunk >> 20)
    raise ValueError(
      f"leaf '{leaf.name}' is stored in chunks of {chunk * source / 2**20:.1f} "
      f'MiB, so a merge needs {need} MiB of memory; max_bytes='
      f'{p.options.max_bytes} (--max_mib) is less.'
    )
  room = min(room, max(_BLOCK // (source * chunk), 1))
  block = list(leaf.chunk)
  for axis in reversed(range(len(block))):
    wanted = -(-leaf.shape[axis] // block[axis])
    factor = max(min(wanted, room), 1)
    block[axis] *= factor
    room //= factor
    if factor < wanted:
      break
  return block, ahead


def _add(total, block, coefficient, piece, first) -> None:
  """Adds coefficient * block to total, in pieces that stay in the cache."""
  weight = total.dtype.type(coefficient)
  total, block = total.reshape(-1), block.reshape(-1)
  piece = piece.view(total.dtype)
  with np.errstate(all='ignore'):  # what is not finite is found at the end
    for a in range(0, total.size, _PIECE):
      into, x = total[a : a + _PIECE], block[a : a + _PIECE]
      if first:  # the first product is the sum: 0 + c x loses the sign of a 0
        np.multiply(x, weight, out=into, dtype=total.dtype)
      else:
        product = piece[: x.size]
        np.multiply(x, weight, out=product, dtype=total.dtype)
        into += product


def _cast(p, leaf, index, total):
  with np.errstate(over='ignore'):
    result = total.astype(_numpy(leaf.dtype), copy=False)
  flat = result.reshape(-1)
  pieces = (flat[a : a + _PIECE] for a in range(0, flat.size, _PIECE))
  if all(np.isfinite(x).all() for x in pieces):
    return result
  # A source that is not finite makes the sum so, whatever its coefficient.
  for path, array in zip(p.paths, leaf.arrays, strict=True):
    if not np.isfinite(np.asarray(array.read(index).result())).all():
      raise ValueError(f"leaf '{leaf.name}' of '{path}' is not finite.")
  raise ValueError(
    f"leaf '{leaf.name}' of the result does not fit {leaf.dtype}."
  )
