"""Safetensors folders in the layout of Hugging Face, read without torch.

A file is 8 bytes (little-endian length n), n bytes of JSON that give dtype,
shape and place of each tensor, and the tensors in C order, one after another
(https://github.com/huggingface/safetensors#format). A model is one file, or
several with `model.safetensors.index.json`, whose `weight_map` names them.
"""

import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from merging.engine import files, hashing
from merging.engine.items import FLOATS, Array

_DTYPES = {
  'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
  'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8',
  'U64': 'uint64', 'U32': 'uint32', 'U16': 'uint16', 'U8': 'uint8',
  'BOOL': 'bool',
}  # fmt: skip
_CODES = {v: k for k, v in _DTYPES.items()}
_MAX_HEADER = 100 << 20
_WHOLE = 'model.safetensors'
_INDEX = f'{_WHOLE}.index.json'
# Of the newest source, so that the result is a complete model.
_COMPANIONS = ('*.json', '*.txt', '*.model', '*.jinja')


def found(path: pathlib.Path) -> bool:
  """Returns whether `path` is a safetensors file or a folder that has some."""
  if path.is_file():
    return path.suffix == '.safetensors'
  return any(path.glob('*.safetensors'))


class Folder:
  """A model of one or more safetensors files.

  Raises:
    ValueError: a file that is missing, damaged or of no index, a name that
      occurs twice.
  """

  def __init__(self, path: pathlib.Path) -> None:
    self.path = path
    self.headers = {file: _header(file) for file in _files(path)}
    self._places: dict[str, tuple[pathlib.Path, dict[str, Any]]] = {}
    for file, (_, header) in self.headers.items():
      for name, entry in header.items():
        if name == '__metadata__':
          continue
        if name in self._places:
          other = self._places[name][0].name
          raise ValueError(
            f"leaf '{name}' of '{path}' is both in {other} and in {file.name}."
          )
        self._places[name] = file, entry
    _check_index(path, {k: v[0].name for k, v in self._places.items()})
    self.leaves = {name: (name,) for name in self._places}

  def open(self, name: str, limits: ts.Context) -> Array:
    del limits
    file, entry = self._places[name]
    shape, dtype = tuple(entry['shape']), ts.dtype(_DTYPES[entry['dtype']])
    start = self.headers[file][0] + entry['data_offsets'][0]
    kind = dtype.numpy_dtype

    def place(index):
      first = files.first(shape, index)
      return None if first is None else (file, start + first * kind.itemsize)

    def read(index):
      return files.read(*place(index), [s.stop - s.start for s in index], kind)

    return Array(shape, dtype, (1,) * len(shape), read, place)

  def lost(self, name: str) -> str | None:
    """Returns None: the sizes of the files were checked with their headers."""
    del name

  @functools.cached_property
  def named_by(self) -> list[pathlib.Path]:
    """Returns the files whose bytes name the content: all that have tensors."""
    return list(self.headers)

  def digest(self, sha: Callable[[pathlib.Path], str] = hashing.sha256) -> str:
    """Returns the SHA-256 of the SHA-256s of `named_by`."""
    found = b''.join(bytes.fromhex(sha(path)) for path in self.named_by)
    return hashlib.sha256(found).hexdigest()

  def writer(
    self, out: pathlib.Path, dtype: str | None, part: tuple[int, int]
  ) -> 'Writer':
    del part  # each process makes the same files
    return Writer(self, out, dtype)


class Writer:
  """Writes one process's part of the same files into another folder."""

  def __init__(self, like, out, dtype):
    self._like, self._out, self._dtype = like, out, dtype
    self._places = {}
    for file, (_, header) in like.headers.items():
      text, size, places = _layout(header, dtype)
      path = out / file.name
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
      with os.fdopen(descriptor, 'r+b') as f:
        f.write(text)
        f.truncate(len(text) + size)
      for name, (shape, kind, start) in places.items():
        self._places[name] = path, shape, kind, len(text) + start

  def create(self, name: str, shape: Any, dtype: str, chunk: Any) -> None:
    del name, shape, dtype, chunk  # the header has it all

  def write(self, name: str, index: tuple[slice, ...], block: Any) -> None:
    path, shape, kind, start = self._places[name]
    first = files.first(shape, index)
    data = np.ascontiguousarray(block, kind)
    with path.open('r+b') as f:
      f.seek(start + first * data.itemsize)
      f.write(data.reshape(-1).view(np.uint8))

  def finish(self) -> None:
    """Called once: the index and what else belongs to the model."""
    source = self._like.path
    if source.is_file():
      return
    for pattern in _COMPANIONS:
      for path in source.glob(pattern):
        if path.is_file() and path.name != 'merge.json':
          shutil.copyfile(path, self._out / path.name)
    about = self._out / 'config.json'
    if self._dtype and about.is_file():
      content = json.loads(about.read_text())
      for key in ('dtype', 'torch_dtype'):
        if key in content:
          content[key] = self._dtype
      about.write_text(json.dumps(content, indent=2) + '\n')
    index = self._out / _INDEX
    if index.is_file():
      content = json.loads(index.read_text())
      size = sum(
        math.prod(shape) * kind.itemsize
        for _, shape, kind, _ in self._places.values()
      )
      if isinstance(content.get('metadata'), dict):
        content['metadata']['total_size'] = size
      index.write_text(json.dumps(content, indent=2) + '\n')


