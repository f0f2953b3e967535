"""Arrays that are read from the files of a store without TensorStore.

TensorStore reads a whole chunk into memory of its own and copies it from there.
Here is where each chunk is stored, as `ts.ocdbt.dump` tells, for `plain.Plain`.
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
from merging.engine.plain import Number, Place, Plain

_json = functools.lru_cache(1 << 10)(json.loads)  # many arrays are alike
_LOCATION = re.compile(r'value:([^:]*):([^:]*):(\d+):(\d+)')


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


class Layout(NamedTuple):
  """An array in C order, little-endian, and where its chunks are stored."""

  array: Plain  # without places
  stored: dict[Number, Place | bytes]
  codec: str | None  # of a chunk

  @property
  def complete(self) -> bool:
    """Whether no chunk is lost, or left out as zeros: TensorStore knows."""
    return len(self.stored) == len(self.array.numbers())

  def plain(self) -> Plain | None:
    """Returns the array, or None if its chunks are encoded."""
    if self.codec:
      return None
    right = lambda p: isinstance(p, Place) and p.size == self.array.chunk_bytes
    places = {at: place for at, place in self.stored.items() if right(place)}
    return self.array._replace(places=places)


def layout(stored: Values, name: str) -> Layout | None:
  """Returns the array of that name, or None if it is not of this kind."""
  for file, parse in (('.zarray', _zarr2), ('zarr.json', _zarr3)):
    text = stored.get(f'{name}/{file}')
    try:
      if text is not None:
        return parse(stored, name, _json(_read(text)))
    except (ValueError, KeyError, TypeError, AttributeError):
      return None  # TensorStore says what is wrong
  return None


def _read(value):
  if not isinstance(value, Place):
    return value
  return files.read(value.path, value.start, value.size, np.uint8).tobytes()


def _zarr2(stored, name, meta):
  kind = _kind(meta['dtype'])
  if kind is None or meta.get('filters') or meta.get('order') != 'C':
    return None
  separator = str(meta.get('dimension_separator', '.'))
  key = lambda at: f'{name}/{separator.join(map(str, at)) or 0}'
  codec = (meta.get('compressor') or {}).get('id')
  return _layout(stored, (meta['shape'], kind, meta['chunks']), key, codec)


def _zarr3(stored, name, meta):
  """Reads what Orbax writes: shards of one chunk, which they begin with."""
  chunk = meta['chunk_grid']['configuration']['chunk_shape']
  (shard,) = meta['codecs']
  first, codec = shard['configuration']['codecs']
  if (
    shard['name'] != 'sharding_indexed'
    or shard['configuration']['chunk_shape'] != chunk
    or shard['configuration'].get('index_location', 'end') != 'end'
    or first != {'name': 'bytes', 'configuration': {'endian': 'little'}}
    or meta['chunk_key_encoding'] != {'name': 'default'}
  ):
    return None
  kind = ts.dtype(meta['data_type'])
  key = lambda at: '/'.join((name, 'c', *map(str, at)))
  return _layout(stored, (meta['shape'], kind, chunk), key, codec['name'])


def _layout(stored, array, key, codec):
  shape, kind, chunk = array
  if len(shape) != len(chunk) or not all(n > 0 for n in chunk):
    return None
  array = Plain(tuple(shape), kind, tuple(chunk), {})
  keys = {at: key(at) for at in array.numbers()}
  found = {at: stored[k] for at, k in keys.items() if k in stored}
  return Layout(array, found, codec)


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


def split(chunk: tuple[int, ...], most: int) -> tuple[int, ...]:
  """Returns a part of a chunk that is one range of it: `most` elements or less.

  Parts of that size tile the chunk, unless none of over half of `most` do.
  """
  chunk = list(chunk)
  for axis, n in enumerate(chunk):
    room = max(most // math.prod(chunk[axis + 1 :]), 1)
    if n > room:
      even = (d for d in range(room, room // 2, -1) if n % d == 0)
      chunk[axis] = next(even, room)
  return tuple(chunk)


def grow(
  chunk: tuple[int, ...], shape: tuple[int, ...], room: int
) -> list[int]:
  """Returns a multiple of `chunk`, at most `room` of them, in C order."""
  block = list(chunk)
  for axis in reversed(range(len(block))):
    wanted = -(-shape[axis] // block[axis])
    factor = max(min(wanted, room), 1)
    block[axis] *= factor
    room //= factor
    if factor < wanted:
      break
  return [max(min(b, n), 1) for b, n in zip(block, shape, strict=True)]


@functools.lru_cache(16)
def _kind(dtype):
  """Returns the type of '<f4', 'bfloat16', ...; None of other byte orders."""
  if dtype == 'bfloat16':
    return ts.bfloat16
  legal = isinstance(dtype, str) and re.fullmatch(r'<[fiu][248]|\|[iu]1', dtype)
  return ts.dtype(np.dtype(dtype)) if legal else None
