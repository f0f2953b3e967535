"""Merges against real cooldowns and their ingredients (not a command)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from launch.parts import judgement, show
from launch.parts.cooldowns import Cooldown
from launch.parts.judgement import Job
from lm import address
from lm.errors import UserError
from lm.run import Run


class Comparison(NamedTuple):
  """Losses in nats of every validation batch, float64 (batches,).

  step: where all decays end.
  last: of the checkpoint there.
  merges, ingredients: by job, and by item ('800 params', '800 mean').
  real: cooldowns that end there.
  """

  step: int
  last: np.ndarray
  merges: dict[Job, np.ndarray]
  ingredients: dict[str, np.ndarray]
  real: list[Cooldown]


class Difference(NamedTuple):
  """A mean paired difference and its 95 % interval, in nats."""

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.mean:+.4f} ±{self.high - self.mean:.4f}'

  def __neg__(self) -> 'Difference':
    return Difference(-self.mean, -self.high, -self.low)


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
  """Returns a - b paired, with Student's t; one pair has no interval."""
  d = np.subtract(a, b)
  if d.size < 2 or not np.ptp(d):  # no interval; equal differences
    mean, width = float(d.mean()), 0.0 if d.size > 1 else float('inf')
    return Difference(mean, mean - width, mean + width)
  between = stats.ttest_1samp(d, 0.0).confidence_interval(0.95)
  return Difference(float(d.mean()), float(between.low), float(between.high))


def compare(
  run: Run,
  real: Sequence[Cooldown],
  *,
  step: int | None = None,
  windows: Sequence[int] = (),
  shapes: Sequence[str] = ('linear',),
  floor: float = 0.0,
  names: Sequence[str] = (),
) -> Comparison:
  """Evaluates merges of all shapes, windows and sources, and what they add.

  Args:
    run: at constant learning rate.
    real: cooldowns that branched from it.
    step: a checkpoint, where all decays end; None = the newest.
    windows: lengths in steps, beside those of `real`; without any 10, 20 and
      40 % of the steps.
    shapes, floor: of the decays.
    names: of merges of the run that are judged, too.

  Raises:
    UserError, ValueError: no such checkpoints; a cooldown that ends elsewhere.
  """
  at = '' if step is None else f'@{step}'
  step = address.locate(f'{run.path}{at}').step
  for r in real:
    if r.end != step:
      raise UserError(
        f'{r.run.path} ends at step {r.end}, but these decays at {step}; '
        f'--step={r.end} compares there.'
      )
  written = [judgement.merged(run, name, step) for name in names]
  last = run.losses(run.params(step))
  if last.size < 2:
    raise UserError(
      f'{run.path} has one validation batch, and an interval needs two: a '
      'smaller eval.batch_size or a larger eval.num_sequences.'
    )
  windows = list(dict.fromkeys([*windows, *(r.window for r in real)]))
  cells = judgement.grid(run, [step], windows)
  jobs = judgement.jobs(run, cells, cells, shapes, floor)
  if not jobs:
    raise UserError(
      f'--windows: those of {windows} steps hold one checkpoint, and a merge '
      f'needs two; {run.path} has no means (checkpoint.mean=False).'
    )
  merges = judgement.measure(run, jobs)
  merges |= {job: run.losses(run.params(job.shape)) for job in written}
  paths = dict.fromkeys(p for job in merges for p, _ in job.plan.sources)
  ingredients = {
    f'{path.parent.name} {path.name}': run.losses(judgement.read(run, path))
    for path in paths
  }
  return Comparison(step, last, merges, ingredients, list(real))


