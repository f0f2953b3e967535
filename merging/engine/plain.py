"""Arrays that lie in files as numpy has them in memory.

A chunk that is not compressed is a range of a file and read in any parts. One
that is, and does not fit in memory, becomes such a range by `unpack`.
"""

import functools
import io
import itertools
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts
import zstandard

from merging.engine import files

_PIECE = 1 << 20  # bytes decoded at a time
_HEADER = 18  # the most bytes that the header of a zstd frame has
Number = tuple[int, ...]  # of a chunk, along each axis
Index = tuple[slice, ...]


class Place(NamedTuple):
  """A range of a file, in bytes."""

  path: pathlib.Path
  start: int
  size: int


class Plain(NamedTuple):
  """An array whose chunks are ranges of files."""

  shape: tuple[int, ...]
  dtype: ts.dtype
  chunk: tuple[int, ...]
  places: Mapping[Number, Place]
  file: io.FileIO | None = None  # without a name: gone when it is closed

  def place(self, index: Index) -> tuple[pathlib.Path, int] | None:
    """Returns (file, first byte) of a part; None if it is no range of one."""
    at = tuple(s.start // n for s, n in zip(index, self.chunk, strict=True))
    inside = [
      slice(s.start - i * n, s.stop - i * n)
      for s, i, n in zip(index, at, self.chunk, strict=True)
    ]
    found, first = self.places.get(at), files.first(self.chunk, inside)
    if found is None or first is None:
      return None
    return found.path, found.start + first * self.dtype.numpy_dtype.itemsize

  def read(self, index: Index) -> np.ndarray:
    """Returns a part of an array that has lost no chunk.

    Errors are those of `files.fill`.
    """
    shape = [s.stop - s.start for s in index]
    if found := self.place(index):
      return files.read(*found, shape, self.dtype.numpy_dtype)
    out = np.empty(shape, self.dtype.numpy_dtype)
    # Cut where a chunk ends; what lies in one chunk, into rows.
    both = zip(index, self.chunk, strict=True)
    cut = (s.start // n < (s.stop - 1) // n for s, n in both)
    axis = next((a for a, c in enumerate(cut) if c), None)
    step = 1 if axis is None else self.chunk[axis]
    if axis is None:
      axis = next(a for a, n in enumerate(shape) if n > 1)
    start, stop = index[axis].start, index[axis].stop
    for a in range(start - start % step, stop, step):
      part = slice(max(a, start), min(a + step, stop))
      rows = slice(part.start - start, part.stop - start)
      out[(*[slice(None)] * axis, rows)] = self.read(
        (*index[:axis], part, *index[axis + 1 :])
      )
    return out

  def lost(self) -> str | None:
    """Returns the first chunk that has no place of its size."""
    missing = (at for at in self.numbers() if at not in self.places)
    return next((f'chunk {at}' for at in missing), None)

  def numbers(self) -> Sequence[Number]:
    """Returns the numbers of all chunks, in C order."""
    return _numbers(self.shape, self.chunk)

  @property
  def chunk_bytes(self) -> int:
    return math.prod(self.chunk) * self.dtype.numpy_dtype.itemsize


@functools.lru_cache(8)  # the sources of a merge have the same arrays
def _numbers(shape, chunk):
  both = zip(shape, chunk, strict=True)
  return [*itertools.product(*(range(-(-n // c)) for n, c in both))]


def unpack(
  like: Plain,
  stored: Mapping[Number, Place | bytes],
  folder: pathlib.Path | None,
) -> Plain:
  """Decodes the zstd chunks of an array into a file in `folder`.

  It takes little memory, however large they are, and as much disk as the array.

  Args:
    like: the array, without places.
    stored: all of its encoded chunks.
    folder: None is the system's for temporary files.

  Raises:
    ValueError: a chunk that is damaged or has another size.
    OSError: a chunk cannot be read, or the file not written.
  """
  folder = folder or pathlib.Path(tempfile.gettempdir())
  file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
  places = {}
  path = pathlib.Path(f'/dev/fd/{file.fileno()}')
  for at in like.numbers():
    places[at] = Place(path, file.tell(), like.chunk_bytes)
    try:
      _decode(stored[at], file, like.chunk_bytes, folder)
    except (ValueError, zstandard.ZstdError) as e:
      raise ValueError(f'chunk {at} is damaged ({e})') from e
  return like._replace(places=places, file=file)


def _decode(stored, file, size, folder):
  inline = isinstance(stored, bytes)
  with io.BytesIO(stored) if inline else stored.path.open('rb') as source:
    start = 0 if inline else stored.start
    source.seek(start)
    done = zstandard.frame_content_size(source.read(_HEADER))
    if done != size:
      raise ValueError(f'it says that it has {done} bytes, not {size}')
    source.seek(start)
    reader = zstandard.ZstdDecompressor().stream_reader(source)
    done = 0
    while done < size and (piece := reader.read(min(size - done, _PIECE))):
      done += len(piece)
      view = memoryview(piece)
      while view:  # a file may take less than it is given
        try:
          view = view[file.write(view) :]
        except OSError as e:
          raise OSError(e.errno, e.strerror, str(folder)) from e
  if done != size:
    raise ValueError(f'it has {done} bytes, not {size}')
