"""Speed of the schedule tools: the bound, refinement, and how they start.

  python -m benchmarks.schedules

The bound of a million steps beside its definition, whose cost grows with the
square of the steps (measured at 40,000, scaled up); refinement of a million
norms beside scipy's median filter alone; what a user waits for: each command on
small logs, or its help. CPU only.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from scipy import ndimage

from benchmarks import results
from launch import cli
from schedules.theory import bound, refine

STEPS = 10**6
ROOT = pathlib.Path(__file__).parents[1]


def seconds(function, repeats: int = 3) -> float:
  """Returns the median time of a call."""
  taken = []
  for _ in range(repeats):
    begin = time.perf_counter()
    function()
    taken.append(time.perf_counter() - begin)
  return statistics.median(taken)


def omega_by_definition(lr: np.ndarray) -> float:
  """The bound, each sum of it added up anew."""
  q = lr**2
  total = (1 + q.sum()) / (2 * lr.sum())
  for k in range(len(lr) - 1):
    later = lr[k + 1 :].sum()
    total += lr[k] / later * q[k:].sum() / (later + lr[k]) / 2
  return float(total)


def _starts(folder: pathlib.Path) -> dict[str, float]:
  log = folder / 'a.jsonl'
  steps = range(100)
  for path, peak in ((log, 1), (folder / 'b.jsonl', 2)):
    rows = [
      {'step': s, 'lr': peak * (1 - s / 100), 'loss': 3 - peak / 9, 'l1': 1 + s}
      for s in steps
    ]
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  rows = [{'step': s, 'lr': 1, 'loss': 3} for s in steps]
  (folder / 'c.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  commands = {
    'plot_schedule': '--schedules=cosine,wsd',
    'refine': '--run=a.jsonl --tag=l1',
    'predict': '--runs=a.jsonl,b.jsonl,c.jsonl',
    'extend': '--help',
    'lr_range': '--help',
  }
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  call = lambda name: subprocess.run(
    [sys.executable, '-m', f'launch.{name}', *commands[name].split()],
    cwd=folder,
    env=environment,
    capture_output=True,
    check=True,
  )
  return {
    f'{name} {flags}': seconds(lambda n=name: call(n))
    for name, flags in commands.items()
  }


@results.entry('schedule tools')
def main() -> None:
  lr = 1 - np.arange(STEPS) / STEPS
  taken = seconds(lambda: bound.omega(lr))
  few = lr[:: STEPS // 40_000]
  slow = seconds(lambda: omega_by_definition(few)) * (STEPS / few.size) ** 2
  np.testing.assert_allclose(omega_by_definition(few), bound.omega(few))
  print(f'Omega, {STEPS:,} steps: {taken:.3f} s; as defined: {slow:,.0f} s')
  norms = np.random.default_rng(0).lognormal(size=STEPS)
  for tau in (0.001, 0.1):
    taken = seconds(lambda t=tau: refine.refine(norms, tau=t))
    size = refine.width(STEPS, tau)
    scipy = seconds(lambda s=size: ndimage.median_filter(norms, s))
    print(
      f'refine, {STEPS:,} norms, windows of {size:,}: {taken:.3f} s; the '
      f'median filter of scipy alone: {scipy:.3f} s'
    )
  with tempfile.TemporaryDirectory() as folder:
    for name, s in _starts(pathlib.Path(folder)).items():
      print(f'launch.{name}: {s:.1f} s from start to end')


if __name__ == '__main__':
  cli.run(main)