def _files(path):
  if path.is_file():
    return [path]
  index = path / _INDEX
  if index.is_file():
    names = sorted(set(_weight_map(index).values()))
    missing = [n for n in names if not (path / n).is_file()]
    if missing:
      raise ValueError(f"'{index}' names {missing[0]}, which does not exist.")
    if (path / _WHOLE).is_file() and _WHOLE not in names:
      raise ValueError(
        f"'{path}' has {_WHOLE} and a {_INDEX} that does not name it: two "
        'models; remove one.'
      )
    return [path / n for n in names]
  files = sorted(path.glob('*.safetensors'))
  if len(files) > 1:
    raise ValueError(
      f"'{path}' has {len(files)} safetensors files and no {_INDEX}; name one."
    )
  return files


def _weight_map(index):
  try:
    found = json.loads(index.read_text())['weight_map']
    legal = all(
      isinstance(v, str) and pathlib.Path(v).name == v for v in found.values()
    )
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"'{index}' has no readable weight_map: {e}.") from e
  if not legal:
    raise ValueError(f"the weight_map of '{index}' names no plain files.")
  return found


def _check_index(path, places):
  index = path / _INDEX
  if not index.is_file():
    return
  named = _weight_map(index)
  for name in sorted({*named, *places}):
    if named.get(name) != places.get(name):
      raise ValueError(
        f"leaf '{name}' of '{path}' is in {places.get(name, 'no file')}, but "
        f'in {named.get(name, "no file")} by its index.'
      )


def _header(path):
  """Returns (place of the data, header), all of it checked."""
  size = path.stat().st_size
  try:
    with path.open('rb') as f:
      n = int.from_bytes(f.read(8), 'little')
      if not 2 <= n <= min(_MAX_HEADER, size - 8):
        raise ValueError(f'a header of {n} bytes in a file of {size}')
      header = json.loads(f.read(n), object_pairs_hook=_no_repeats)
    spans = sorted(
      _check_entry(name, entry)
      for name, entry in header.items()
      if name != '__metadata__'
    )
    end = 0
    for a, b, name in spans:
      if a != end:
        raise ValueError(f"the data of '{name}' begins at {a}, not at {end}")
      end = b
    if 8 + n + end != size:
      raise ValueError(f'{size} bytes, but {8 + n + end} are described')
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(
      f"'{path}' is not a readable safetensors file: {e}."
    ) from e
  return 8 + n, header


def _check_entry(name, entry):
  (a, b), shape = entry['data_offsets'], entry['shape']
  kind = _DTYPES.get(entry['dtype'])
  if kind is None:
    raise ValueError(
      f"leaf '{name}' is {entry['dtype']}; legal: {', '.join(_DTYPES)}"
    )
  if not all(isinstance(n, int) and n >= 0 for n in (a, b, *shape)):
    raise ValueError(f"leaf '{name}' has the shape {shape} at {a} to {b}")
  if b - a != math.prod(shape) * ts.dtype(kind).numpy_dtype.itemsize:
    raise ValueError(f"leaf '{name}' of shape {shape} has {b - a} bytes")
  return a, b, name


def _no_repeats(pairs):
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [k for k, _ in pairs]
    twice = next(k for k in names if names.count(k) > 1)
    raise ValueError(f"leaf '{twice}' is listed twice")
  return found


def _layout(header, dtype):
  """Returns the bytes of a header, the size of the data, and the places."""
  new, places, end = {}, {}, 0
  if '__metadata__' in header:
    new['__metadata__'] = header['__metadata__']
  tensors = {k: v for k, v in header.items() if k != '__metadata__'}
  for name in sorted(tensors, key=lambda k: tensors[k]['data_offsets']):
    entry = tensors[name]
    kind = _DTYPES[entry['dtype']]
    kind = ts.dtype(dtype if dtype and kind in FLOATS else kind)
    start, shape = end, tuple(entry['shape'])
    end += math.prod(shape) * kind.numpy_dtype.itemsize
    places[name] = shape, kind.numpy_dtype, start
    new[name] = {
      'dtype': _CODES[kind.name],
      'shape': list(shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(new, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
  return len(text).to_bytes(8, 'little') + text, end, places
