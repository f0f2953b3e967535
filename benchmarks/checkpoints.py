r"""What a checkpoint costs: the step's stall, bandwidth, and size on disk.

  python -m benchmarks.checkpoints [--size=small] [--turns=5]

Turns alternate. `stall` is how long `save` keeps the loop (fingerprints, copy;
Orbax writes in the background), as a share of the steps between two saves of
the run (checkpoint.every_steps). Writing is timed until all is on disk, against
a plain write and fsync of the same bytes; restoring (with verification) against
a plain read of the files. Files are dropped from the page cache before reading.
"""

import os
import pathlib
import shutil
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import flags

from benchmarks import results
from configs import base
from launch import cli
from lm import checkpoint, loop, step

_SIZE = flags.DEFINE_string('size', 'small', 'of configs/sizes.py')
_TURNS = flags.DEFINE_integer('turns', 5, 'of each measurement')
_BATCH = flags.DEFINE_integer('batch_size', 0, '0: that of the size')
_EVERY = flags.DEFINE_integer('every_steps', 100, 'between two saves of a run')


def timed(function):
  begin = time.perf_counter()
  out = function()
  return time.perf_counter() - begin, out


def drop(files: list[pathlib.Path]) -> None:
  """Removes files from the page cache, so that reading them reads a disk."""
  os.sync()
  for path in files:
    with path.open('rb') as f:
      os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[pathlib.Path]) -> int:
  return sum(len(path.read_bytes()) for path in files)


def write(path: pathlib.Path, leaves: list[np.ndarray]) -> None:
  with path.open('wb') as f:
    for x in leaves:
      f.write(memoryview(x).cast('B'))
    f.flush()
    os.fsync(f.fileno())


def turn(folder, n, built, state, take):
  """One measurement of everything; returns the state and the seconds."""
  run = folder / f'run{n}'
  checkpoints = checkpoint.Checkpoints(run)
  seconds = {}
  seconds['step'], state = timed(lambda: jax.block_until_ready(take(state)))
  begin = time.perf_counter()
  checkpoints.save(state, n, {'step': n, 'mean_start': n})
  seconds['stall'] = time.perf_counter() - begin
  kept = jax.device_get(state)
  checkpoints.wait()
  seconds['save'] = time.perf_counter() - begin
  checkpoints.close()
  files = [p for p in run.rglob('*') if p.is_file()]
  drop(files)
  seconds['plain read'], size = timed(lambda: read(files))
  drop(files)
  seconds['restore'], again = timed(
    lambda: jax.block_until_ready(checkpoint.restore(run, n, built.abstract))
  )
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), kept)
  leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(kept)]
  leaves = [x for x in leaves if x.ndim]
  plain = folder / 'plain'
  seconds['plain write'], _ = timed(lambda: write(plain, leaves))
  seconds['raw'], seconds['disk'] = sum(x.nbytes for x in leaves), size
  shutil.rmtree(run)
  return state, seconds


@results.entry('checkpoints')
def main() -> None:
  config = base.get_config(f'size={_SIZE.value}')
  config.update({'batch_size': _BATCH.value or config.batch_size})
  built = loop.build(config)
  state, traced = built.init(), step.floats(config)
  tokens = built.data.train.batch(0)
  take = lambda s: built.train_step(s, tokens, traced)[0]
  state = jax.block_until_ready(take(state))
  turns = []
  with tempfile.TemporaryDirectory() as folder:
    for n in range(_TURNS.value + 1):
      state, seconds = turn(pathlib.Path(folder), n, built, state, take)
      turns.append(seconds)
  del turns[0]  # compiles the fingerprints
  middle = lambda f: statistics.median(f(t) for t in turns)
  raw = turns[0]['raw']
  every = _EVERY.value
  print(f'{_SIZE.value}: {raw / 1e6:,.0f} MB of arrays, {len(turns)} turns')
  stall = middle(lambda t: t['stall'])
  share = middle(lambda t: t['stall'] / t['step'])
  print(
    f'stall of a save: {stall:.2f} s, {share:.2f} of a step; '
    f'{share / every:.2%} of the steps at one save in {every}'
  )
  for ours, plain in (('save', 'plain write'), ('restore', 'plain read')):
    rate = middle(lambda t, k=ours: raw / t[k] / 1e6)
    ratio = middle(lambda t, a=ours, b=plain: t[b] / t[a])
    print(f'{ours}: {rate:,.0f} MB/s, {ratio:.2f} of a {plain}')
  disk = middle(lambda t: t['disk'] / t['raw'])
  print(f'size on disk: {disk:.2f} of the bytes of the arrays')


if __name__ == '__main__':
  cli.run(main)