def rows(found: Comparison) -> list[dict[str, Any]]:
  """Returns one row per cooldown and per merge, by window.

  'gain' is last - loss; 'behind' is loss - that of the real cooldown of the
  same window (of the same shape, if there is one); 'recovered' the share of its
  gain, or None if that may be 0; 'over_best' is loss - that of the best single
  ingredient.
  """
  out = []
  for window in sorted({job.window for job in found.merges}):
    real = [r for r in found.real if r.window == window]
    out += [_row(found, window, r.shape, 'real', r.losses) for r in real]
    for job, losses in found.merges.items():
      if job.window != window:
        continue
      row = _row(found, window, job.shape, job.source, losses)
      same = [r for r in real if r.shape == (job.decay or job.shape)]
      other, same = not same, same or real  # no decay of its own shape
      if same:
        row['real'], row['other_shape'] = same[0].shape, other
        row['behind'] = difference(losses, same[0].losses)
        gain = difference(found.last, same[0].losses)
        known = gain.low > 0  # else it would be a share of noise
        row['recovered'] = row['gain'].mean / gain.mean if known else None
      names = [f'{p.parent.name} {p.name}' for p, _ in job.plan.sources]
      against = {
        n: difference(losses, found.ingredients[n]) for n in names
      }  # fmt: skip
      best = min(names, key=lambda n: found.ingredients[n].mean())
      row['over_best'] = against[best]
      row['below'] = int(sum(d.high < 0 for d in against.values()))
      row['against'] = against
      out.append(row)
  return out


def _row(found, window, shape, source, losses):
  return {
    'window': window,
    'shape': shape,
    'source': source,
    'loss': float(losses.mean()),
    'gain': difference(found.last, losses),
  }


Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def table(found: Comparison) -> Table:
  """Returns the table of the merges and the cooldowns."""
  last = f'{found.last.mean():.4f}'
  body = [['', 'none', 'last', last, '', '', '', '', '']]
  for row in rows(found):
    line = [
      row['window'] or '',
      row['shape'],
      row['source'],
      f'{row["loss"]:.4f}',
    ]
    line.append(row['gain'])
    if row['source'] == 'real':
      line += ['', '100%' if row['gain'].low > 0 else '', '', '']
    else:
      share = row.get('recovered')
      behind = str(row.get('behind', ''))
      if row.get('other_shape'):
        behind += f' ({row["real"]})'
      line += [behind, '' if share is None else f'{share:.0%}']
      line += [row['over_best'], f'{row["below"]} of {len(row["against"])}']
    body.append([str(x) for x in line])
  header = ['window', 'shape', 'from', 'loss', 'gain over last',
            'minus real', 'recovered', 'minus best part', 'below']  # fmt: skip
  return f'Decays that end at step {found.step}', header, body


def ingredients(run: Run, found: Comparison) -> Table:
  """Returns the table of what is averaged, by step."""
  age = lambda name: (int(name.split()[0]), name)
  body = [
    [name, *show.loss(run, x), str(difference(found.last, x))]
    for name, x in sorted(found.ingredients.items(), key=lambda i: age(i[0]))
  ]
  header = ['item', 'loss', 'its standard error', 'bits per byte',
            'gain over last']  # fmt: skip
  return 'The parts alone', header, body


LEGEND = (
  "loss: nats. ±: 95 % interval of the difference paired by batch (Student's "
  't), which says what other tokens could change, not what another seed could. '
  'real: the cooldown of this window, of this shape if there is one, else the '
  'shape in brackets. '
  'recovered: of its gain, if that interval excludes 0. best part: the best '
  'single item that is averaged. below: the parts that the merge is better '
  'than with an interval that excludes 0.'
)


def markdown(run: Run, found: Comparison, command: str) -> str:
  """Returns the tables as text, with what their columns mean."""
  against = ' against real cooldowns' if found.real else ''
  text = [f'# Merges of {run.path}{against}', '', f'`{command}`', '']
  for title, header, body in (table(found), ingredients(run, found)):
    text += [f'## {title}', '', _line(header), _line(['---'] * len(header))]
    text += [*map(_line, body), '']
  batches = f'{found.last.size} batches of {run.config.eval.batch_size}.'
  return '\n'.join([*text, f'{LEGEND} {batches}']) + '\n'


def _line(cells):
  return f'| {" | ".join(cells)} |'


def as_json(found: Comparison) -> dict[str, Any]:
  """Returns all numbers; differences are [mean, low, high]."""
  return {
    'step': found.step,
    'last': float(found.last.mean()),
    'rows': rows(found),
    'ingredients': {k: float(x.mean()) for k, x in found.ingredients.items()},
    'batches': int(found.last.size),
  }
