r"""Compares optimizers, schedules or any fields: each tuned, over fresh seeds.

  python -m launch.compare --workdir=runs/compare --method=adamw --method=muon
  python -m launch.compare --workdir=runs/decay --seeds=5 \
      --config=configs/compare.py:size=micro --config.num_steps=1000 \
      --tune=learning_rate,weight_decay --method=adamw \
      --method=adamw,optimizer.decay=cautious --method=adamw,schedule=wsd

The first method is the baseline. For each, the learning rate is multiplied and
divided by --factor until neither neighbour of the best is better, or --most
values are measured; then the best is trained with seeds that the search did not
see. Several knobs are searched one after the other, once each; those between 0
and 1, as b1, by their distance from 1. Every trial is an ordinary run below
--workdir, with the checkpoints of its config (configs/compare.py keeps one).
The same command goes on, with more methods or seeds too.
Writes WORKDIR/compare.{md,json,png}. For one machine, with all its devices.
"""

import json
import shlex
import sys

from absl import flags

from launch import cli
from lm.errors import UserError

_DEFAULT = 'configs/compare.py'
_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', '', 'directory of all runs')
_METHOD = flags.DEFINE_multi_string(
  'method', [], 'an optimizer, or KEY=VALUE,...: choices and fields; repeated'
)
_TUNE = flags.DEFINE_list(
  'tune',
  ['learning_rate'],
  'also floats of the optimizer, in turn; empty = no search',
)
_FACTOR = flags.DEFINE_float('factor', 2.0, 'between two values of a search')
_MOST = flags.DEFINE_integer(
  'most', 10, 'values of one search', lower_bound=3, upper_bound=100
)
_TUNING_SEEDS = flags.DEFINE_integer(
  'tuning_seeds', 1, 'of each run of a search', lower_bound=1, upper_bound=100
)
_SEEDS = flags.DEFINE_integer(
  'seeds', 3, 'of the final runs', lower_bound=1, upper_bound=1000
)


def main() -> int:
  if not _WORKDIR.value:
    raise UserError('--workdir is missing; for example --workdir=runs/compare.')
  if not _METHOD.value:
    raise UserError('--method is missing; for example --method=adamw.')
  if not 1.01 <= _FACTOR.value <= 1000:
    raise UserError(f'--factor={_FACTOR.value} must be from 1.01 to 1000.')
  from launch.parts import (
    fairness,
    ranking,
    schedule_pictures,
    show,
    trials,
    tuning,
  )
  from lm import preemption
  from lm.run import Run

  methods = [trials.parse(text) for text in _METHOD.value]
  names = [trials.folder(method) for method in methods]
  for method, name in zip(methods, names, strict=True):
    if names.count(name) > 1:
      raise UserError(
        f'--method={method.name} is given twice, or two methods differ only in '
        f'what {name}, the name of their directory, leaves out.'
      )
  knobs = [knob for knob in _TUNE.value if knob]
  tuning.check_knobs(methods, knobs)
  seed = _CONFIG.value.seed
  first = [seed + i for i in range(_TUNING_SEEDS.value)]
  seeds = [seed + 100 + i for i in range(_SEEDS.value)]
  if seeds[-1] >= 2**32:
    raise UserError(
      f'--config.seed={seed} leaves no seeds for the final runs: at most '
      f'{2**32 - 100 - _SEEDS.value}.'
    )
  rows, firsts = [], []
  with preemption.Preemption() as stopped:
    done = trials.Trials(_WORKDIR.value, lambda: stopped.reached(0))
    for method in methods:
      tuning.fields_of(method, knobs)
      done.check(f'--method={method.name}', method.config())
    out = show.results_path(_WORKDIR.value, 'compare.md', '.json', '.png')
    try:
      for method in methods:
        tuned = tuning.tune(
          done, method, knobs, seeds=first, factor=_FACTOR.value,
          most=_MOST.value,
        )  # fmt: skip
        losses = [done.loss(method, tuned.fields, seed) for seed in seeds]
        runs = [Run(done.path(method, tuned.fields, seed)) for seed in seeds]
        rows.append(ranking.row(method.name, tuned, losses, runs))
        firsts.append(runs[0].config)
    except trials.Preempted:
      print('preempted. Next: run the same command to continue')
      return 143
  command = shlex.join(['python', '-m', 'launch.compare', *sys.argv[1:]])
  measured = fairness.validations(firsts)
  for r, name in zip(rows, measured, strict=True):
    r.measured = name
  notes = fairness.notes([r.name for r in rows], firsts, measured)
  show.table(*ranking.table(rows))
  print(ranking.legend(rows, notes))
  show.save(schedule_pictures.ranking(rows), out.with_suffix('.png'))
  names = [method.name for method in methods]
  gone = [n for n in _methods(out.with_suffix('.json')) if n not in names]
  if gone:
    print(
      f'{out} had {", ".join(gone)}, too. Their runs are kept: a command with '
      'all methods shows all.'
    )
  numbers = {'command': command, **ranking.as_json(rows, seeds)}
  out.with_suffix('.json').write_text(json.dumps(numbers, indent=2) + '\n')
  out.write_text(ranking.markdown(rows, command, notes))
  if note := done.note():
    print(note)
  print(f'wrote {out}, and .json and .png beside it')
  print(f'Next: tensorboard --logdir={shlex.quote(_WORKDIR.value)}')
  return 0


def _methods(path) -> list[str]:
  """Returns the methods of an earlier table, if there is one."""
  try:
    return [row['method'] for row in json.loads(path.read_text())['methods']]
  except (OSError, ValueError, KeyError, TypeError):
    return []


if __name__ == '__main__':
  cli.run(main, _DEFAULT)
