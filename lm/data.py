"""The batch of a step: a pure function of (data, seed, step).

  files -> one stream of tokens -> windows of seq_len + 1 tokens, stride seq_len
  -> order of the windows, reshuffled each epoch (grain) -> rows of the batch

Windows overlap by one token: the last target of one is the first input of the
next. Row r of step s is element s * batch_size + r of the order, so any host
computes its own rows, resume needs no iterator state, and nothing is lost or
repeated when the number of hosts changes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lm import curriculum, sources, tokens
from lm.errors import UserError

_MAX_WINDOWS = 2**32  # grain shuffles 32-bit indices


class Data(NamedTuple):
  """What a run reads.

  train: batches by step.
  eval_tokens_ES: int32 (eval.num_sequences, seq_len + 1), the fixed validation
    set: windows evenly spaced over the validation stream.
  bytes_per_token: of the validation files; None when unknown (shards without
    a sidecar).
  fingerprint: 16 hex digits of the sha256 of the corpus and its split.
  summary: one line, printed at the start.
  """

  train: 'Batches'
  eval_tokens_ES: np.ndarray
  bytes_per_token: float | None
  fingerprint: str
  summary: str


class Windows:
  """Sequences of a token stream: window i is tokens[i * T : i * T + T + 1]."""

  def __init__(self, stream: tokens.Stream, seq_len: int, vocab_size: int):
    self._stream = stream
    self.seq_len = seq_len
    self._vocab_size = vocab_size

  def __len__(self) -> int:
    return max(len(self._stream) - 1, 0) // self.seq_len

  def read(self, indices: Sequence[int]) -> np.ndarray:
    """Returns int32 (len(indices), seq_len + 1).

    Raises:
      UserError: a token is outside the vocabulary. Checked on every read, for
        shards too large to be scanned beforehand.
    """
    t = self.seq_len
    out_BS = np.empty((len(indices), t + 1), np.int32)
    for row, i in zip(out_BS, indices, strict=True):
      row[:] = self._stream.read(i * t, i * t + t + 1)
    # As unsigned, a uint32 token that wrapped to a negative int32 is large.
    largest = int(out_BS.view(np.uint32).max()) if out_BS.size else 0
    _check_token(largest, self._vocab_size)
    return out_BS


class Batches:
  """Random access to the training batches of a run."""

  def __init__(self, windows: Windows, batch_size: int, order: Sequence[int]):
    self._windows = windows
    self.shape = (batch_size, windows.seq_len + 1)
    self._order = order

  def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
    """Returns rows of the global batch at `step`, int32 (rows, seq_len + 1).

    Args:
      step: number of the update, from 0; any step in any order.
      rows: of the global batch.
    """
    first, size = int(step) * self.shape[0], self.shape[0]
    wanted = [first + row for row in range(*rows.indices(size))]
    return self._windows.read([self._order[i] for i in wanted])


def shuffled(n: int, seed: int) -> Sequence[int]:
  """Returns `n` windows in random order, then in another one, for ever."""
  import grain  # 0.1-1 s: not at the import of this module, for fast --help

  order = grain.MapDataset.range(n).seed(seed)
  # Twice: one shuffle of grain is a cipher of 4 rounds, visibly regular at
  # some sizes. At 65,536 windows the mean window index of 16 rows then
  # spreads 4 times less than at random, which makes gradients less noisy.
  return order.shuffle().shuffle().repeat()


def build(config: ConfigDict) -> Data:
  """Opens the data of a run and checks it before anything compiles.

  Uses seed, seq_len, batch_size, data.*, eval.num_sequences, model.vocab_size.

  Raises:
    UserError: with the offending value, for whatever makes the data unusable.
  """
  t, vocab_size = config.seq_len, config.model.vocab_size
  for knob in ('seq_len', 'batch_size'):
    if config[knob] < 1:
      raise UserError(f'{knob}={config[knob]} must be at least 1.')
  if config.seed < 0:
    raise UserError(f'seed={config.seed} must not be negative.')
  curriculum.check(config)
  corpus = sources.load(config)
  parts = (corpus.train, corpus.evaluation)
  if sum(p.nbytes for p in parts) <= tokens.WHOLE:
    for part in parts:
      if len(part) and not part.fits(vocab_size):
        _check_token(part.max(), vocab_size)
  train, evaluation = (Windows(p, t, vocab_size) for p in parts)
  if not len(train):
    raise UserError(
      f'the training data has {len(corpus.train)} tokens; one sequence of '
      f'seq_len={t} needs {t + 1}.'
    )
  if len(train) > _MAX_WINDOWS:
    raise UserError(
      f'the training data has {len(train)} sequences of seq_len={t}; legal: '
      f'at most {_MAX_WINDOWS}.'
    )
  eval_tokens_ES = _validation(evaluation, config.eval.num_sequences, t)
  fingerprint = tokens.fingerprint(parts)
  order = shuffled(len(train), config.seed)
  if config.data.order:
    order = curriculum.apply(config, corpus.train, order)
    fingerprint = curriculum.fingerprint(fingerprint, order)
  sizes = [f'{len(p) / 1e6:.1f} M{corpus.unit}' for p in parts]
  return Data(
    Batches(train, config.batch_size, order),
    eval_tokens_ES,
    corpus.bytes_per_token,
    fingerprint,
    f'{config.data.source}: {corpus.num_files} files, {sizes[0]} train, '
    f'{sizes[1]} eval, sha256 {fingerprint}',
  )


def second_validation(config: ConfigDict) -> np.ndarray:
  """Returns validation windows that `Data.eval_tokens_ES` leaves out.

  As many, evenly spaced over the rest, to choose by: what was chosen is then
  reported on tokens that it was not chosen by. int32 (E, seq_len + 1).

  Raises:
    UserError: the validation data has not enough windows for two sets.
  """
  part = sources.load(config).evaluation
  windows = Windows(part, config.seq_len, config.model.vocab_size)
  n, wanted = len(windows), config.eval.num_sequences
  used = {i * n // wanted for i in range(wanted)}
  rest = [i for i in range(n) if i not in used]
  if len(rest) < wanted:
    raise UserError(
      f'a second validation set needs {2 * wanted} sequences, twice '
      f'eval.num_sequences, but the validation data has {n}.'
    )
  return windows.read([rest[i * len(rest) // wanted] for i in range(wanted)])


def _validation(windows: Windows, num_sequences: int, t: int) -> np.ndarray:
  """Reads `num_sequences` windows, evenly spaced: no seed, no batch size."""
  n = len(windows)
  if not 1 <= num_sequences <= n:
    raise UserError(
      f'eval.num_sequences={num_sequences}, but the validation data has {n} '
      f'sequences of seq_len={t}; legal: 1 to that number.'
    )
  return windows.read([i * n // num_sequences for i in range(num_sequences)])


def _check_token(token: int, vocab_size: int) -> None:
  if token >= vocab_size:
    raise UserError(
      f'the data has a token {token}, outside model.vocab_size={vocab_size}; '
      f'legal: 0 to {vocab_size - 1}.'
    )
