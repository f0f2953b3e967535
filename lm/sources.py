"""Where the tokens come from: `config.data.source` names a function below.

Byte sources (`python_source`, `text`) are read into memory, a NUL byte between
two documents; `bin` shards are memory mapped.
"""

import glob
import hashlib
import itertools
import os
import pathlib
import sysconfig
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lm import tokens
from lm.errors import UserError, did_you_mean

_EVAL_SHARE = 0.05  # of the files or of the tokens, where we make the split
MIN_FILES = 20  # fewer are split inside the stream, not file by file
_LEFT_OUT = {
  # Tests are no code to learn from: some are broken on purpose.
  'test',
  'tests',
  'idle_test',
  # Differ from machine to machine.
  'site-packages',
  'dist-packages',
  '__pycache__',
  # Generated. The tables of the encodings are near copies of each other: with
  # them, 20 % of the validation windows (256 bytes) are also in the training
  # set, without them 1 %. pydoc_data is the manual in one file of .75 MB, which
  # would be most of the validation set.
  'encodings',
  'pydoc_data',
}


class Corpus(NamedTuple):
  """train, evaluation: no token is in both. unit: 'B' or ' tokens'.

  bytes_per_token: of the validation files; None when unknown.
  """

  train: tokens.Stream
  evaluation: tokens.Stream
  num_files: int
  unit: str
  bytes_per_token: float | None


def load(config: ConfigDict) -> Corpus:
  """Opens the corpus that `config.data` names.

  Raises:
    UserError: an unknown source, or files that cannot be used.
  """
  c = config.data
  if c.source not in _SOURCES:
    raise UserError(
      f"data.source='{c.source}' does not exist."
      + did_you_mean(c.source, _SOURCES)
    )
  if is_bytes(config) and config.model.vocab_size < 256:
    raise UserError(
      f'model.vocab_size={config.model.vocab_size} is too small for '
      f"data.source='{c.source}': bytes need at least 256."
    )
  return _SOURCES[c.source](config)


def is_bytes(config: ConfigDict) -> bool:
  """Returns whether the tokens of a run are the bytes of its text."""
  return config.data.source != 'bin'


def train_sizes(config: ConfigDict) -> list[tuple[str, int]]:
  """Returns the training files in the order of their tokens, and how many.

  Of bytes with the separator behind each file. Needs data.eval.
  """
  files = _two_globs(config)[0]
  if is_bytes(config):
    return [(f, pathlib.Path(f).stat().st_size + 1) for f in files]
  return [(f, tokens.open_shard(f).tokens.size) for f in files]


def split_by_hash(names: Sequence[str]) -> tuple[list[int], list[int]]:
  """Splits files by the sha256 of their names, about 5 % for validation.

  A file's side depends on its name alone, whatever the other files are. (When
  no name falls on the validation side, the one nearest to it goes there.)

  Returns:
    indices of the training and of the validation files, in the given order.
  """
  hashes = [hashlib.sha256(n.encode()).hexdigest()[:8] for n in names]
  shares = [int(h, 16) / 2**32 for h in hashes]
  limit = max(_EVAL_SHARE, min(shares))
  order = range(len(names))
  train = [i for i in order if shares[i] > limit]
  return train, [i for i in order if shares[i] <= limit]


def _python_source(config: ConfigDict) -> Corpus:
  """The .py files of this Python's standard library; not tests, not packages.

  About 9 to 10 MB in 500 to 600 files. What the build of Python generates
  (`_sysconfigdata*`, `config-*/`) is left out: it holds paths of a machine.
  """
  if config.data.train or config.data.eval:
    raise UserError(
      f"data.train='{config.data.train}', data.eval='{config.data.eval}': "
      "data.source='python_source' takes no files; 'text' and 'bin' do."
    )
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  names = []
  for folder, folders, files in os.walk(root):
    folders[:] = [
      f for f in folders if f not in _LEFT_OUT and not f.startswith('config-')
    ]
    names += [
      (pathlib.Path(folder) / f).relative_to(root).as_posix()
      for f in files
      if f.endswith('.py') and not f.startswith('_sysconfigdata')
    ]
  if len(names) < MIN_FILES:
    raise UserError(
      f"data.source='python_source': '{root}' holds {len(names)} .py files; "
      "this Python comes without its sources. Legal: 'text', 'bin'."
    )
  names.sort()
  documents = [_read(str(root / name)) for name in names]
  full = [i for i in range(len(names)) if documents[i]]
  names, documents = [names[i] for i in full], [documents[i] for i in full]
  return _by_document(names, documents)


def _text(config: ConfigDict) -> Corpus:
  """Any files, as bytes: the globs `data.train` and `data.eval`.

  Without `data.eval`, validation is made of whole files, chosen by the hash of
  their path below the fixed part of the glob, when there are 20 or more; else
  of the last 5 % of the bytes.
  """
  train, evaluation = _two_globs(config)
  documents = [_read(f) for f in train]
  _no_empty(train, documents)
  if evaluation:
    held_out = [_read(f) for f in evaluation]
    _no_empty(evaluation, held_out)
    streams = _join(documents), _join(held_out)
    return Corpus(*streams, len(train) + len(evaluation), 'B', 1.0)
  if len(train) >= MIN_FILES:
    root = fixed_part(config.data.train)
    names = [pathlib.Path(os.path.relpath(f, root)).as_posix() for f in train]
    return _by_document(names, documents)
  return Corpus(*_last_part(_join(documents)), len(train), 'B', 1.0)


