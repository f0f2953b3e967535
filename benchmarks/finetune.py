r"""The same fine-tuning of the last, the merged and the decayed checkpoint.

  python -m benchmarks.merge_report --workdir=runs/merge_report
  python -m benchmarks.finetune --workdir=runs/merge_report

Takes the runs of benchmarks.merge_report (Python's standard library) and
continues each start on other text, the sources of numpy: parameters only,
fresh optimizer state, warm-up from 0, linear decay to 0, the same batches.
`merged` is the linear decay over --window steps from interval means, `decayed`
the real cooldown over the same steps. Prints a markdown table: losses on both
texts before and after, means over seeds, and the difference to `last` after
fine-tuning with its 95 % interval over seeds (Student's t).
"""

import pathlib

import numpy as np
from absl import flags

from configs import debug
from launch import cli
from launch.parts import comparison, emulation
from lm import loop
from lm.run import Run
from merging.engine import artifact

_WORKDIR = flags.DEFINE_string('workdir', 'runs/merge_report', 'of all runs')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'number of them', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 300, 'of the fine-tuning')
_WINDOW = flags.DEFINE_integer('window', 200, 'of the decays')
_RATES = flags.DEFINE_list('learning_rates', ['0.001', '0.005'], 'peaks')


def starts(folder, seed):
  """Returns {name: where to start}; merges if it is not done."""
  run = Run(folder / f'constant-{seed}')
  if 'linear' not in run.merged:
    method = emulation.parse_method('decay:shape=linear')
    plan = emulation.plan(run, method, means=True, window=_WINDOW.value)
    about = artifact.provenance(run.path, plan.sources, method=method)
    artifact.write(run.path, 'linear', sources=plan.sources, provenance=about)
  decayed = Run(folder / f'linear-{_WINDOW.value}-{seed}')
  return {
    'last': f'{run.path}@{run.steps[-1]}',
    'merged': f'{run.path}/merged/linear',
    'decayed': f'{decayed.path}@{decayed.steps[-1]}',
  }


def fine_tune(folder, seed, name, start, rate):
  """Trains if it is not done; returns losses: new before, new after, old."""
  c = debug.get_config('schedule=linear')
  c.update_from_flattened_dict(
    {
      'seed': seed,
      'init': start,
      'num_steps': _STEPS.value,
      'batch_size': 16,
      'seq_len': 64,
      'learning_rate': rate,
      'schedule.warmup': 0.1,
      'data.source': 'text',
      'data.train': f'{pathlib.Path(np.__file__).parent}/**/[!_]*.py',
      'eval.every_steps': _STEPS.value,
      'eval.num_sequences': 512,
      'eval.batch_size': 32,
      'checkpoint.every_steps': _STEPS.value,
    }
  )
  path = folder / f'tuned-{name}-{rate}-{seed}'
  loop.train(c, path)
  run, old = Run(path), Run(folder / f'constant-{seed}')
  loss = run.metrics['eval/loss'].value
  before = old.losses(run.params(0)).mean()
  return loss[0], loss[-1], before, old.losses(run.params()).mean()


def main() -> None:
  folder = pathlib.Path(_WORKDIR.value)
  found = {}
  for rate in map(float, _RATES.value):
    for seed in range(_SEEDS.value):
      for name, start in starts(folder, seed).items():
        losses = fine_tune(folder, seed, name, start, rate)
        found.setdefault((rate, name), []).append(losses)
  print('| peak | start | new text before | after | minus last | old text '
        'before | after |')  # fmt: skip
  print('|---|---|---|---|---|---|---|')
  for (rate, name), losses in found.items():
    new, tuned, old, kept = np.mean(losses, axis=0)
    after = lambda key: [x[1] for x in found[key]]
    gap = comparison.difference(after((rate, name)), after((rate, 'last')))
    text = '' if name == 'last' else gap
    print(f'| {rate:g} | {name} | {new:.4f} | {tuned:.4f} | {text} | {old:.4f} '
          f'| {kept:.4f} |')  # fmt: skip


if __name__ == '__main__':
  cli.run(main)
