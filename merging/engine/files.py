"""Parts of arrays that lie in files as in memory: C order, little-endian."""

import io
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
    fill(out, f, start)
  return out


def fill(out: np.ndarray, file: io.FileIO, start: int) -> None:
  """Reads a contiguous array, from byte `start` of a file on.

  Raises:
    ValueError: the file ends before it.
    OSError: it cannot be read.
  """
  view = memoryview(out.reshape(-1).view(np.uint8))
  while len(view):
    n = os.preadv(file.fileno(), [view], start)
    if not n:
      raise ValueError(f"'{file.name}' ends too early")
    view, start = view[n:], start + n
