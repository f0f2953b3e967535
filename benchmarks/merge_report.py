r"""Merges against real cooldowns: 3 seeds, 3 shapes, 3 windows, all sources.

  python -m benchmarks.merge_report --workdir=runs/merge_report

Trains one run at constant learning rate per seed and, from its checkpoints,
one cooldown per window and shape; compares as launch.merge_report does. Prints
a markdown table of means over seeds, with 95 % intervals over seeds (Student's
t): of the gain over the last checkpoint, and of the merge minus the real
cooldown of the same window and shape. Rerunning continues where it stopped.
About 5 minutes on 2 calm cores.
"""

import pathlib

import numpy as np
from absl import flags

from configs import debug
from launch import cli
from launch.parts import comparison, cooldowns
from lm import loop
from lm.run import Run

_WORKDIR = flags.DEFINE_string('workdir', 'runs/merge_report', 'of all runs')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'number of them', lower_bound=2)
_STEPS = flags.DEFINE_integer('steps', 1500, 'of the constant run')
_SHAPES = flags.DEFINE_list('shapes', ['linear', 'cosine', '1-sqrt'], '')
_WINDOWS = flags.DEFINE_list('windows', ['100', '200', '400'], 'in steps')


def config(schedule, seed):
  """A model of 0.05M parameters, 1024 tokens per step."""
  c = debug.get_config(f'schedule={schedule}')
  c.update_from_flattened_dict(
    {
      'seed': seed,
      'num_steps': _STEPS.value,
      'batch_size': 16,
      'seq_len': 64,
      'learning_rate': 5e-3,
      'eval.every_steps': 0,
      'eval.num_sequences': 512,
      'eval.batch_size': 32,
      'checkpoint.every_steps': 25,
    }
  )
  if schedule == 'constant':
    c.schedule.warmup_steps = 50
    c.checkpoint.moment, c.checkpoint.ema = True, '0.05,0.1'
  return c


def seed_rows(folder, seed):
  """Trains what is missing; returns the rows of launch.merge_report."""
  base = folder / f'constant-{seed}'
  loop.train(config('constant', seed), base)
  real = []
  for window in map(int, _WINDOWS.value):
    for shape in _SHAPES.value:
      c = config('wsd', seed)
      c.branch = f'{base}@{_STEPS.value - window}'
      c.schedule.decay, c.schedule.shape = window / _STEPS.value, shape
      path = folder / f'{shape}-{window}-{seed}'
      loop.train(c, path)
      real.append(cooldowns.read_one(Run(base), Run(path)))
  found = comparison.compare(Run(base), real, shapes=_SHAPES.value)
  return comparison.rows(found)


def main() -> None:
  folder = pathlib.Path(_WORKDIR.value)
  seeds = [seed_rows(folder, s) for s in range(_SEEDS.value)]
  print('| window | shape | from | gain over last | minus real | recovered |')
  print('|---|---|---|---|---|---|')
  over = lambda values: comparison.difference(values, np.zeros(len(values)))
  for same in zip(*seeds, strict=True):
    gain = over([r['gain'].mean for r in same])
    cells = [*(same[0][k] for k in ('window', 'shape', 'source')), gain]
    if same[0]['source'] != 'real':
      behind = over([r['behind'].mean for r in same])
      cells += [behind, f'{gain.mean / (gain.mean + behind.mean):.0%}']
    else:
      cells += ['', '']
    print(f'| {" | ".join(map(str, cells))} |')


if __name__ == '__main__':
  cli.run(main)
