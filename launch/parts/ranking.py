"""Tuned methods over seeds: table, text and numbers (not a command)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.parts import comparison, tuning
from lm import branch
from lm.foreign_logs import Series
from lm.run import Run


@dataclasses.dataclass
class Row:
  """One method.

  tuned: what was found, and how.
  losses: final validation loss of each seed in nats, inf if it diverged.
  curves: validation loss over the steps, of each seed.
  tokens: of each run.
  measured: a name of the validation tokens.
  """

  name: str
  tuned: tuning.Tuned
  losses: np.ndarray
  curves: list[Series]
  tokens: int
  measured: str = ''


def row(
  name: str, tuned: tuning.Tuned, losses: Sequence[float], runs: list[Run]
) -> Row:
  """Reads what a table and a picture need from the runs of a method."""
  config, metrics = runs[0].config, [run.metrics for run in runs]
  curves = [m['eval/loss'] for m in metrics if 'eval/loss' in m]
  tokens = branch.tokens(config, config.num_steps)
  return Row(name, tuned, np.array(losses), curves, tokens)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
  """Returns the header and the cells; the first row is the baseline."""
  first = rows[0]
  fields = list(dict.fromkeys(f for r in rows for f in r.tuned.fields))
  body = [
    [
      r.name,
      *(_value(r.tuned, field) for field in fields),
      str(r.tuned.count),
      mean(r.losses),
      minus(r, first),
    ]
    for r in rows
  ]
  names = [field.removeprefix('optimizer.') for field in fields]
  return ['method', *names, 'tried', 'loss', f'minus {first.name}'], body


def _value(tuned, field):
  if field not in tuned.fields:
    return '-'
  edge = tuned.searches[field].edge
  return f'{tuned.fields[field]:.8g}{" or " + edge if edge else ""}'


def mean(losses: np.ndarray) -> str:
  """Formats losses of several seeds in nats, with a 95 % interval."""
  bad = int(np.sum(~np.isfinite(losses)))
  if bad:
    return f'{bad} of {losses.size} diverged'
  if losses.size < 2:
    return f'{losses[0]:.4f}'
  found = comparison.difference(losses, np.zeros(losses.size))
  return f'{found.mean:.4f} ±{found.high - found.mean:.4f}'


def minus(r: Row, first: Row) -> str:
  """Formats the difference from the baseline, paired by seed."""
  if r.measured != first.measured:
    return 'other tokens'
  return '' if r is first else paired(r.losses, first.losses)


def paired(losses: Sequence[float], baseline: Sequence[float]) -> str:
  """Formats the mean difference of losses of the same seeds; '' if diverged."""
  if not np.isfinite([*losses, *baseline]).all():
    return ''
  found = comparison.difference(losses, baseline)
  return str(found) if len(losses) > 1 else f'{found.mean:+.4f}'


def legend(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
  """Returns what the columns mean, and `notes` of what is unequal."""
  first, n = rows[0], rows[0].losses.size
  lines = [
    f'loss: final validation loss in nats, mean of {n} seed(s) that were not '
    'used to tune.',
    f'minus {first.name}: paired by seed (same data and, where the models are '
    'the same, initial numbers).',
    *_interval(n),
    'tried: settings of the search; "or lower", "or higher": it had to stop '
    'there (--most).',
  ]
  if not np.isfinite(first.losses).all():
    lines.append(f'{first.name} diverged: there are no differences to it.')
  return '\n'.join([*lines, *notes])


def _interval(seeds):
  if seeds < 2:
    return ['One seed: there are no intervals.']
  return [
    "±: 95 % over seeds (Student's t), for these validation tokens and these "
    'tuned values; one of 20 such intervals misses the truth.'
  ]


def markdown(
  rows: Sequence[Row], command: str, notes: Sequence[str] = ()
) -> str:
  """Returns the table as text, with the command and what the columns mean."""
  header, body = table(rows)
  line = lambda cells: f'| {" | ".join(cells)} |'
  lines = [line(header), line(['---'] * len(header)), *map(line, body)]
  return '\n'.join([f'`{command}`', '', *lines, '', legend(rows, notes)]) + '\n'


def as_json(rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, Any]:
  """Returns all numbers; a difference is [mean, low, high], None
  if one diverged or they were measured on other tokens.
  """
  finite = lambda x: float(x) if np.isfinite(x) else None
  found = []
  for r in rows:
    both = np.isfinite([*r.losses, *rows[0].losses]).all()
    both = both and r.measured == rows[0].measured
    found.append({
      'method': r.name,
      'tuned': r.tuned.fields,
      'edge': {k: x.edge for k, x in r.tuned.searches.items()},
      'searches': {
        k: [[value, finite(loss)] for value, loss in x.losses.items()]
        for k, x in r.tuned.searches.items()
      },
      'losses': [finite(x) for x in r.losses],
      'minus_first': [
        finite(x) for x in comparison.difference(r.losses, rows[0].losses)
      ] if both else None,
      'tokens': r.tokens,
    })  # fmt: skip
  return {'seeds': list(seeds), 'methods': found}
