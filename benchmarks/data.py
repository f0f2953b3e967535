"""Batches of a memory-mapped shard against plain numpy slices of the same map.

  python -m benchmarks.data

The plain way is nanoGPT's: random offsets, one slice per row, no epochs, no
resume, no check of the vocabulary. Rounds alternate, medians are printed. Read
the last column: how many times faster than a model that trains at that rate.
"""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from lm import data, tokens

_TOKENS = 100_000_000
_ROUNDS = 7
# seq_len, batch_size, tokens/s of a training step to compare with
_SHAPES = [(256, 16, 15_000), (1024, 32, 500_000), (1024, 512, 2_000_000)]


def _ours(shard: np.ndarray, t: int, b: int) -> Callable[[int], np.ndarray]:
  windows = data.Windows(tokens.Stream([shard]), t, 50304)
  return data.Batches(windows, b, data.shuffled(len(windows), seed=0)).batch


def _plain(shard: np.ndarray, t: int, b: int) -> Callable[[int], np.ndarray]:
  def batch(step: int) -> np.ndarray:
    starts = np.random.default_rng(step).integers(0, shard.size - t, b)
    return np.stack([shard[s : s + t + 1].astype(np.int32) for s in starts])

  return batch


def _rate(batch: Callable[[int], np.ndarray], steps: range, size: int) -> float:
  """Returns tokens per second."""
  start = time.perf_counter()
  for step in steps:
    batch(step)
  return len(steps) * size / (time.perf_counter() - start)


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'tokens.bin'
    rng = np.random.default_rng(0)
    rng.integers(0, 50304, _TOKENS, dtype=np.uint16).tofile(path)
    shard = tokens.open_shard(str(path)).tokens
    print('seq_len batch   ours Mtok/s  numpy Mtok/s  ratio  ours / model')
    for t, b, model in _SHAPES:
      ways = [_ours(shard, t, b), _plain(shard, t, b)]
      count = max(4_000_000 // (t * b), 4)
      rates = [
        [_rate(way, range(r * count, r * count + count), t * b) for way in ways]
        for r in range(_ROUNDS + 1)
      ][1:]  # the first round pages the file in
      ours, plain = (statistics.median(r) for r in zip(*rates, strict=True))
      ratio = statistics.median(a / b for a, b in rates)
      print(
        f'{t:7d} {b:5d} {ours / 1e6:13.1f} {plain / 1e6:13.1f} {ratio:6.2f} '
        f'{ours / model:8.0f} x {model:,} tokens/s'
      )


if __name__ == '__main__':
  main()
