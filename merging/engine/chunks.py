"""Arrays that are read from the files of a store without TensorStore.

TensorStore reads a whole chunk into memory of its own and copies it from there.
A chunk that is not compressed is a range of a file: read in parts, it stays in
the processor's cache. `ts.ocdbt.dump` tells the ranges.
"""

import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import tensorstore as ts

from merging.engine import files

_LOCATION = re.compile(r'value:([^:]*):([^:]*):(\d+):(\d+)')


class Place(NamedTuple):
  """A range of a file, in bytes."""

  path: pathlib.Path
  start: int
  size: int


Values = Mapping[str, Place | bytes]  # short ones are kept with their keys


def values(path: pathlib.Path) -> dict[str, Place | bytes]:
  """Returns {key: where its value is, or the value} of an OCDBT store."""
  base = ts.KvStore.open({'driver': 'file', 'path': f'{path}/'}).result()
  versions = ts.ocdbt.dump(base).result()['versions']
  root = versions[-1]['root'].get('location') if versions else None
  file = functools.cache(lambda *names: path.joinpath(*map(unquote, names)))
  found = {}
  for key, entry in _entries(base, root) if root else ():
    value = entry.get('inline_value')
    if parts := _LOCATION.fullmatch(entry.get('indirect_value', '')):
      value = Place(file(*parts.groups()[:2]), int(parts[3]), int(parts[4]))
    found[key.decode()] = value
  return found


def of_files(path: pathlib.Path) -> dict[str, Place | bytes]:
  """Returns the same of a store that is plain files."""
  return {
    p.relative_to(path).as_posix(): Place(p, 0, p.stat().st_size)
    for p in path.rglob('*')
    if p.is_file()
  }


def _entries(base, location, prefix=b'') -> Iterator[tuple[bytes, Any]]:
  node = ts.ocdbt.dump(base, location).result()
  for entry in node['entries']:
    if node['height']:
      below = prefix + entry['subtree_common_prefix']
      yield from _entries(base, entry['location'], below)
    else:
      yield prefix + entry['key'], entry


class Plain(NamedTuple):
  """An array of zarr 2 whose chunks are as numpy has them in memory."""

  shape: tuple[int, ...]
  dtype: ts.dtype
  chunk: tuple[int, ...]
  places: dict[tuple[int, ...], Place]  # by the number of the chunk

  def place(self, index: tuple[slice, ...]) -> tuple[pathlib.Path, int] | None:
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

  def lost(self) -> str | None:
    """Returns the first chunk that has no place of its size."""
    grid = _grid(self.shape, self.chunk)
    return next((f'chunk {at}' for at in grid if at not in self.places), None)


def plain(stored: Values, name: str) -> Plain | None:
  """Returns the array of that name, or None if it is not of this kind."""
  text = stored.get(f'{name}/.zarray')
  if isinstance(text, Place):
    text = files.read(text.path, text.start, text.size, np.uint8).tobytes()
  try:
    meta = json.loads(text or '{}')
    kind = _kind(meta.get('dtype'))
    coded = meta.get('compressor') or meta.get('filters')
    if kind is None or coded or meta.get('order') != 'C':
      return None
    shape, chunk = tuple(meta['shape']), tuple(meta['chunks'])
    separator = str(meta.get('dimension_separator', '.'))
    if len(shape) != len(chunk) or not all(n > 0 for n in chunk):
      return None
  except (ValueError, KeyError, TypeError, AttributeError):
    return None  # TensorStore says what is wrong
  size, places = math.prod(chunk) * kind.numpy_dtype.itemsize, {}
  for at in _grid(shape, chunk):
    place = stored.get(f'{name}/{separator.join(map(str, at)) or 0}')
    if isinstance(place, Place) and place.size == size:
      places[at] = place
  return Plain(shape, kind, chunk, places)


def _grid(shape, chunk):
  counts = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
  return np.ndindex(*counts)


def about(
  shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]
) -> dict[str, Any]:
  """Returns the content of `.zarray` of such an array."""
  kind = ts.dtype(dtype).numpy_dtype
  return {
    'zarr_format': 2,
    'shape': list(shape),
    'chunks': list(chunk),
    'dtype': dtype if kind.kind == 'V' else kind.str,  # 'bfloat16', '<f4'
    'compressor': None,
    'filters': None,
    'fill_value': None,
    'order': 'C',
    'dimension_separator': '.',
  }


def _kind(dtype):
  """Returns the type of '<f4', 'bfloat16', ...; None of other byte orders."""
  if dtype == 'bfloat16':
    return ts.bfloat16
  legal = isinstance(dtype, str) and re.fullmatch('<[fiu][248]', dtype)
  return ts.dtype(np.dtype(dtype)) if legal else None