def _bin(config: ConfigDict) -> Corpus:
  """Token shards, memory mapped: the globs `data.train` and `data.eval`.

  Without `data.eval`, the last 5 % of the tokens are the validation set.
  """
  train, evaluation = _two_globs(config)
  shards = {f: tokens.open_shard(f) for f in train + evaluation}
  for file, shard in shards.items():
    _check_shard(file, shard, config)
  stream = tokens.Stream([shards[f].tokens for f in train])
  if evaluation:
    streams = stream, tokens.Stream([shards[f].tokens for f in evaluation])
  else:
    streams = _last_part(stream)
  held_out = [shards[f] for f in evaluation or train]
  sizes = [s.num_bytes for s in held_out]
  ratio = None
  if None not in sizes:
    ratio = sum(sizes) / sum(s.tokens.size for s in held_out)
  return Corpus(*streams, len(shards), ' tokens', ratio)


_SOURCES = {'python_source': _python_source, 'text': _text, 'bin': _bin}


def _check_shard(file: str, shard: tokens.Shard, config: ConfigDict) -> None:
  need, vocab_size = config.seq_len + 1, config.model.vocab_size
  if shard.tokens.size < need:
    raise UserError(
      f"'{file}' has {shard.tokens.size} tokens; one sequence of "
      f'seq_len={config.seq_len} needs {need}.'
    )
  if shard.vocab_size is not None and shard.vocab_size > vocab_size:
    raise UserError(
      f"'{file}' was made with a vocabulary of {shard.vocab_size}; "
      f'model.vocab_size={vocab_size} is smaller.'
    )


def _two_globs(config: ConfigDict) -> tuple[list[str], list[str]]:
  """Returns the training and validation files; no file may be in both."""
  c = config.data
  if not c.train:
    raise UserError(
      f"data.source='{c.source}' needs files: set data.train to a glob, e.g. "
      "--config.data.train='books/**/*.txt'."
    )
  train = files('data.train', c.train)
  evaluation = files('data.eval', c.eval) if c.eval else []
  real = {os.path.realpath(f) for f in train}
  shared = [f for f in evaluation if os.path.realpath(f) in real]
  if shared:
    raise UserError(
      f"data.train='{c.train}' and data.eval='{c.eval}' share {len(shared)} "
      f"files, e.g. '{shared[0]}'; validation files must not be trained on."
    )
  return train, evaluation


def files(knob: str, pattern: str) -> list[str]:
  """Returns the files of a glob, sorted; `**` stands for any folders."""
  try:
    pattern = str(pathlib.Path(pattern).expanduser())
  except RuntimeError as e:
    raise UserError(f"{knob}='{pattern}' cannot be resolved: {e}") from e
  found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 any root
  kept = [f for f in found if not pathlib.Path(f).is_dir()]
  if found and not kept:
    raise UserError(
      f"{knob}='{pattern}' matches only directories; for all files below one "
      f"write '{found[0].rstrip('/')}/**/*'."
    )
  if not kept:
    raise UserError(
      f"{knob}='{pattern}' matches no file, seen from '{pathlib.Path.cwd()}'."
    )
  return kept


def fixed_part(pattern: str) -> str:
  """Returns the folder in front of the first wildcard of a glob."""
  parts = pathlib.Path(pattern).expanduser().parts[:-1]
  fixed = itertools.takewhile(lambda p: not glob.has_magic(p), parts)
  return str(pathlib.Path(*fixed))


def _read(file: str) -> bytes:
  try:
    return pathlib.Path(file).read_bytes()
  except OSError as e:
    raise UserError(f"'{file}' cannot be read: {e.strerror}.") from e


def _no_empty(files: list[str], documents: list[bytes]) -> None:
  empty = [f for f, d in zip(files, documents, strict=True) if not d]
  if empty:
    raise UserError(
      f"{len(empty)} of {len(files)} files are empty, e.g. '{empty[0]}'; "
      'remove them or narrow the glob.'
    )


def _join(documents: list[bytes]) -> tokens.Stream:
  return tokens.Stream([np.frombuffer(b'\0'.join(documents), np.uint8)])


def _by_document(names: list[str], documents: list[bytes]) -> Corpus:
  streams = [_join([documents[i] for i in s]) for s in split_by_hash(names)]
  return Corpus(*streams, len(names), 'B', 1.0)


def kept(size: int) -> int:
  """Returns how many tokens at the end of `size` are the validation set."""
  return int(size * _EVAL_SHARE)


def _last_part(stream: tokens.Stream) -> tuple[tokens.Stream, tokens.Stream]:
  cut = len(stream) - kept(len(stream))
  return stream.part(0, cut), stream.part(cut, len(stream))
