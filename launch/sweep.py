r"""Trains all settings of a config file's sweep(), in one process.

  python -m launch.sweep --workdir=runs/sweep
  python -m launch.sweep --config=configs/x.py --workdir=runs/x \
      --config.num_steps=2000

Beside get_config(), the file has sweep(), which returns {name: {field: value}};
'optimizer', 'schedule' and 'size' are choices behind the colon, other fields
those of the config, 'seed' among them. Each setting is an ordinary run,
WORKDIR/NAME; those whose programs are alike share the compiled ones. The same
command goes on; what was trained before is read. Prints the final validation
losses, means over the seeds, and writes WORKDIR/sweep.json and a picture over
the field with the most values. launch.compare tunes methods by itself.
For one machine, with all its devices.
"""

import json
import shlex
import sys

import numpy as np
from absl import flags

from launch import cli
from lm.errors import UserError

_DEFAULT = 'configs/sweep.py'
cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', '', 'directory of all runs')


def main() -> int:
  if not _WORKDIR.value:
    raise UserError('--workdir is missing; for example --workdir=runs/sweep.')
  from launch.parts import fairness, schedule_pictures, show, sweeps, trials
  from lm import preemption

  settings = sweeps.settings()
  configs = sweeps.configs(settings)
  out = show.results_path(_WORKDIR.value, 'sweep.json', '.png')
  with preemption.Preemption() as stopped:
    stop = lambda: stopped.reached(0)
    done = trials.Trials(_WORKDIR.value, stop, len(configs))
    wrong: dict[str, UserError] = {}
    for name, config in configs.items():
      try:
        done.check(f"The setting '{name}'", config, out.parent / name)
      except UserError as e:
        wrong[name] = e
    if wrong:
      first, *others = wrong
      more = f' Others cannot be trained, either: {", ".join(others)}.'
      raise UserError(f'{wrong[first]}{more if others else ""}')
    try:
      losses = [done.train(out.parent / n, c) for n, c in configs.items()]
    except trials.Preempted:
      print('preempted. Next: run the same command to continue')
      return 143
  measured = fairness.validations([*configs.values()])
  seeds = [c.seed for c in configs.values()]
  found = sweeps.groups(settings, seeds, losses, measured)
  show.table(*sweeps.table(found))
  print(
    'loss: final validation loss in nats, mean over the seeds; ±: 95 % '
    "(Student's t); *: the least."
  )
  key = sweeps.axis(found)
  if key and len(sweeps.lines(found, key)) > 1:
    show.table(*sweeps.bests(found, key))
    print(
      'minus: paired by seed. The best were chosen by the same runs, so they '
      'look better than they are: launch.compare takes fresh seeds.'
    )
  for note in fairness.notes([*configs], [*configs.values()], measured):
    print(note)
  out.write_text(_json(settings, losses) + '\n')
  print(f'wrote {out}')
  if key:
    figure = schedule_pictures.sweep(sweeps.lines(found, key), key)
    show.save(figure, out.with_suffix('.png'))
    print(f'wrote {out.with_suffix(".png")}')
  else:
    print('No picture: no field of the settings is a number that differs.')
  if note := done.note():
    print(note)
  print(f'Next: tensorboard --logdir={shlex.quote(_WORKDIR.value)}')
  return 0


def _json(settings, losses):
  rows = [
    {
      'name': name,
      'settings': {**method.choices, **method.fields},
      'loss': loss if np.isfinite(loss) else None,
    }
    for (name, method), loss in zip(settings.items(), losses, strict=True)
  ]
  command = shlex.join(['python', '-m', 'launch.sweep', *sys.argv[1:]])
  return json.dumps({'command': command, 'runs': rows}, indent=2, default=str)


if __name__ == '__main__':
  cli.run(main, _DEFAULT)
