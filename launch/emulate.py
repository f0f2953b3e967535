r"""Emulates decays of the learning rate from one constant-rate run.

  python -m launch.emulate --run=runs/a
  python -m launch.emulate --run=runs/a --against=runs/a-cooldown
  python -m launch.emulate --run=runs/a --ends=600,1000 --windows=100,200

What would the loss be, had the run been decayed over WINDOW steps until END?
Nothing is trained: checkpoints and the means between them are averaged. With
--against, real cooldowns that branched from this run stand beside it. Writes
RUN/plots/NAME.png and NAME.json.
"""

import json
import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_RUN = flags.DEFINE_string('run', '', 'the run directory')
_AGAINST = flags.DEFINE_list('against', [], 'real cooldowns: branches of it')
_SHAPES = flags.DEFINE_list(
  'shapes', ['linear', 'cosine', '1-sqrt'], 'of the decay'
)
_FLOOR = flags.DEFINE_float('floor', 0.0, 'end of the decay / peak')
_ENDS = flags.DEFINE_list('ends', [], 'end steps; default: four to the newest')
_NAME = flags.DEFINE_string('name', 'emulate', 'of the files in RUN/plots')
_WINDOWS = flags.DEFINE_list(
  'windows', [], 'lengths in steps; default: 10, 20 and 40 % of the end step'
)


def main() -> None:
  if not _RUN.value:
    raise UserError('--run is missing; for example --run=runs/a.')
  if not _SHAPES.value:
    raise UserError('--shapes is empty; for example --shapes=linear,cosine.')
  from launch.parts import cooldowns, emulation, judgement, pictures, show
  from lm.run import Run
  from merging.engine import artifact

  with cli.user_errors():
    artifact.check_name(_NAME.value)
    run = Run(_RUN.value)
    real = cooldowns.read(run, _AGAINST.value, _FLOOR.value)
    windows = cli.integers('windows', _WINDOWS.value)
    grid = judgement.grid(run, cli.integers('ends', _ENDS.value), windows)
    ends = cli.integers('ends', _ENDS.value) or sorted({end for end, _ in grid})
    newest = [cell for cell in grid if cell[0] == grid[-1][0]]
    middle = [newest[len(newest) // 2]]
    focus = [(r.end, r.window) for r in real] or middle
    jobs = judgement.jobs(run, grid, focus, _SHAPES.value, _FLOOR.value)
  end = max(end for end, _ in grid)
  emulation.warn_of_code(run, end, end - min(e - w for e, w in grid))
  results = judgement.measure(run, jobs)
  last = {end: run.losses(run.params(end)) for end in {j.end for j in jobs}}
  for end, window in dict.fromkeys(focus):
    _print_focus(run, end, window, results, last[end], real)
  _print_surface(grid, results, last)
  short = [f'{w} until {end}' for end in ends for w in windows if w > end]
  if short:
    print(f'Left out, longer than what was trained: {", ".join(short)}.')
  out = run.path / 'plots' / f'{_NAME.value}.png'
  figure = pictures.emulation(run, real, grid, focus, results, last)
  show.save(figure, out)
  numbers = judgement.as_json(results, last, real)
  out.with_suffix('.json').write_text(json.dumps(numbers, indent=2) + '\n')
  print(f'wrote {out} and {out.with_suffix(".json")}')
  print(
    f'Next: python -m launch.merge --run={shlex.quote(str(run.path))} '
    f'--end={focus[0][0]} --window={focus[0][1]} --means'
  )


def _print_focus(run, end, window, results, last, real) -> None:
  """One window in depth: raw checkpoints, interval means, real cooldowns."""
  from launch.parts import show

  rows = [[f'last checkpoint, step {end}', *show.loss(run, last), '', '']]
  names = {'raw': 'raw checkpoints', 'means': 'interval means',
           'moments': 'means, moments', 'trackers': 'power EMAs'}  # fmt: skip
  found = [
    (f'emulated {job.shape}, {names[job.source]}', losses)
    for job, losses in results.items()
    if (job.end, job.window) == (end, window)
  ]
  found += [
    (f'real {r.shape}, {r.run.path}', r.losses)
    for r in real
    if (r.end, r.window) == (end, window)
  ]
  for name, losses in found:
    rows.append([name, *show.loss(run, losses), *show.gain(last, losses)])
  print(f'\nDecay over the {window} steps before step {end}:')
  header = ['', 'loss (nats)', 's.e.', 'bits per byte', 'gain', 's.e.']
  show.table(header, rows)
  print(
    'gain: loss of the last checkpoint minus this loss, paired by batch; '
    f's.e.: standard error over {len(last)} batches, if three or more.'
  )


def _print_surface(grid, results, last) -> None:
  from launch.parts import show

  shapes = list(dict.fromkeys(job.shape for job in results))
  rows = []
  for end, window in grid:
    best = {job.shape: job for job in results
            if (job.end, job.window) == (end, window)}  # fmt: skip
    cells = [f'{results[best[s]].mean():.4f}' for s in shapes]
    rows.append([end, window, f'{last[end].mean():.4f}', *cells])
  print('\nEmulated loss (nats) of a decay over WINDOW until END:')
  show.table(['end', 'window', 'no decay', *shapes], rows)
  print(
    'Shapes are linear between two checkpoints: over one interval all are the '
    'same.'
  )


if __name__ == '__main__':
  cli.run(main)
