"""Parts of arrays that lie in files as in memory: C order, little-endian."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np


def first(shape: Sequence[int], index: Sequence[slice]) -> int | None:
  """Returns the first element of a part of an array of `shape`.

  None if the part reaches beyond the array or is not one range of it.
  """
  found, stride, whole = 0, 1, True
  for s, n in zip(reversed(index), reversed(shape), strict=True):
    extent = s.stop - s.start
    if s.stop > n or not (whole or extent == 1):
      return None
    whole = whole and extent == n
    found += s.start * stride
    stride *= n
  return found


def read(
  path: pathlib.Path, start: int, shape: Sequence[int], dtype: np.dtype
) -> np.ndarray:
  """Returns the array that begins at byte `start`; errors as of `fill`."""
  out = np.empty(shape, dtype)
  with path.open('rb', buffering=0) as f:
    fill(memoryview(out.reshape(-1).view(np.uint8)), f.fileno(), start)
  return out


def flush(folder: pathlib.Path) -> None:
  """Waits until what is below a folder is on disk; OSError if it fails."""
  for path in (folder, *folder.rglob('*')):
    try:
      descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
      continue  # another process renamed or removed it
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def fill(view: memoryview, file: int, start: int) -> None:
  """Reads bytes of an open file, from byte `start` on.

  Raises:
    ValueError: the file ends before it.
    OSError: it cannot be read.
  """
  while len(view):
    n = os.preadv(file, [view], start)
    if not n:
      raise ValueError(f'its file ends at byte {start}, too early')
    view, start = view[n:], start + n
