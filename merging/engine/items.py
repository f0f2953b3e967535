"""Arrays of an Orbax item directory, opened one by one without a device.

An item is what Orbax writes for one tree, by whatever program: `_METADATA`
names the leaves, the arrays are zarr (version 2 or 3), in one OCDBT store or
in plain files. The result is zarr 2 in plain files, not compressed.
"""

import ast
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from merging.engine import chunks, hashing, plain

# No cache and little concurrency: memory is what the caller reads.
_CONTEXT = {
  'cache_pool': {'total_bytes_limit': 0},
  'file_io_concurrency': {'limit': 4},
  'data_copy_concurrency': {'limit': 2},
}
_CHUNK = 16 << 20  # bytes of a chunk of the result: later merges stream it
FLOATS = ('float32', 'bfloat16', 'float16', 'float64')
# The items of a run have the same keys; to parse all took 5 % of a merge.
_path = functools.lru_cache(1 << 16)(lambda key: tuple(ast.literal_eval(key)))
Index = tuple[slice, ...]
Place = tuple[pathlib.Path, int]


def context() -> ts.Context:
  """Returns limits shared by the arrays of one merge."""
  return ts.Context(_CONTEXT)


def metadata(path: pathlib.Path) -> dict[str, Any]:
  """Returns the parsed `_METADATA` of an item.

  Raises:
    ValueError: `path` is not a readable item.
  """
  try:
    found = json.loads((path / '_METADATA').read_text())
    for key, value in found['tree_metadata'].items():
      _path(key)
      value['value_metadata']['skip_deserialize']
  except (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    SyntaxError,
  ) as e:
    raise ValueError(
      f"'{path}' is not an Orbax item: its _METADATA cannot be read ({e})."
    ) from e
  return found


def leaves(
  meta: Mapping[str, Any], tree: tuple[str, ...] = ()
) -> dict[str, tuple[str, ...]]:
  """Returns {name of the array: its key path} below `tree`, in their order."""
  paths = (
    _path(key)
    for key, value in meta['tree_metadata'].items()
    if not value['value_metadata']['skip_deserialize']
  )
  return {'.'.join(p): p for p in paths if p[: len(tree)] == tree}


class Array(NamedTuple):
  """One leaf of one checkpoint.

  chunk: shape of what is stored together.
  read: returns the array of some slices.
  place: returns (file, first byte) of their elements, if they lie there one
    after another as numpy has them in memory; else None.
  unpack: returns the same array with a `read` that needs no whole chunk, if it
    must through a file without a name in a folder; None if it cannot be.
  """

  shape: tuple[int, ...]
  dtype: ts.dtype
  chunk: tuple[int, ...]
  read: Callable[[Index], np.ndarray]
  place: Callable[[Index], Place | None]
  unpack: Callable[[pathlib.Path | None], plain.Plain] | None = None


class Item:
  """An Orbax item, or the part of it below `tree`.

  Raises:
    ValueError: `path` is not a readable item, or has nothing below `tree`.
  """

  def __init__(self, path: pathlib.Path, tree: str = '') -> None:
    self.path = path
    self._meta = metadata(path)
    self._tree = tuple(tree.split('.')) if tree else ()
    self.leaves = leaves(self._meta, self._tree)
    if not self.leaves:
      top = sorted({p[0] for p in leaves(self._meta).values()})
      raise ValueError(
        f"'{path}' has no leaf below '{tree}'; its tree begins with: "
        f'{", ".join(top) or "nothing"}.'
      )

  def open(self, name: str, limits: ts.Context) -> Array:
    if name in self._texts:
      raise ValueError('it is text, not an array')
    layout = chunks.layout(self._values, name)
    found = layout and layout.plain()
    whole = functools.cache(
      lambda: open_leaf(self.path, self._meta, name, limits)
    )
    if found and not found.lost():
      array, chunk, place = found, found.chunk, found.place
    else:
      array, place = whole(), lambda index: None
      chunk = array.chunk_layout.read_chunk.shape or ()

    def read(index):
      if place(index):
        return found.read(index)
      return whole()[index].read().result()  # for several chunks faster

    unpack = None
    if array is found:
      unpack = lambda folder: found
    elif layout and layout.codec == 'zstd' and layout.complete:
      unpack = functools.partial(plain.unpack, layout.array, layout.stored)
    chunk = tuple(
      max(min(c, n), 1) for c, n in zip(chunk, array.shape, strict=True)
    )
    return Array(array.shape, array.dtype, chunk, read, place, unpack)

  @functools.cached_property
  def _texts(self):
    """Names of the leaves that are strings, which have no array."""
    return {
      '.'.join(_path(key))
      for key, value in self._meta['tree_metadata'].items()
      if value['value_metadata'].get('value_type') == 'string'
    }

  def lost(self, name: str) -> str | None:
    """Returns a chunk that is no file, or a cut one, where chunks are files."""
    if self._meta.get('use_ocdbt'):
      return None
    layout = chunks.layout(self._values, name)
    found = layout and layout.plain()
    return found.lost() if found else None

  @functools.cached_property
  def _values(self):
    if self._meta.get('use_ocdbt'):
      return chunks.values(self.path)
    return chunks.of_files(self.path)

  @functools.cached_property
  def named_by(self) -> list[pathlib.Path]:
    """Returns the files whose bytes name the content, without all of it.

    They are the tree and the manifest, which names every block of data by a
    random number; without a manifest, all files.
    """
    manifest = self.path / 'manifest.ocdbt'
    found = [manifest] if manifest.is_file() else hashing.below(self.path)
    return sorted({self.path / '_METADATA', *found})

  def digest(self, sha: Callable[[pathlib.Path], str] = hashing.sha256) -> str:
    """Returns the SHA-256 of `named_by`: of their names and of theirs."""
    both = hashlib.sha256()
    for path in self.named_by:
      both.update(f'{path.relative_to(self.path)}\0'.encode())
      both.update(bytes.fromhex(sha(path)))
    return both.hexdigest()

  def writer(
    self, out: pathlib.Path, dtype: str | None, part: tuple[int, int]
  ) -> 'Writer':
    del dtype  # is in each array
    return Writer(self, out, part)

  def write_metadata(self, out: pathlib.Path) -> None:
    write_metadata(out, self._meta, self._tree)


