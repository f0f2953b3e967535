"""Reads and writes a directory in the layout of Hugging Face."""

import importlib
import json
import pathlib
from typing import Any

import numpy as np

from lm import log, tokens
from lm.errors import UserError

_SINGLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'


def safetensors() -> Any:
  """Returns `safetensors.numpy`; it is an optional requirement."""
  try:
    return importlib.import_module('safetensors.numpy')
  except ImportError as e:
    raise UserError(
      'This needs the package safetensors: pip install safetensors.'
    ) from e


def write(
  folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
  """Writes config.json and model.safetensors."""
  log.write_json(folder / 'config.json', config)
  # transformers refuses files without this note.
  note = {'format': 'pt'}
  safetensors().save_file(tensors, folder / _SINGLE, metadata=note)


def read(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns config.json and all tensors, of one file or of several."""
  if not (folder / 'config.json').is_file():
    raise UserError(
      f"'{folder}' is no directory with config.json and {_SINGLE}."
    )
  config = log.read_json(folder / 'config.json')
  files = [folder / _SINGLE]
  if (folder / _INDEX).is_file():
    found = log.read_json(folder / _INDEX).get('weight_map')
    names = [*found.values()] if isinstance(found, dict) else [None]
    if not all(isinstance(name, str) for name in names):
      raise UserError(f"the weight_map of '{folder / _INDEX}' names no files.")
    files = [folder / pathlib.Path(name).name for name in sorted(set(names))]
  library, tensors = safetensors(), {}
  for file in files:
    if not file.is_file():
      raise UserError(f"'{folder}' has no {file.name}.")
    try:
      tensors.update(library.load_file(file))
    except Exception as e:  # the library's own classes
      raise UserError(f"'{file}' cannot be read: {e}.") from e
  return config, tensors


def write_byte_tokenizer(folder: pathlib.Path, max_tokens: int) -> None:
  """Writes tokenizer files for which token i is byte i, for AutoTokenizer.

  A byte-level BPE without merges. It has no special tokens: the text of one
  would no longer be bytes.
  """
  model = {
    'type': 'BPE',
    'dropout': None,
    'unk_token': None,
    'continuing_subword_prefix': None,
    'end_of_word_suffix': None,
    'fuse_unk': False,
    'byte_fallback': False,
    'ignore_merges': False,
    'vocab': _byte_vocabulary(),
    'merges': [],
  }
  bytes_only = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': False,
    'use_regex': False,
  }
  tokenizer = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [],
    'normalizer': None,
    'pre_tokenizer': bytes_only,
    'post_processor': None,
    'decoder': bytes_only,
    'model': model,
  }
  _write_tokenizer(folder, tokenizer, {}, max_tokens)


def copy_tokenizer(
  folder: pathlib.Path, path: str, max_tokens: int, vocab_size: int
) -> None:
  """Writes the tokenizer files of a tokenizer.json, for AutoTokenizer.

  Raises:
    UserError: it cannot be read, or has a token that the model has not.
  """
  found = log.read_json(pathlib.Path(path))
  try:
    added = {x['content']: x['id'] for x in found['added_tokens']}
    largest = max([*found['model']['vocab'].values(), *added.values()])
  except (KeyError, TypeError, AttributeError, ValueError) as e:
    raise UserError(
      f"--tokenizer='{path}' is no tokenizer.json with a vocabulary."
    ) from e
  if largest >= vocab_size:
    raise UserError(
      f"--tokenizer='{path}' has the token {largest}; the model has "
      f'{vocab_size} tokens.'
    )
  end = {'eos_token': tokens.END} if tokens.END in added else {}
  _write_tokenizer(folder, found, end, max_tokens)


def _write_tokenizer(folder, tokenizer, special, max_tokens):
  about = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': max_tokens,
    'clean_up_tokenization_spaces': False,
    **special,
  }
  for name, value in (
    ('tokenizer.json', tokenizer),
    ('tokenizer_config.json', about),
  ):
    text = json.dumps(value, indent=2, ensure_ascii=False) + '\n'
    (folder / name).write_text(text, encoding='utf-8')


def has_byte_tokenizer(folder: pathlib.Path) -> bool:
  """Returns whether the tokenizer there is that of `write_byte_tokenizer`."""
  path = folder / 'tokenizer.json'
  if not path.is_file():
    return False
  model = log.read_json(path).get('model')
  return isinstance(model, dict) and model.get('vocab') == _byte_vocabulary()


def _byte_vocabulary() -> dict[str, int]:
  return {c: i for i, c in enumerate(byte_characters())}


def byte_characters() -> list[str]:
  """Returns the character that stands for each byte in byte-level BPE.

  As in GPT-2: printable characters of Latin-1 stand for themselves, the other
  68 bytes are the characters from U+0100 on.
  """
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return [chr(b if b in printable else next(others)) for b in range(256)]
