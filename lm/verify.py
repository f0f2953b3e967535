"""Verifies checkpoints that are read block by block, as a merge does."""

import functools
import math
import pathlib
import threading
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from lm import checkpoint, log

_PART = 1 << 17  # elements at a time: as many as a merge reads


class Verifier:
  """Adds up fingerprints of blocks; `check` compares them at the end.

  An instance is called with (item directory, leaf, slices, array) per block,
  with None in place of the directory for the result. One slice is of the leaf
  as a flat array, and so is its block.
  The fingerprint is a sum over elements, so blocks may come in any order, and
  from any thread.
  """

  def __init__(
    self,
    shapes: dict[str, tuple[int, ...]],
    unknown: Collection[pathlib.Path] = (),
  ) -> None:
    self._shapes, self._unknown = shapes, unknown  # those are not compared
    self._marks = functools.cache(checkpoint.marks)
    self._sums: dict[tuple[pathlib.Path | None, str], int] = {}
    self._lock = threading.Lock()

  def __call__(
    self,
    item: pathlib.Path | None,
    leaf: str,
    index: tuple[slice, ...],
    block: np.ndarray,
  ) -> None:
    if item in self._unknown:
      return
    shape = self._shapes[leaf]
    shape = (math.prod(shape),) if len(index) == 1 else shape
    mark = block_fingerprint(block, index, shape)
    with self._lock:
      old = self._sums.get((item, leaf), 0)
      self._sums[item, leaf] = (old + mark) & 0xFFFFFFFF

  def save(self, path: pathlib.Path) -> None:
    """Writes what this process has seen of the blocks."""
    rows = [[i and str(i), leaf, x] for (i, leaf), x in self._sums.items()]
    log.write_json(path, {'sums': rows})

  def load(self, path: pathlib.Path) -> None:
    """Adds what another process has seen."""
    for item, leaf, mark in log.read_json(path)['sums']:
      key = item and pathlib.Path(item), leaf
      self._sums[key] = (self._sums.get(key, 0) + mark) & 0xFFFFFFFF

  def check(self) -> None:
    """Raises: Damaged: what was read is not what was saved."""
    for (item, leaf), mark in self._sums.items():
      if item is None:
        continue
      run, step = item.parents[2], item.parent.name
      what = f'Checkpoint {run}@{step}' if step.isdecimal() else f"'{item}'"
      if (marks := self._marks(item)) is None:
        raise checkpoint.Damaged(f'{what} has no fingerprints.')
      if marks.get(_keystr(leaf)) != mark:
        raise checkpoint.Damaged(
          f'{what} is damaged: {item.name} {leaf} is not what was saved.'
        )

  def result(self) -> dict[str, int]:
    """Returns the fingerprint of each leaf that was written."""
    return {
      _keystr(leaf): mark
      for (item, leaf), mark in self._sums.items()
      if item is None
    }


def block_fingerprint(
  block: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]
) -> int:
  """Returns a block's share of the whole leaf's `fingerprint.of`."""
  if block.size <= _PART:
    return _fingerprint(block, index, shape)
  # By halves, so that what it needs besides is small and stays in the cache.
  axis = next(i for i, n in enumerate(block.shape) if n > 1)
  half, whole = block.shape[axis] // 2, index[axis]
  middle, total = whole.start + half, 0
  for part, piece in zip(
    np.split(block, [half], axis),
    (slice(whole.start, middle), slice(middle, whole.stop)),
    strict=True,
  ):
    place = (*index[:axis], piece, *index[axis + 1 :])
    total += block_fingerprint(part, place, shape)
  return total & 0xFFFFFFFF


def _fingerprint(block, index, shape):
  """As in `fingerprint.of`, with as few passes over the block as possible."""
  unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[block.dtype.itemsize]
  bits = np.ascontiguousarray(block).view(unsigned)
  mixed = bits >> np.uint32(15)
  mixed ^= bits
  mixed *= _places(tuple((s.start, s.stop) for s in index), shape)
  return int(np.sum(mixed, dtype=np.uint32)) * 2246822519 & 0xFFFFFFFF


@functools.lru_cache(8)  # the sources of a merge are read in the same parts
def _places(index, shape):
  """Returns the multiplier of each element of a part."""
  place, stride = np.zeros((), np.uint32), 2654435761
  for axis in reversed(range(len(index))):
    start, stop = index[axis]
    along = np.arange(stop - start, dtype=np.uint32)
    along *= np.uint32(stride & 0xFFFFFFFF)
    along += np.uint32(start * stride & 0xFFFFFFFF)
    along = along.reshape(-1, *[1] * (len(index) - 1 - axis))
    place = along + place if place.ndim else along
    stride *= shape[axis]
  place |= np.uint32(1)
  return place


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns {'block_0.attn.q': shape} of a tree of arrays or shapes."""
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x.shape
    for path, x in flat
  }


def _keystr(leaf: str) -> str:
  return ''.join(f"['{key}']" for key in leaf.split('.'))
