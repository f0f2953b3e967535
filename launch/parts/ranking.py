"""Tuned methods over seeds: table, text and numbers (not a command)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.parts import comparison, tuning
from lm.foreign_logs import Series
from lm.run import Run


@dataclasses.dataclass
class Row:
  """One method.

  fields: what was tuned, {field: value}; searches: how.
  losses: final validation loss of each seed in nats, inf if it diverged.
  curves: validation loss over the steps, of each seed.
  speed: tokens per second, median over steps and seeds.
  """

  name: str
  fields: dict[str, float]
  searches: dict[str, tuning.Found]
  losses: np.ndarray
  curves: list[Series]
  speed: float


def row(name: str, tuned: Any, losses: Sequence[float], runs: list[Run]) -> Row:
  """Reads what a table and a picture need from the runs of a method."""
  metrics = [run.metrics for run in runs]
  tag = 'throughput/tokens_per_second'
  speeds = [x for m in metrics if tag in m for x in m[tag].value]
  return Row(
    name,
    tuned.fields,
    tuned.searches,
    np.array(losses),
    [m['eval/loss'] for m in metrics if 'eval/loss' in m],
    float(np.median(speeds)) if speeds else float('nan'),
  )


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
  """Returns the header and the cells; the first row is the baseline."""
  first = rows[0]
  fields = list(dict.fromkeys(f for r in rows for f in r.fields))
  body = []
  for r in rows:
    tuned = [_value(r, field) for field in fields]
    count = sum(len(found.losses) for found in r.searches.values())
    speed = f'{first.speed / r.speed:.2f}'
    body.append([
      r.name, *tuned, str(count), _mean(r.losses), minus(r, first), speed
    ])  # fmt: skip
  names = [field.removeprefix('optimizer.') for field in fields]
  behind = f'minus {first.name}'
  return ['method', *names, 'tried', 'loss', behind, 'time'], body


def _value(r, field):
  if field not in r.fields:
    return '-'
  edge = r.searches[field].edge
  return f'{r.fields[field]:.3g}{" or " + edge if edge else ""}'


def _mean(losses):
  bad = int(np.sum(~np.isfinite(losses)))
  if bad:
    return f'{bad} of {losses.size} diverged'
  if losses.size < 2:
    return f'{losses[0]:.4f}'
  found = comparison.difference(losses, np.zeros(losses.size))
  return f'{found.mean:.4f} ±{found.high - found.mean:.4f}'


def minus(r: Row, first: Row) -> str:
  """Formats the difference from the baseline, paired by seed."""
  if r is first or not np.isfinite([*r.losses, *first.losses]).all():
    return ''
  found = comparison.difference(r.losses, first.losses)
  return str(found) if r.losses.size > 1 else f'{found.mean:+.4f}'


def legend(rows: Sequence[Row]) -> str:
  first = rows[0]
  n = first.losses.size
  return (
    f'loss: final validation loss in nats, mean of {n} seed(s) that were not '
    "used to tune, ± 95 % (Student's t).\n"
    f'minus {first.name}: paired by seed (same data, same initial numbers); of '
    '20 such intervals one misses the truth.\n'
    'tried: settings of the search; "or lower", "or higher": it ended '
    'there.\n'
    f'time: per step, times that of {first.name}, with all that the machine '
    'did beside.'
  )


def markdown(rows: Sequence[Row], command: str) -> str:
  """Returns the table as text, with the command and what the columns mean."""
  header, body = table(rows)
  line = lambda cells: f'| {" | ".join(cells)} |'
  lines = [line(header), line(['---'] * len(header)), *map(line, body)]
  return '\n'.join([f'`{command}`', '', *lines, '', legend(rows)]) + '\n'


def as_json(rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, Any]:
  """Returns all numbers; a difference is [mean, low, high], None diverged."""
  finite = lambda x: float(x) if np.isfinite(x) else None
  found = []
  for r in rows:
    both = np.isfinite([*r.losses, *rows[0].losses]).all()
    found.append({
      'method': r.name,
      'tuned': r.fields,
      'edge': {k: x.edge for k, x in r.searches.items()},
      'searches': {
        k: [[value, finite(loss)] for value, loss in x.losses.items()]
        for k, x in r.searches.items()
      },
      'losses': [finite(x) for x in r.losses],
      'minus_first': [
        finite(x) for x in comparison.difference(r.losses, rows[0].losses)
      ] if both else None,
      'tokens_per_second': finite(r.speed),
    })  # fmt: skip
  return {'seeds': list(seeds), 'methods': found}