class Writer:
  """Writes one process's part of an item; `finish` completes it.

  A chunk of the result is a file: processes need no word of each other, and
  nothing is copied on the way. Through TensorStore a merge took twice as long.
  """

  def __init__(self, like, out, part):
    self._like, self._out, self._part = like, out, part
    self._chunks: dict[str, tuple[int, ...]] = {}

  def create(
    self,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    chunk: tuple[int, ...],
  ) -> None:
    if name.startswith('/') or '..' in name.split('/'):
      raise ValueError('its name would be a place outside the result')
    kind = ts.dtype(dtype).numpy_dtype
    part = chunks.split(chunk, _CHUNK // kind.itemsize)
    # Parts of a block: they tile it, or it is the last along its axis.
    self._chunks[name] = tuple(
      p if c % p == 0 or c == n else c
      for p, c, n in zip(part, chunk, shape, strict=True)
    )
    (self._out / name).mkdir(parents=True, exist_ok=True)
    if self._part[0] == 0:
      about = chunks.about(shape, dtype, self._chunks[name])
      (self._out / name / '.zarray').write_text(json.dumps(about))

  def write(self, name: str, index: tuple[slice, ...], block: Any) -> None:
    """Writes a part that begins at a chunk and cuts none."""
    chunk = self._chunks[name]
    first = [s.start // n for s, n in zip(index, chunk, strict=True)]
    counts = [-(-n // c) for n, c in zip(block.shape, chunk, strict=True)]
    for at in np.ndindex(*counts):
      data = block[
        tuple(slice(i * n, i * n + n) for i, n in zip(at, chunk, strict=True))
      ]
      if data.shape != chunk:  # at the end of the array: a chunk is whole
        data = np.pad(
          data, [(0, n - m) for n, m in zip(chunk, data.shape, strict=True)]
        )
      number = (str(i + j) for i, j in zip(first, at, strict=True))
      path = self._out / name / ('.'.join(number) or '0')
      path.write_bytes(np.ascontiguousarray(data).reshape(-1).view(np.uint8))

  def finish(self) -> None:
    """Called once, when all processes have written their parts."""
    self._like.write_metadata(self._out)


def open_leaf(
  path: pathlib.Path, meta: Mapping[str, Any], name: str, limits: ts.Context
) -> ts.TensorStore:
  """Opens one array for reading; chunks that are missing are an error."""
  spec = {
    'driver': 'zarr3' if meta.get('use_zarr3') else 'zarr',
    'kvstore': _store(path, name, bool(meta.get('use_ocdbt'))),
    # Orbax may leave out chunks of zeros only where it says so.
    'fill_missing_data_reads': not meta.get(
      'store_array_data_equal_to_fill_value', False
    ),
  }
  return ts.open(spec, open=True, context=limits).result()


def write_metadata(
  path: pathlib.Path, like: Mapping[str, Any], tree: tuple[str, ...] = ()
) -> None:
  """Writes `_METADATA` with the tree of another item, or the part below `tree`.

  The type is numpy's: jax.Array would tie the item to the devices that wrote
  it. A restore with abstract arrays gives jax.Array on any devices.
  """
  found = {}
  for key, node in like['tree_metadata'].items():
    if _path(key)[: len(tree)] != tree:
      continue
    value = dict(node['value_metadata'])
    if not value['skip_deserialize']:
      value['value_type'] = 'np.ndarray'
      value.pop('write_shape', None)
    found[key] = {**node, 'value_metadata': value}
  content = {
    'tree_metadata': found,
    'use_ocdbt': False,
    'use_zarr3': False,
    'store_array_data_equal_to_fill_value': True,
    'custom_metadata': None,
  }
  (path / '_METADATA').write_text(json.dumps(content))


def _store(path, name, use_ocdbt):
  # Orbax writes a trailing slash: a scalar array has the same form.
  if not use_ocdbt:
    return {'driver': 'file', 'path': f'{path / name}/'}
  base = {'driver': 'file', 'path': f'{path}/'}
  return {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
