r"""Computes the schedule that the gradient norms of a run ask for.

  python -m launch.refine --run=runs/a
  python -m launch.refine --run=runs/a --norm=l2 --num_steps=5000 --warmup=0.02
  python -m launch.refine --run=log.csv --tag=grad_norm --power=2

Norms of every step -> median filter -> weights norm^-power -> multipliers
(arXiv 2310.07831, algorithm 1). Writes RUN/schedules/refined.npz, which
--config=...:schedule=table reads, a picture, and the experiment that can refute
it: refute.py for launch.sweep, or for a log of another trainer a linear table
and a CSV of the runs. Refinement lost as well as won against a linear decay.
"""

import math
import pathlib
import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_RUN = flags.DEFINE_string('run', '', 'a run directory or log; A+B joins')
_NORM = flags.DEFINE_enum(
  'norm',
  'auto',
  ['auto', 'l1', 'l2', 'nuclear'],
  'auto: by the optimizer of the run',
)
_POWER = flags.DEFINE_float('power', -1, 'of the weights; -1: by the optimizer')
_TAU = flags.DEFINE_float('tau', 0.1, 'width of the median filter / run')
_NUM_STEPS = flags.DEFINE_integer(
  'num_steps', 0, 'of the run that will use it; 0 = as many as this one'
)
_WARMUP = flags.DEFINE_float(
  'warmup', 0.0, 'fraction of the run that is multiplied by a linear warm-up'
)
_TAG = flags.DEFINE_string('tag', '', 'of the norms, in a foreign log')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'of the refuting experiment', 1)
_OUT = flags.DEFINE_string(
  'out', '', 'default RUN/schedules/refined.npz; ./refined.npz for a log'
)


def main() -> None:
  if not _RUN.value:
    raise UserError('--run is missing; for example --run=runs/a.')
  power = _POWER.value
  if not (math.isfinite(power) and (power >= 0 or power == -1)):
    raise UserError(f'--power={power} must be -1 or a finite number >= 0.')
  from launch.parts import refinement, schedule_pictures, show
  from lm import foreign_logs

  found = foreign_logs.read(_RUN.value)
  choice = refinement.choose(found, _NORM.value, power, _TAG.value)
  print(choice.why)
  with cli.user_errors():
    result = refinement.refine(
      found, choice, _TAU.value, _NUM_STEPS.value, _WARMUP.value
    )
  out = pathlib.Path(_OUT.value or _default(found))
  refinement.write(out, result.multiplier, result.provenance)
  picture = schedule_pictures.refined(
    result.norms, result.smooth, result.curves, choice.tag
  )
  show.save(picture, out.with_suffix('.png'))
  for line in refinement.remarks(result):
    print(line)
  warmup = found.config['schedule'].get('warmup', 0) if found.config else 0
  if warmup and not _WARMUP.value:
    print(f'The run began with a warm-up; --warmup={warmup:g} has it, too.')
  print(f'wrote {out} and {out.with_suffix(".png")}')
  if not found.config:
    linear, sweep = refinement.write_sweep(out, result, _SEEDS.value)
    print(
      f'wrote {linear} and {sweep}: to refute it, train with both tables, each '
      'at 5 peak learning rates (factors of the one that you use) and '
      f'{_SEEDS.value} seeds'
    )
    return
  config = refinement.write_experiment(
    out, _RUN.value, result.multiplier.size, _SEEDS.value
  )
  print(
    f'wrote {config}: both schedules at 5 peak learning rates and '
    f'{_SEEDS.value} seeds, {10 * _SEEDS.value} runs'
  )
  run = _RUN.value.rstrip('/')
  train = [f'--config={config}:schedule=refined', f'--workdir={run}-refined']
  print(f'Next: python -m launch.train {shlex.join(train)}')
  sweep = [f'--config={config}', f'--workdir={run}-refute']
  print(f'  or: python -m launch.sweep {shlex.join(sweep)}')


def _default(found):
  inside = pathlib.Path(found.name) / 'schedules' / 'refined.npz'
  return inside if found.config else 'refined.npz'


if __name__ == '__main__':
  cli.run(main)
