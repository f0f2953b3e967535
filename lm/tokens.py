"""Tokens on disk or in memory, read as one stream: shards, content hash.

A shard is a file of little-endian tokens: raw (nanoGPT's `.bin`, uint16) or
behind the header of llm.c. `<file>.json` beside it may say {"dtype": "uint32",
"vocab_size": 50257, "bytes": 4711}, bytes = length of the text it encodes.
"""

import bisect
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.errors import UserError

END = '<|endoftext|>'  # stands behind every document, if the tokenizer has it

_DTYPES = {'uint8': '<u1', 'uint16': '<u2', 'uint32': '<u4'}
_SIDECAR = {'dtype': None, 'vocab_size': None, 'bytes': None}
# llm.c, dev/data/data_common.py: magic -> (version, dtype of the tokens).
_LLMC = {20240520: (1, 'uint16'), 20240801: (7, 'uint32')}
_LLMC_HEADER = 256  # int32 values: magic, version, number of tokens, zeros
_CHUNK = 1 << 20  # tokens per piece of a scan
WHOLE = 1 << 30  # bytes of a corpus up to which all of it is hashed and checked


class Stream:
  """Arrays of tokens in a row, addressed as one; nothing is copied."""

  def __init__(self, arrays: Sequence[np.ndarray]):
    self._arrays = [a for a in arrays if a.size]
    self._ends = np.cumsum([0] + [a.size for a in self._arrays]).tolist()[1:]
    self.nbytes = sum(a.nbytes for a in self._arrays)

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yields views of the arrays that hold the tokens [start, stop)."""
    i = bisect.bisect_right(self._ends, start)
    while start < stop:
      array, end = self._arrays[i], self._ends[i]
      begin = end - array.size
      yield array[start - begin : stop - begin]
      start, i = end, i + 1

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns the tokens [start, stop): a view, or a copy across arrays."""
    pieces = list(self.pieces(start, stop))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

  def part(self, start: int, stop: int) -> 'Stream':
    """Returns the stream of the tokens [start, stop)."""
    return Stream(list(self.pieces(start, stop)))

  def max(self) -> int:
    """Returns the largest token; reads all of them, a piece at a time."""
    starts = range(0, len(self), _CHUNK)
    ends = (min(s + _CHUNK, len(self)) for s in starts)
    return max(
      int(piece.max())
      for start, end in zip(starts, ends, strict=True)
      for piece in self.pieces(start, end)
    )

  def fits(self, vocab_size: int) -> bool:
    """Whether the dtype alone keeps every token below `vocab_size`."""
    return all(np.iinfo(a.dtype).max < vocab_size for a in self._arrays)


def fingerprint(streams: Sequence[Stream]) -> str:
  """Returns the first 16 hex digits of the sha256 of the streams' content.

  It depends on the tokens and on which stream they are in, not on paths or on
  how a stream is cut into files. Above 1 GiB in all, it is the hash of each
  stream's length and of 256 samples of 64 KiB, evenly spaced: a change between
  two samples that keeps the length is then not seen.
  """
  digest = hashlib.sha256()
  whole = sum(s.nbytes for s in streams) <= WHOLE
  for stream in streams:
    n = len(stream)
    digest.update(f'{n} {stream.nbytes};'.encode())
    starts, size = range(0, n, _CHUNK), _CHUNK
    if not whole:
      size = 1 << 14
      starts = [max(n - size, 0) * i // 255 for i in range(256)]
    for start in starts:
      for piece in stream.pieces(start, min(start + size, n)):
        digest.update(np.ascontiguousarray(piece).view(np.uint8))
  return digest.hexdigest()[:16]


class Shard(NamedTuple):
  """tokens: 1-D, memory mapped. vocab_size, num_bytes: None when unknown."""

  tokens: np.ndarray
  vocab_size: int | None
  num_bytes: int | None


def open_shard(path: str) -> Shard:
  """Maps one token file into memory.

  Raises:
    UserError: the file is unreadable, empty, truncated or of an odd size, or
      its header or sidecar makes no sense.
  """
  sidecar = _sidecar(path)
  try:
    size = pathlib.Path(path).stat().st_size
    header = np.fromfile(path, '<i4', _LLMC_HEADER)
  except OSError as e:
    raise UserError(f"'{path}' cannot be read: {e.strerror}.") from e
  if not size:
    raise UserError(f"'{path}' is empty; a shard holds tokens.")
  if header.size and int(header[0]) in _LLMC:
    dtype, offset = _llmc(path, header, size), 4 * _LLMC_HEADER
    if sidecar['dtype'] not in (None, dtype):
      raise UserError(
        f"'{path}.json': dtype '{sidecar['dtype']}' contradicts the header "
        f"of the shard, which says '{dtype}'."
      )
  else:
    dtype, offset = sidecar['dtype'] or 'uint16', 0
    itemsize = np.dtype(dtype).itemsize
    if size % itemsize:
      raise UserError(
        f"'{path}' has {size} bytes, no multiple of {itemsize}: it is not a "
        f'shard of {dtype} tokens; another dtype is given in {path}.json.'
      )
  tokens = np.memmap(path, _DTYPES[dtype], 'r', offset).view(np.ndarray)
  return Shard(tokens, sidecar['vocab_size'], sidecar['bytes'])


def _llmc(path: str, header: np.ndarray, size: int) -> str:
  """Checks a header of llm.c; returns the dtype of the tokens behind it."""
  version, dtype = _LLMC[int(header[0])]
  if header.size < _LLMC_HEADER:
    raise UserError(f"'{path}' ends inside its llm.c header: it is truncated.")
  if header[1] != version:
    raise UserError(
      f"'{path}' has llm.c version {header[1]}; legal for magic {header[0]}: "
      f'{version}.'
    )
  expected = 4 * _LLMC_HEADER + int(header[2]) * np.dtype(dtype).itemsize
  if size != expected:
    raise UserError(
      f"'{path}' has {size} bytes, but its llm.c header promises {header[2]} "
      f'tokens, {expected} bytes: it is truncated or damaged.'
    )
  return dtype


def _sidecar(path: str) -> dict[str, Any]:
  """Reads `<path>.json`; all values are None when there is none."""
  file = pathlib.Path(f'{path}.json')
  if not file.exists():
    return _SIDECAR
  try:
    found = {**_SIDECAR, **json.loads(file.read_text())}
  except (OSError, TypeError, ValueError) as e:
    raise UserError(f"'{file}' is not a readable JSON object: {e}.") from e
  if found['dtype'] not in (None, *_DTYPES):
    raise UserError(
      f"'{file}': dtype {found['dtype']!r} is not a dtype of tokens; legal: "
      f'{", ".join(_DTYPES)}.'
    )
  for key in ('vocab_size', 'bytes'):
    value = found[key]
    if value is not None and (type(value) is not int or value < 1):
      raise UserError(f"'{file}': {key}={value!r} must be an integer >= 1.")
  return found
