"""Weighted sums of checkpoints, block by block, in bounded memory."""

import collections
import concurrent.futures
import contextlib
import itertools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from merging.engine import atomic, chunks, files, plan
from merging.engine.plan import Leaf, Options, Path, Plan, Sources

_THREADS = 2  # more were slower, also from disk
_BLOCK = 4 << 20  # bytes of one source, if its chunks are no larger
_PART = 1 << 17  # elements read, if possible, and added at once: in the cache


def merge(sources: Sources, out: Path, **options: Any) -> None:
  """Writes the weighted sum of checkpoints as one of the same format.

  Sources are Orbax items, whatever devices wrote them and however they are
  stored (zarr 2 or 3, OCDBT or files), or safetensors folders. In whatever
  order they are listed, they are added from the oldest step to the newest and
  cast once; threads work on a block each.

  Args:
    sources: pairs (item directory, coefficient).
    out: directory to create; it appears complete or not at all.
    **options: the fields of `Options`. accumulate: 'float32' or 'float64', at
      least the precision of the leaf. dtype: of the result; None keeps that of
      the sources. max_bytes: of memory for arrays. observe: called with every
      part read and block written, from any thread, e.g. to verify fingerprints.
      tree: the part of an Orbax tree to merge, as 'state.params'. integers:
      take leaves that are not floating point, as counters, from the newest
      source. ages: numbers that tell the older source, where names do not.

  Raises:
    ValueError: `out` exists; sources that are missing, repeated or differ in
      leaves, shapes or dtypes; leaves that are not floating point or finite;
      stored chunks that do not fit max_bytes, unless they are plain or zstd;
      coefficients whose sum is not 1.
  """
  with atomic.directory(out) as temporary:
    finish = write_part(sources, temporary, (0, 1), **options)
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
    writer = p.items[-1].writer(out, p.options.dtype, part)

  def created():
    for leaf in _leaves(p, out):
      block, _ = _block_shape(p, leaf)
      with plan.named(out, leaf.name, 'written'):
        writer.create(leaf.name, leaf.shape, leaf.dtype, tuple(block))
      yield leaf

  def write(leaf, index, block):
    with plan.named(out, leaf.name, 'written'):
      writer.write(leaf.name, index, block)

  _each_block(p, created(), part, write)

  def finish():
    with plan.named(out, 'all', 'written'):
      writer.finish()

  return finish


def combine(sources: Sources, **options: Any) -> dict[str, Any]:
  """Returns what `merge` would write, bit for bit, as a nested dict of arrays.

  Arguments and errors are those of `merge`.
  """
  p = plan.plan(sources, Options(**options))
  tree: dict[str, Any] = {}
  wholes = {}

  def created():
    for leaf in _leaves(p, None):
      *parents, last = p.items[0].leaves[leaf.name]
      node = tree
      for key in parents:
        node = node.setdefault(key, {})
      node[last] = wholes[leaf.name] = np.empty(leaf.shape, _numpy(leaf.dtype))
      yield leaf

  def keep(leaf, index, block):
    wholes[leaf.name][index] = block

  _each_block(p, created(), (0, 1), keep)
  return tree


def _numpy(name) -> np.dtype:
  return ts.dtype(name).numpy_dtype  # numpy alone does not know bfloat16


def _each_block(p, leaves, part, use) -> None:
  """Calls use(leaf, index, sum) for this part of the blocks, from threads."""
  number = itertools.count()
  pool = concurrent.futures.ThreadPoolExecutor(_THREADS, 'merge')
  waiting = collections.deque()

  def wait(count):
    while len(waiting) > count:
      waiting.popleft().result()

  def block(leaf, index):
    use(leaf, index, _cast(p, leaf, index, _sum(p, leaf, index)))

  try:
    before = 0
    for leaf in leaves:
      shape, most = _block_shape(p, leaf)
      wait(0 if most != before else math.inf)
      before = most
      for index in _ranges(leaf.shape, shape):
        if next(number) % part[1] == part[0]:
          # Where all threads may work some blocks wait, so that none is idle.
          wait(most - 1 if most < _THREADS else 2 * _THREADS)
          waiting.append(pool.submit(block, leaf, index))
      for file in (a.file for a in leaf.arrays if getattr(a, 'file', None)):
        wait(0)
        file.close()
    wait(0)
  finally:
    pool.shutdown(cancel_futures=True)  # no late write brings files back


def _ranges(shape, block) -> Iterator[tuple[slice, ...]]:
  """Yields the parts of an array: blocks, or what is left of them."""
  return itertools.product(
    *(
      [slice(i, min(i + b, n)) for i in range(0, n, b)]
      for b, n in zip(block, shape, strict=True)
    )
  )


def _sum(p, leaf, index) -> np.ndarray:
  """Returns the weighted sum of a block; of integers, the newest block."""
  if not leaf.averaged:
    return _read(p, leaf, len(p.paths) - 1, index)
  total = np.empty([s.stop - s.start for s in index], leaf.sum_dtype)
  flat = total.reshape(-1)
  places, first = [a.place(index) for a in leaf.arrays], leaf.first(index)
  with np.errstate(all='ignore'):  # what is not finite is found at the end
    if None in places or p.options.observe and first is None:
      for i, coefficient in enumerate(p.coefficients):
        _add(flat, _read(p, leaf, i, index), coefficient, i == 0)
    else:
      _add_files(p, leaf, places, flat, first)
  return total


