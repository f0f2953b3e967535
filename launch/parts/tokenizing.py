"""Text files -> shards of tokens (not a command)."""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import sources
from lm.errors import UserError
from lm.tokens import END

_PIECE = 1 << 20  # characters that are encoded at once
_BATCH = 64  # pieces


class Document(NamedTuple):
  """name: file, and number in it; the same document has the same name."""

  name: str
  text: str


def documents(paths: Sequence[str]) -> Iterator[Document]:
  """Yields a document per file; of .jsonl files, the text of each line."""
  for path in map(pathlib.Path, paths):
    try:
      if path.suffix != '.jsonl':
        yield Document(str(path), path.read_bytes().decode())
        continue
      with path.open('rb') as f:
        for n, line in enumerate(f):
          yield Document(f'{path}:{n}', _text(json.loads(line)))
    except UnicodeDecodeError as e:
      raise UserError(f"'{path}' is not UTF-8: {e}.") from e
    except (
      json.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError
    ) as e:  # fmt: skip
      raise UserError(
        f"'{path}', line {n + 1}: not a JSON object with a text: {e}."
      ) from e
    except OSError as e:
      raise UserError(f"'{path}' cannot be read: {e.strerror}.") from e


def _text(found):
  if not isinstance(found['text'], str):
    raise TypeError(f'text={found["text"]!r:.40}')
  found['text'].encode()  # half of a pair of surrogates is no text
  return found['text']


def held_out(pattern: str, paths: Sequence[str]) -> set[str]:
  """Returns the names of the documents for validation, as lm/sources.py does.

  None of less than 20 documents.
  """
  root = sources.fixed_part(pattern)
  names = [document.name for document in documents(paths)]
  if len(names) < sources.MIN_FILES:
    return set()
  inside = [pathlib.Path(os.path.relpath(n, root)).as_posix() for n in names]
  return {names[i] for i in sources.split_by_hash(inside)[1]}


def load(path: str) -> Any:
  """Loads a tokenizer.json of the library `tokenizers`."""
  library = _library()
  if not pathlib.Path(path).is_file():
    raise UserError(f"--tokenizer='{path}' does not exist.")
  try:
    return library.Tokenizer.from_file(path)
  except Exception as e:  # what it raises is an Exception itself
    raise UserError(f"--tokenizer='{path}' is no tokenizer.json: {e}.") from e


def train(texts: Iterator[str], vocab_size: int) -> Any:
  """Trains byte-pair encoding on bytes (Radford et al. 2019, section 2.2)."""
  library = _library()
  found = library.Tokenizer(library.models.BPE())
  byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.pre_tokenizer = byte_level
  found.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END],
    initial_alphabet=byte_level.alphabet(),
    show_progress=False,
  )
  pieces = (piece for text in texts for piece in _pieces(text))
  found.train_from_iterator(pieces, trainer)
  return found


def vocab_size(tokenizer: Any) -> int:
  """Returns the largest token and 1; numbers may be left out."""
  return max(tokenizer.get_vocab().values()) + 1


class Shard:
  """A shard that is being written: PATH and PATH.json, both at the end."""

  def __init__(self, path: pathlib.Path, tokenizer: Any) -> None:
    self.path, self.tokenizer = path, tokenizer
    self.vocab_size = vocab_size(tokenizer)
    self.dtype = 'uint16' if self.vocab_size <= 1 << 16 else 'uint32'
    self.tokens = self.bytes = self.documents = 0
    self._end = tokenizer.token_to_id(END)
    self._waiting: list[tuple[str, bool]] = []  # pieces, and whether it ends
    self._file = self._temporary.open('wb')

  @property
  def _temporary(self):
    return self.path.with_name(f'{self.path.name}.tmp')

  def add(self, text: str) -> None:
    pieces = _pieces(text)
    self._waiting += [(p, i + 1 == len(pieces)) for i, p in enumerate(pieces)]
    self.documents += 1
    self.bytes += len(text.encode())
    if len(self._waiting) >= _BATCH:
      self._flush()

  def close(self) -> None:
    self._flush()
    self._file.close()
    about = {'dtype': self.dtype, 'vocab_size': self.vocab_size,
             'bytes': self.bytes}  # fmt: skip
    pathlib.Path(f'{self.path}.json').write_text(json.dumps(about) + '\n')
    self._temporary.replace(self.path)

  def _flush(self):
    texts = [text for text, _ in self._waiting]
    encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
    for found, (_, ends) in zip(encoded, self._waiting, strict=True):
      end = [self._end] if ends and self._end is not None else []
      tokens = np.array(found.ids + end, self.dtype)
      tokens.astype(tokens.dtype.newbyteorder('<')).tofile(self._file)
      self.tokens += tokens.size
    self._waiting = []


def write(
  paths: Sequence[str], out: pathlib.Path, tokenizer: Any, held: set[str]
) -> list[Shard]:
  """Writes train.bin, and eval.bin if documents are held out."""
  shards = [Shard(out / 'train.bin', tokenizer)]
  if held:
    shards.append(Shard(out / 'eval.bin', tokenizer))
  for document in documents(paths):
    shards[document.name in held].add(document.text)
  for shard in shards:
    shard.close()
  return shards


def _pieces(text):
  """Cuts long texts at ends of lines, so that memory stays bounded."""
  pieces, start = [], 0
  while len(text) - start > _PIECE:
    end = text.rfind('\n', start, start + _PIECE) + 1
    end = end if end > start else start + _PIECE
    pieces.append(text[start:end])
    start = end
  return [*pieces, text[start:]]


def check_installed() -> None:
  """Raises UserError, before anything is read, without `tokenizers`."""
  _library()


def _library():
  try:
    import tokenizers
  except ImportError as e:
    raise UserError('This needs: pip install tokenizers.') from e
  return tokenizers
