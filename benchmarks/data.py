"""Batches of a memory-mapped shard against plain numpy slices of the same map.

  python -m benchmarks.data

The plain way is nanoGPT's: random offsets, one slice per row, no epochs, no
resume, no check of the vocabulary. `random` reads our batches of the same steps
in random order, as a ratio to consecutive steps. Rounds alternate in turning
order; medians of ratios within a round, and their ranges. The last columns:
how many times faster than a training step consumes, measured here on batches
that are there already (of the smallest sizes, which consume most), or, for
accelerators, than a rate that is assumed.
"""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks import results
from configs import base
from launch import cli
from lm import data, loop, step, tokens

_TOKENS = 100_000_000
_ROUNDS = 7
Batch = Callable[[int], np.ndarray]
_SIZES = ('debug', 'nano', 'tiny')
# seq_len, batch_size, tokens/s
_ASSUMED = [(1024, 32, 500_000), (1024, 512, 2_000_000)]


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
  for n in steps:
    batch(n)
  return len(steps) * size / (time.perf_counter() - start)


def _consumer(size: str) -> tuple[int, int, Callable[[], float]]:
  """Returns (seq_len, batch_size, what measures tokens/s of its step)."""
  config = base.get_config(f'size={size}')
  built = loop.build(config)
  traced, batch = step.floats(config), built.batch(0)
  with jax.set_mesh(built.mesh):
    state = built.init()

  def rate():
    nonlocal state
    start, count = time.perf_counter(), 0
    with jax.set_mesh(built.mesh):
      while time.perf_counter() < start + 0.5:
        state, metrics = built.train_step(state, batch, traced)
        jax.block_until_ready(metrics)
        count += batch[:, 1:].size
    return count / (time.perf_counter() - start)

  return config.seq_len, config.batch_size, rate


@results.entry('batches of a memory-mapped shard')
def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'tokens.bin'
    rng = np.random.default_rng(0)
    rng.integers(0, 50304, _TOKENS, dtype=np.uint16).tofile(path)
    shard = tokens.open_shard(str(path)).tokens
    print(
      'seq_len batch   ours Mtok/s  numpy Mtok/s  ours / numpy      random'
      '            ours / model'
    )
    measured = [(*_consumer(size), size) for size in _SIZES]
    for t, b, rate in _ASSUMED:
      measured.append((t, b, lambda rate=rate: rate, 'assumed'))
    for t, b, model, name in measured:
      ours, plain = _ours(shard, t, b), _plain(shard, t, b)
      count = max(4_000_000 // (t * b), 4)
      mixed = rng.permutation((_ROUNDS + 1) * count).tolist()
      turns, models = [], []
      for first in range(0, len(mixed), count):
        steps = range(first, first + count)
        ways = (ours, steps), (plain, steps), (ours, mixed[first:][:count])
        turn = len(turns) % 3
        rates = [_rate(*w, t * b) for w in (*ways[turn:], *ways[:turn])]
        turns.append([*rates[3 - turn :], *rates[: 3 - turn]])
        models.append(model())
      del turns[0], models[0]  # they page the file in and compile
      goal = [ours / m for (ours, *_), m in zip(turns, models, strict=True)]
      rate, numpy, _ = map(statistics.median, zip(*turns, strict=True))
      print(
        f'{t:7d} {b:5d} {rate / 1e6:13.1f} {numpy / 1e6:13.1f}  '
        f'{results.spread([a / b for a, b, _ in turns])}  '
        f'{results.spread([c / a for a, _, c in turns])} '
        f'{statistics.median(goal):7.0f} ({min(goal):.0f} .. {max(goal):.0f}) '
        f'x {name}, '
        f'{statistics.median(models):,.0f} tokens/s'
      )


if __name__ == '__main__':
  cli.run(main)