def _read(p, leaf, i, index) -> np.ndarray:
  with plan.named(p.paths[i], leaf.name):
    block = leaf.arrays[i].read(index)
  _observe(p, p.paths[i], leaf, index, block)
  return block


def _observe(p, path, leaf, index, block) -> None:
  if p.options.observe:
    if (first := leaf.first(index)) is not None:
      index, block = (slice(first, first + block.size),), block.reshape(-1)
    p.options.observe(path, leaf.name, index, block)


def _add_files(p, leaf, places, total, first) -> None:
  """Adds what lies in files, in parts that stay in the processor's cache.

  The loop has no more Python than it must: threads wait for its lock.
  """
  kind, observe = leaf.arrays[0].dtype.numpy_dtype, p.options.observe
  part = np.empty(min(_PART, total.size), kind)
  product = part if kind == total.dtype else np.empty_like(total[:_PART])
  data, size = memoryview(part.view(np.uint8)), kind.itemsize
  sources = []
  with contextlib.ExitStack() as stack:
    for path, (file, start), c in zip(
      p.paths, places, p.coefficients, strict=True
    ):
      with plan.named(path, leaf.name):
        opened = os.open(file, os.O_RDONLY)
      stack.callback(os.close, opened)
      sources.append((opened, start, total.dtype.type(c)))
    for a in range(0, total.size, _PART):
      into = total[a : a + _PART]
      n = into.size
      x, view, y = part[:n], data[: n * size], product[:n]
      for i, (file, start, weight) in enumerate(sources):
        try:
          files.fill(view, file, start + a * size)
        except (ValueError, OSError) as e:
          raise plan.mistake(e, p.paths[i], leaf.name, 'read') from e
        if observe:
          at = slice(first + a, first + a + n)
          observe(p.paths[i], leaf.name, (at,), x)
        if i:
          np.add(into, np.multiply(x, weight, y), into)
        else:  # the first product is the sum: 0 + c x loses the sign of a 0
          np.multiply(x, weight, into)


def _leaves(p: Plan, folder: pathlib.Path | None) -> Iterator[Leaf]:
  """Yields the leaves; where not even a chunk fits, unpacked if possible."""
  for leaf in plan.leaves(p):
    each, source = leaf.bytes
    most = p.options.max_bytes // each  # elements
    first = 0 if leaf.averaged else len(leaf.arrays) - 1  # that is read
    legal = all(array.unpack for array in leaf.arrays[first:])
    if 0 < most < math.prod(leaf.chunk) and legal:
      arrays = leaf.arrays[:first]
      for path, array in zip(p.paths[first:], leaf.arrays[first:], strict=True):
        try:
          arrays.append(array.unpack(folder))
        except (ValueError, OSError) as e:
          place = getattr(e, 'filename', None) or path  # a disk that is full
          raise plan.mistake(e, place, leaf.name, 'unpacked') from e
      most = max(min(most // _THREADS, _BLOCK // source), 1)
      chunk = chunks.split(leaf.chunk, most)
      leaf = leaf._replace(arrays=arrays, chunk=chunk)
    yield leaf


def _block_shape(p: Plan, leaf: Leaf) -> tuple[list[int], int]:
  """Returns a multiple of the chunk, and how many fit max_bytes at a time.

  Raises:
    ValueError: not even one chunk fits.
  """
  each, source = leaf.bytes
  chunk = math.prod(leaf.chunk)
  room = p.options.max_bytes // (each * chunk)
  if not room:
    need = -(-each * chunk >> 20)
    raise ValueError(
      f"leaf '{leaf.name}' is stored in chunks of {chunk * source / 2**20:.1f} "
      f'MiB, so a merge needs {need} MiB of memory; max_bytes='
      f'{p.options.max_bytes} (--max_mib) is less.'
    )
  most = min(room, _THREADS)
  room = min(room // most, max(_BLOCK // (source * chunk), 1))
  return chunks.grow(leaf.chunk, leaf.shape, room), most


def _add(total, block, coefficient, first) -> None:
  """Adds coefficient * block to total, which is flat; may write into block."""
  weight, block = total.dtype.type(coefficient), block.reshape(-1)
  for a in range(0, total.size, _PART):
    into, x = total[a : a + _PART], block[a : a + _PART]
    if first:  # the first product is the sum: 0 + c x loses the sign of a 0
      np.multiply(x, weight, out=into, dtype=total.dtype)
    else:
      product = x if x.dtype == total.dtype else np.empty_like(into)
      np.multiply(x, weight, out=product, dtype=total.dtype)
      np.add(into, product, out=into)


def _cast(p, leaf, index, total):
  with np.errstate(over='ignore'):
    result = total.astype(_numpy(leaf.dtype), copy=False)
  flat = result.reshape(-1)
  pieces = (flat[a : a + _PART] for a in range(0, flat.size, _PART))
  if all(np.isfinite(x).all() for x in pieces):
    _observe(p, None, leaf, index, result)
    return result
  # A source that is not finite makes the sum so, whatever its coefficient.
  for path, array in zip(p.paths, leaf.arrays, strict=True):
    if not np.isfinite(array.read(index)).all():
      raise ValueError(f"leaf '{leaf.name}' of '{path}' is not finite.")
  raise ValueError(
    f"leaf '{leaf.name}' of the result does not fit {leaf.dtype}."
  )
