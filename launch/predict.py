r"""Predicts final losses and best peak learning rates from a few runs.

  python -m launch.predict --runs=runs/a,runs/b,runs/c,runs/d
  python -m launch.predict --runs=a.csv,b.csv,c.csv --held_out=d.csv \
      --schedules=cosine,wsd:decay=0.4 --num_steps=1000,4000 --tag=val_loss

Fits loss = offset + slope * (convex last-iterate bound of the learning rates)
(arXiv 2501.18965): three numbers, from at least three runs of one task with at
least two peak learning rates. Four or more runs give intervals. A stage that
starts mid-run is given as PARENT+STAGE; branches find their parent.
"""

import pathlib
import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_RUNS = flags.DEFINE_list('runs', [], 'runs or logs of the fit')
_HELD_OUT = flags.DEFINE_list('held_out', [], 'runs to compare with')
_SCHEDULES = flags.DEFINE_string(
  'schedules', 'linear,cosine,wsd:decay=0.1,wsd:decay=0.2,wsd:decay=0.4,'
  'wsd:decay=0.2,shape=1-sqrt', 'to predict: NAME:KEY=VALUE,...,NAME,...',
)  # fmt: skip
_NUM_STEPS = flags.DEFINE_list('num_steps', [], 'lengths; default: the runs')
_TAG = flags.DEFINE_string('tag', '', 'of the loss, in foreign logs')
_LR_TAG = flags.DEFINE_string('lr_tag', '', 'of the learning rate')
_LAST = flags.DEFINE_integer('last', 1, 'the final loss: mean of so many', 1)
_LEVEL = flags.DEFINE_float('level', 0.9, 'probability of the intervals')
_OUT = flags.DEFINE_string('out', 'runs/predict.png', 'the picture')


def main() -> None:
  if not _RUNS.value:
    raise UserError('--runs is missing; for example --runs=a.csv,b.csv,c.csv.')
  out = cli.picture(_OUT.value)
  lengths = cli.integers('num_steps', _NUM_STEPS.value)
  from launch.parts import curves, prediction, schedule_pictures, show

  read = lambda t: prediction.point(t, _TAG.value, _LR_TAG.value, _LAST.value)
  fitted = prediction.fit([read(t) for t in _RUNS.value], _LEVEL.value)
  held = [read(t) for t in _HELD_OUT.value]
  prediction.warn([*fitted.points, *held])
  prediction.print_fit(fitted)
  found = prediction.print_held_out(fitted, held) if held else []
  lines = prediction.print_others(
    fitted,
    curves.split(_SCHEDULES.value),
    lengths or [prediction.common(fitted.points)],
  )
  print(prediction.FAILS)
  measured = [p.loss for p in fitted.points]
  got = [fitted.loss(p.lr) for p in fitted.points]
  tried = [p.lr.max() for p in fitted.points]
  show.save(
    schedule_pictures.predicted(measured, got, found, lines, tried), out
  )
  print(f'wrote {out}')
  print(f'Next: {shlex.join(["python", "-m", *_next(fitted.points)])}')


def _next(points) -> list[str]:
  """Extends the first run of ours; of foreign logs, draws the schedules."""
  for p in points:
    if p.config and pathlib.Path(p.name).is_dir():  # no PARENT+STAGE
      steps = f'--num_steps={2 * p.config["num_steps"]}'
      return ['launch.extend', f'--run={p.name}', steps]
  words = [f'--runs={",".join(_RUNS.value)}', f'--schedules={_SCHEDULES.value}']
  words += [f'--tag={_LR_TAG.value}'] if _LR_TAG.value else []
  return ['launch.plot_schedule', *words]


if __name__ == '__main__':
  cli.run(main)
