r"""What a checkpoint costs: the step's stall, bandwidth, and size on disk.

  python -m benchmarks.checkpoints [--size=small] [--turns=5]

Turns alternate. `stall` is how long `save` keeps the loop (fingerprints, copy;
Orbax writes in the background); `cost` is what a save adds to the --beside
steps after it, which share their cores with the writing, until all is on disk.
Writing alone is timed against a plain write and fsync of the same bytes;
restoring (with verification) against a plain read of the files into one small
buffer, both without the page cache. Medians and ranges of the turns.
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
_TURNS = flags.DEFINE_integer('turns', 5, 'of each measurement', 1)
_BATCH = flags.DEFINE_integer('batch_size', 0, '0: that of the size', 0)
_BESIDE = flags.DEFINE_integer('beside', 4, 'steps beside the writing', 1)


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


def read(files: list[pathlib.Path]) -> None:
  buffer = memoryview(bytearray(1 << 20))
  for path in files:
    with path.open('rb', buffering=0) as f:
      while f.readinto(buffer):
        pass


def write(path: pathlib.Path, leaves: list[np.ndarray]) -> None:
  with path.open('wb') as f:
    for x in leaves:
      f.write(memoryview(x).cast('B'))
    f.flush()
    os.fsync(f.fileno())


def turn(folder, n, built, state, take):
  """One measurement of everything; returns the state and the seconds."""
  seconds = {}

  def steps():
    nonlocal state
    for _ in range(_BESIDE.value):
      state = jax.block_until_ready(take(state))

  def save(name):
    checkpoints = checkpoint.Checkpoints(folder / f'{name}{n}')
    begin = time.perf_counter()
    checkpoints.save(state, n, {'step': n, 'mean_start': n})
    return checkpoints, time.perf_counter() - begin

  def beside():
    checkpoints, _ = save('beside')
    steps()
    checkpoints.wait()
    checkpoints.close()

  both = [('steps', steps), ('with save', beside)]
  for name, what in both if n % 2 else reversed(both):
    seconds[name], _ = timed(what)
  seconds['step'] = seconds['steps'] / _BESIDE.value
  seconds['cost'] = seconds['with save'] - seconds['steps']
  shutil.rmtree(folder / f'beside{n}')
  kept = jax.device_get(state)
  begin = time.perf_counter()
  checkpoints, seconds['stall'] = save('run')
  checkpoints.wait()
  seconds['save'] = time.perf_counter() - begin
  checkpoints.close()
  run = folder / f'run{n}'
  files = [p for p in run.rglob('*') if p.is_file()]
  restore = lambda: checkpoint.restore(run, n, built.abstract)
  both = [('plain read', lambda: read(files)), ('restore', restore)]
  for name, what in both if n % 2 else reversed(both):
    drop(files)
    seconds[name], again = timed(lambda: jax.block_until_ready(what()))  # noqa: B023
    if again:
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), kept)
  leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(kept)]
  leaves = [x for x in leaves if x.ndim]
  plain = folder / 'plain'
  seconds['plain write'], _ = timed(lambda: write(plain, leaves))
  seconds['raw'] = sum(x.nbytes for x in leaves)
  seconds['disk'] = sum(p.stat().st_size for p in files)
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
  raw = turns[0]['raw']
  print(f'{_SIZE.value}: {raw / 1e6:,.0f} MB of arrays, {len(turns)} turns')
  print(f'a step: {results.spread([t["step"] for t in turns])} s')
  for what in ('stall', 'cost'):
    share = results.spread([t[what] / t['step'] for t in turns])
    print(
      f'{what}: {results.spread([t[what] for t in turns])} s, {share} of a step'
    )
  for ours, plain in (('save', 'plain write'), ('restore', 'plain read')):
    rate = statistics.median(raw / t[ours] / 1e6 for t in turns)
    ratio = results.spread([t[plain] / t[ours] for t in turns])
    print(f'{ours}: {rate:,.0f} MB/s, {ratio} of a {plain}')
  disk = statistics.median(t['disk'] / raw for t in turns)
  print(f'size on disk: {disk:.2f} of the bytes of the arrays')


if __name__ == '__main__':
  cli.run(main)
