r"""Draws schedules: by name and knobs, of runs and logs, and from tables.

  python -m launch.plot_schedule --schedules=cosine,wsd:decay=0.2,shape=1-sqrt
  python -m launch.plot_schedule --runs=runs/a,runs/b --schedules=linear
  python -m launch.plot_schedule --schedules=table:path=mine.csv

A run is drawn by its learning rates over its peak, and by its loss. The table
has, for each, the mean multiplier and what the convex bound says of it relative
to the first: its best peak learning rate and its loss there.
"""

import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_SCHEDULES = flags.DEFINE_string(
  'schedules', '', 'NAME:KEY=VALUE,...,NAME,... of schedules/NAME.py'
)
_RUNS = flags.DEFINE_list(
  'runs', [], 'run directories or logs; A+B joins stages'
)
_NUM_STEPS = flags.DEFINE_integer(
  'num_steps', 0, 'of --schedules; 0 = of the first run, or 1000'
)
_TAG = flags.DEFINE_string('tag', '', 'of the learning rate, in foreign logs')
_OUT = flags.DEFINE_string('out', 'runs/schedules.png', 'the picture')


def main() -> None:
  if not _SCHEDULES.value.strip(',') and not _RUNS.value:
    raise UserError(
      '--schedules and --runs are missing; for example --schedules=cosine,wsd.'
    )
  out = cli.picture(_OUT.value)
  from launch.parts import curves, schedule_pictures, show
  from lm import foreign_logs

  runs = {text: foreign_logs.read(text) for text in _RUNS.value}
  found = [_curve(name, run) for name, run in runs.items()]
  steps = _NUM_STEPS.value or (found[0].value.size if found else 1000)
  found += [curves.curve(t, steps) for t in curves.split(_SCHEDULES.value)]
  show.table(
    ['schedule', 'steps', 'mean', 'last', 'best peak', 'best loss bound'],
    _rows(found),
  )
  print('best peak, best loss bound: by the convex bound, over the first row.')
  losses = {k: x for k, v in runs.items() if (x := _loss(v)) is not None}
  show.save(schedule_pictures.multipliers(found, losses), out)
  print(f'wrote {out}')
  chosen = (curves.split(_SCHEDULES.value) or ['wsd'])[0]
  choice, *knobs = curves.as_flags(chosen)
  name = choice.rpartition('=')[2] or 'new'
  words = [f'--config=configs/debug.py{choice}', *knobs]
  words += [f'--workdir=runs/schedule-{name}']
  print(f'Next: python -m launch.train {shlex.join(words)}')


def _curve(name, run):
  from launch.parts import curves
  from lm import foreign_logs

  rates = foreign_logs.learning_rates(run, _TAG.value)
  if not rates.max() > 0:
    raise UserError(f'{name}: no learning rate is above 0.')
  # A run of ours may stay below its rate, or begin as a branch of a higher one.
  peak = max(rates.max(), run.config.get('learning_rate', 0))
  return curves.Curve(name, rates / peak)


def _loss(run):
  """Returns the loss of a log, None if it has none."""
  from lm import foreign_logs

  try:
    return foreign_logs.find(run, 'loss')
  except UserError:
    return None


def _rows(found):
  from schedules.theory import bound

  with cli.user_errors():
    best = [bound.best(c.value) for c in found]
  first = best[0]
  return [
    [c.name, c.value.size, f'{c.value.mean():.4f}', f'{c.value[-1]:.4f}',
     f'{b.learning_rate / first.learning_rate:.3f}',
     f'{b.bound / first.bound:.3f}']
    for c, b in zip(found, best, strict=True)
  ]  # fmt: skip


if __name__ == '__main__':
  cli.run(main)
