r"""Proposes how a run goes on to more steps, and other schedules for it.

  python -m launch.extend --run=runs/a --num_steps=2000
  python -m launch.extend --run=runs/a --num_steps=2000 --schedules=cosine

The best learning rate falls with the length of a run. To go on at the one that
was tuned, the convex bound (arXiv 2501.18965, section 5) asks for a longer
cooldown, or for a lower rate in what is added. Prints ready commands, the best
bound first; trains nothing. A running run may be extended, too.
"""

import pathlib

from absl import flags

from launch import cli
from lm.errors import UserError

_RUN = flags.DEFINE_string('run', '', 'the run directory')
_NUM_STEPS = flags.DEFINE_integer('num_steps', None, 'of the longer run')
_DECAY = flags.DEFINE_float(
  'decay', 0.0, 'of a run at constant rate: the cooldown it was tuned for (0.2)'
)
_SCHEDULES = flags.DEFINE_string(
  'schedules', '', 'others to train from scratch: NAME:KEY=VALUE,...,NAME,...'
)


def main() -> None:
  if not _RUN.value:
    raise UserError('--run is missing; for example --run=runs/a.')
  from launch.parts import curves, extension, show
  from lm import foreign_logs, spec

  run = pathlib.Path(_RUN.value)
  if not all((run / f).is_file() for f in ('config.json', 'metrics.jsonl')):
    raise UserError(f"'{run}' is not a run directory.")
  found = foreign_logs.read(_RUN.value)
  try:  # fills in what is newer than the run; JSON made lists of tuples
    schedule = spec.spec('schedules', **found.config['schedule'])
  except UserError as e:
    raise UserError(f"'{run}/config.json': {e}") from e
  found.config['schedule'] = schedule
  length = found.config['num_steps']
  steps = _NUM_STEPS.value
  if steps is None or steps <= length:
    what = ' is missing' if steps is None else f'={steps} is too small'
    raise UserError(
      f'--num_steps{what}; legal: more than {length}, the length of {run}.'
    )
  with cli.user_errors():
    was = extension.tuned(found, _DECAY.value)
    ways = extension.proposals(found, was, steps) if was else []
    names = curves.split(_SCHEDULES.value)
    if not was and not names:
      names = [_its_own(found)]
    others = [extension.another(found, n, steps) for n in names]
  if ways:
    least = min(p.bound for p in ways)
    rows = [[p.name, f'{p.bound / least:.3f}'] for p in ways]
    show.table([f'to {steps} steps', 'bound / best'], rows)
    for p in ways:
      print(f'\n# {p.name}\n{p.command}')
  else:
    name = found.config['schedule']['name']
    print(f"schedule '{name}' has no stable phase to go on from.")
  for name, command in zip(names, others, strict=True):
    print(
      f'\n# {name} from scratch; learning_rate: the old times the ratio of the '
      f'best peaks of both schedules, by the convex bound\n{command}'
    )


def _its_own(found):
  knobs = dict(found.config['schedule'])
  name = knobs.pop('name')
  text = ','.join(f'{k}={v}' for k, v in knobs.items() if v != '')
  return f'{name}:{text}'


if __name__ == '__main__':
  cli.run(main)
