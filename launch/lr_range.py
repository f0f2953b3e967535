r"""Finds usable learning rates in one short run in which the rate grows.

  python -m launch.lr_range --config=configs/debug.py:optimizer=lion
  python -m launch.lr_range --config=runs/a/config.json \
      --config.branch=runs/a@1000 --low=1e-4 --high=0.1
  python -m launch.lr_range --knob=b1 --low=0.5 --high=0.999 --spacing=linear

Stops when the loss diverges (arXiv 1803.09820). Nothing of a run is written or
changed; --out gets a picture. With --knob, a float of the optimizer is swept
instead, at the learning rate of the config; the progress of training then hides
small differences.
"""

import shlex
import sys
from typing import Any

from absl import flags

from launch import cli

_DEFAULT = 'configs/debug.py'
_CONFIG = cli.define_config()
_KNOB = flags.DEFINE_string(
  'knob', 'learning_rate', 'or a float of the optimizer'
)
_LOW = flags.DEFINE_float('low', 1e-5, 'first value')
_HIGH = flags.DEFINE_float('high', 1.0, 'last value')
_NUM_STEPS = flags.DEFINE_integer('num_steps', 200, 'values, one step each')
_SPACING = flags.DEFINE_string('spacing', 'exponential', 'or linear')
_OUT = flags.DEFINE_string('out', 'runs/lr_range.png', 'the picture')


def main() -> None:
  out = cli.picture(_OUT.value)
  from launch.parts import range_training, schedule_pictures, show
  from schedules.theory import lr_range

  knob = _KNOB.value
  range_training.check_knob(_CONFIG.value, knob, _LOW.value, _HIGH.value)
  with cli.user_errors():
    values = lr_range.values(
      _LOW.value, _HIGH.value, _NUM_STEPS.value, spacing=_SPACING.value
    )
    losses, origin = range_training.train(_CONFIG.value, knob, values)
    reading = lr_range.read(values, losses)
  end = 'then the loss diverged'
  if len(losses) == len(values) - 1:
    end = 'as a loss is that before its step: the last value has none'
  print(f'{origin}; took {len(losses)} of {len(values)} values, {end}')
  print(f'loss falls fastest at {reading.steepest:.3g}')
  print(_sentence(knob, reading))
  used = values[: len(reading.smooth)]
  marks = {
    'falls fastest at {:.3g}': reading.steepest,
    'least at {:.3g}': used[reading.smooth.argmin()],
    'turns up at {:.3g}: beyond, 5 % of the fall is lost': reading.turn,
  }
  if not _found(reading):
    marks.popitem()
  picture = schedule_pictures.ranges(
    knob, used, losses[: len(used)], reading.smooth, _SPACING.value, marks,
    _peaks(knob, reading),
  )  # fmt: skip
  show.save(picture, out)
  print(f'wrote {out}')
  print(f'Next: {shlex.join(["python", "-m", *_next(knob, reading)])}')


def _next(knob: str, reading) -> list[str]:
  """Trains with what was found, or looks further where nothing was."""
  from launch.parts import given

  if not reading.clear:
    again = 'num_steps', 2 * _NUM_STEPS.value
  elif reading.at_end:
    again = 'high', _higher(knob)
  else:
    again = 'low', _LOW.value / 10 * reading.at_start
  flag, value = again
  if value:
    words = [x for x in sys.argv[1:] if not x.startswith(f'--{flag}=')]
    return ['launch.lr_range', *words, f'--{flag}={value:.6g}']
  best = reading.turn / 5 if knob == 'learning_rate' else reading.turn
  field = knob if knob == 'learning_rate' else f'optimizer.{knob}'
  changes = {field: f'{best:.2g}'} if _found(reading) else {}
  words = given.flags_of({**changes, **_room(_CONFIG.value)})
  name = f'{knob}-{best:.2g}' if _found(reading) else f'without-{knob}'
  return ['launch.train', *words, f'--workdir=runs/{name}']


def _higher(knob: str) -> float:
  """Returns the next --high to try; 0 if there is none."""
  from lm import follow

  factor = 10 if _SPACING.value == 'exponential' else 2
  found = min(_HIGH.value * factor, follow.legal(knob)[1])
  return found if found > _HIGH.value else 0.0


def _room(config) -> dict[str, Any]:
  """Returns what a run needs to go on from the checkpoint of this test."""
  from lm import address

  begin = address.locate(config.branch).step if config.branch else 0
  needed = {'num_steps': 2 * begin} if begin >= config.num_steps else {}
  if begin % config.checkpoint.every_steps:
    needed['checkpoint.mean'] = False  # one would begin before the branch
  return needed


def _sentence(knob: str, reading) -> str:
  if not reading.clear:
    return (
      'the noise of the batches hides any difference: use more steps, a larger '
      '--config.batch_size, or separate runs'
    )
  if reading.at_end:
    more = 'raise --high' if _higher(knob) else 'no larger value is legal'
    return f'the loss still fell at {reading.turn:.3g}: {more}'
  if reading.at_start:
    return 'the loss never fell: lower --low, or use more steps'
  if peaks := _peaks(knob, reading):
    return (
      f'it turns up at {reading.turn:.3g}: try peaks of {peaks[0]:.2g} to '
      f'{peaks[1]:.2g}, with a warm-up perhaps more'
    )
  return f'it turns up at {reading.turn:.3g}'


def _peaks(knob: str, reading) -> tuple[float, float] | None:
  """Returns the least and the largest to try, where the test shows any."""
  if _found(reading) and knob == 'learning_rate':
    return reading.turn / 10, reading.turn / 3
  return None


def _found(reading) -> bool:
  """Whether the test shows where the loss turns up."""
  return reading.clear and not (reading.at_end or reading.at_start)


if __name__ == '__main__':
  cli.run(main, _DEFAULT)
