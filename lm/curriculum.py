"""Training sequences in the order of a score: worst first, or best first.

Between data.order_begin and data.order_end the run sees the very sequences
that it would see shuffled, sorted by score; before and after, it is shuffled.
Ties keep their shuffled order. So the batch of a step stays a pure function of
(data, seed, step), for any number of hosts, and nothing has to be stored.
"""

import hashlib
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from lm import sources, tokens
from lm.errors import UserError, did_you_mean

_ORDERS = ('ascend', 'descend')


def compressibility(sequence: np.ndarray) -> float:
  """1 - bytes after / bytes before zlib: high for repetition, low for noise."""
  raw = np.ascontiguousarray(sequence).tobytes()
  return 1 - len(zlib.compress(raw, 1)) / len(raw)


# Functions of one sequence, (seq_len,) tokens as stored; larger is better.
SCORES = {'compressibility': compressibility}


class Sorted:
  """An order of sequences of which one range of positions is sorted.

  chosen, scores: the sequences at those positions, and theirs, as sorted.
  """

  def __init__(self, order: Sequence[int], first: int, chosen: np.ndarray,
               scores: np.ndarray):  # fmt: skip
    by_score = np.argsort(scores, kind='stable')
    self.scores, self.chosen = scores[by_score], chosen[by_score]
    self._order, self._first = order, first

  def __getitem__(self, i: int) -> int:
    if 0 <= i - self._first < len(self.chosen):
      return int(self.chosen[i - self._first])
    return self._order[i]


def apply(
  config: ConfigDict, stream: tokens.Stream, order: Sequence[int]
) -> Sorted:
  """Sorts a part of the shuffled `order`, as the config says.

  Reading 1e6 sequences in shuffled order takes about half a minute at start.

  Args:
    config: of a run with data.order.
    stream: the training tokens.
    order: sequence by position in the run.

  Raises:
    UserError: contradicting knobs, scores that do not fit the data.
  """
  c, t = config.data, config.seq_len
  n = max(len(stream) - 1, 0) // t
  first, last = (s * config.batch_size for s in (c.order_begin, c.order_end))
  if last - first > n:
    raise UserError(
      f'data.order_end={c.order_end}: from step {c.order_begin} the data are '
      f'sorted within one pass of {n} sequences; legal: at most '
      f'{c.order_begin + n // config.batch_size}.'
    )
  chosen = np.array([order[i] for i in range(first, last)], np.int64)
  if c.score == 'file':
    scores = _from_files(config, stream)[chosen]
  else:
    function = SCORES[c.score]
    parts = (stream.read(i * t, i * t + t) for i in chosen.tolist())
    scores = np.array([function(x) for x in parts], np.float32)
  if c.order == 'descend':
    scores = -scores
  return Sorted(order, first, chosen, scores)


def fingerprint(of_tokens: str, order: Sorted) -> str:
  """Returns the fingerprint of tokens and their order: another, another run."""
  both = of_tokens.encode() + order.chosen.tobytes()
  return hashlib.sha256(both).hexdigest()[:16]


def check(config: ConfigDict) -> None:
  """Raises UserError for knobs that contradict each other."""
  c = config.data
  for name, legal in (('order', _ORDERS), ('score', ('file', *SCORES))):
    if c[name] and c[name] not in legal:
      hint = did_you_mean(c[name], legal)
      raise UserError(f"data.{name}='{c[name]}' does not exist.{hint}")
  if c.score and not c.order:
    raise UserError(
      f"data.score='{c.score}' does nothing without data.order; legal: "
      f'{", ".join(_ORDERS)}.'
    )
  if c.order and not c.score:
    raise UserError(
      f"data.order='{c.order}' needs data.score; legal: file, "
      f'{", ".join(SCORES)}.'
    )
  if c.score == 'file' and not c.eval:
    raise UserError(
      "data.score='file' needs files for validation, data.eval: otherwise a "
      'part of the training files would be held out.'
    )
  if not c.order and (c.order_begin or c.order_end):
    raise UserError(
      f'data.order_begin={c.order_begin} and data.order_end={c.order_end} do '
      'nothing without data.order; legal: ascend, descend.'
    )
  if c.order and not 0 <= c.order_begin < c.order_end:
    raise UserError(
      f'data.order_begin={c.order_begin} and data.order_end={c.order_end} are '
      'the steps between which the data are sorted; for the whole run: '
      f'--config.data.order_end={config.num_steps}.'
    )


def _from_files(config: ConfigDict, stream: tokens.Stream) -> np.ndarray:
  """Returns the mean score of the tokens of each sequence, float32 (n,)."""
  rows = [_scores_of(f, size) for f, size in sources.train_sizes(config)]
  size_K, score_K = np.concatenate(rows).T
  # Means over tokens from the integral of the score, linear within documents.
  ends = np.concatenate([[0], np.cumsum(size_K)])
  integral = np.concatenate([[0], np.cumsum(size_K * score_K)])
  t = config.seq_len
  edges = np.arange(max(len(stream) - 1, 0) // t + 1) * t
  # As float32: what rounding adds to equal scores would decide ties.
  return np.float32(np.diff(np.interp(edges, ends, integral)) / t)


def _scores_of(file: str, size: int) -> np.ndarray:
  """Reads FILE.score.npy: (K, 2), or one number for the whole file."""
  path = pathlib.Path(f'{file}.score.npy')
  try:
    found = np.load(path, allow_pickle=False).astype(np.float64)
  except (OSError, ValueError, TypeError) as e:
    raise UserError(
      f"data.score='file' needs '{path}', an array of numbers: {e}."
    ) from e
  if found.size == 1:
    found = np.array([[size, found.item()]])
  if found.ndim != 2 or found.shape[1] != 2 or not np.isfinite(found).all():
    raise UserError(
      f"'{path}' has the shape {found.shape}; legal: one number, or finite "
      'rows (tokens of a document, its score).'
    )
  wrong = found[(found[:, 0] < 0) | (found[:, 0] % 1 != 0), 0]
  if wrong.size:
    raise UserError(
      f"'{path}' counts {wrong[0]:g} tokens of a document; legal: 0, 1, 2, ..."
    )
  total = found[:, 0].sum()
  if not 0 <= size - total <= 1:
    raise UserError(f"'{path}' scores {total:.0f} tokens; '{file}' has {size}.")
  found[-1, 0] += size - total  # the separator after a file of bytes
  return found
