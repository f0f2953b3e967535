"""Batches of a memory-mapped shard against plain numpy slices of the same map.

  python -m benchmarks.data

The plain way is nanoGPT's: random offsets, one slice per row, no epochs, no
resume, no check of the vocabulary. `random` reads our batches of the same steps
in random order, as a ratio to consecutive steps. Rounds alternate, medians are
printed. The last column: how many times faster than a model that trains at that
rate.
"""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import results
from launch import cli
from lm import data, tokens

_TOKENS = 100_000_000
_ROUNDS = 7
Batch = Callable[[int], np.ndarray]
# seq_len, batch_size, tokens/s of a training step to compare with
_SHAPES = [(256, 16, 15_000), (1024, 32, 500_000), (1024, 512, 2_000_000)]


def _ours(shard: np.ndarray, t: int, b: int) -> Batch:
  windows = data.Windows(tokens.Stream([shard]), t, 50304)
  return data.Batches(windows, b, data.shuffled(len(windows), seed=0)).batch


def _plain(shard: np.ndarray, t: int, b: int) -> Batch:
  def batch(step: int) -> np.ndarray:
    starts = np.random.default_rng(step).integers(0, shard.size - t, b)
    return np.stack([shard[s : s + t + 1].astype(np.int32) for s in starts])

  return batch


def _rate(batch: Batch, steps: Sequence[int], size: int) -> float:
  """Returns tokens per second."""
  start = time.perf_counter()
  for step in steps:
    batch(step)
  return len(steps) * size / (time.perf_counter() - start)


@results.entry('batches of a memory-mapped shard')
def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'tokens.bin'
    rng = np.random.default_rng(0)
    rng.integers(0, 50304, _TOKENS, dtype=np.uint16).tofile(path)
    shard = tokens.open_shard(str(path)).tokens
    print(
      'seq_len batch   ours Mtok/s  numpy Mtok/s  ratio  random  ours / model'
    )
    for t, b, model in _SHAPES:
      ours, plain = _ours(shard, t, b), _plain(shard, t, b)
      count = max(4_000_000 // (t * b), 4)
      mixed = rng.permutation((_ROUNDS + 1) * count).tolist()
      turns = []
      for first in range(0, len(mixed), count):
        steps = range(first, first + count)
        ways = (ours, steps), (plain, steps), (ours, mixed[first:][:count])
        turns.append([_rate(way, s, t * b) for way, s in ways])
      del turns[0]  # it pages the file in
      rate, numpy, _ = map(statistics.median, zip(*turns, strict=True))
      ratio = statistics.median(a / b for a, b, _ in turns)
      random = statistics.median(c / a for a, _, c in turns)
      print(
        f'{t:7d} {b:5d} {rate / 1e6:13.1f} {numpy / 1e6:13.1f} {ratio:6.2f} '
        f'{random:7.2f} {rate / model:8.0f} x {model:,} tokens/s'
      )


if __name__ == '__main__':
  cli.run(main)
