r"""Judges merges of one run against real cooldowns, on the same tokens.

  python -m launch.merge_report --run=runs/a --against=runs/a-cooldown
  python -m launch.merge_report --run=runs/a --step=800 --windows=100,200 \
      --shapes=linear,1-sqrt --against=runs/b,runs/c

Every decay that ends at --step (default: the newest checkpoint) is emulated
from raw checkpoints and from interval means. A cooldown that branched from this
run is compared with the merges of the same window, whatever its shape; so are
--merges=NAME,... that launch.merge has written, of any method. All
differences are paired by validation batch, with 95 % intervals (Student's t):
they say what other tokens could change, not what another seed could. Writes
RUN/plots/NAME.{md,json,png}. The surface over end steps is launch.emulate's.
"""

import json
import shlex
import sys

from absl import flags

from launch import cli
from lm.errors import UserError

_RUN = flags.DEFINE_string('run', '', 'the run directory')
_STEP = flags.DEFINE_integer('step', -1, 'where decays end; -1 = newest')
_AGAINST = flags.DEFINE_list('against', [], 'real cooldowns: branches of it')
_SHAPES = flags.DEFINE_list(
  'shapes', ['linear', 'cosine', '1-sqrt'], 'of the decay'
)
_FLOOR = flags.DEFINE_float('floor', 0.0, 'end of the decay / peak')
_WINDOWS = flags.DEFINE_list(
  'windows',
  [],
  'lengths in steps; default: those of --against, or 10, 20, 40 %',
)
_MERGES = flags.DEFINE_list('merges', [], 'of RUN/merged, judged as well')
_NAME = flags.DEFINE_string('name', 'merge_report', 'of the files')


def main() -> None:
  if not _RUN.value:
    raise UserError('--run is missing; for example --run=runs/a.')
  if not _SHAPES.value:
    raise UserError('--shapes is empty; for example --shapes=linear,cosine.')
  if _STEP.value < -1:
    raise UserError(f'--step={_STEP.value} is not a step.')
  from launch.parts import (
    comparison,
    cooldowns,
    emulation,
    pictures,
    show,
  )
  from lm.run import Run
  from merging.engine import artifact

  with cli.user_errors():
    artifact.check_name(_NAME.value)
    run = Run(_RUN.value)
    real = cooldowns.read(run, _AGAINST.value, _FLOOR.value)
    found = comparison.compare(
      run,
      real,
      step=None if _STEP.value == -1 else _STEP.value,
      windows=cli.integers('windows', _WINDOWS.value),
      shapes=_SHAPES.value,
      floor=_FLOOR.value,
      names=list(dict.fromkeys(_MERGES.value)),
    )
  window = max(row['window'] for row in comparison.rows(found))
  emulation.warn_of_code(run, found.step, window)
  title, header, rows = comparison.table(found)
  print(title)
  show.table(header, rows)
  print(comparison.LEGEND)
  as_json = json.dumps(comparison.as_json(found), indent=2) + '\n'
  out = run.path / 'plots' / f'{_NAME.value}.png'
  show.save(pictures.report(comparison.rows(found)), out)
  markdown, numbers = out.with_suffix('.md'), out.with_suffix('.json')
  command = shlex.join(['python', '-m', 'launch.merge_report', *sys.argv[1:]])
  markdown.write_text(comparison.markdown(run, found, command))
  numbers.write_text(as_json)
  print(f'wrote {markdown}, {numbers} and {out}')
  print(f'Next: python -m launch.emulate --run={shlex.quote(str(run.path))}')


if __name__ == '__main__':
  cli.run(main)
