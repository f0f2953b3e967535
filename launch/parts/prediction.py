"""Final losses of runs, and what a fit says of others (not a command)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch import cli
from launch.parts import curves, show
from lm import card, foreign_logs
from lm.errors import UserError
from schedules.theory import predict as theory

FAILS = (
  'Where this is known to fail: a constant learning rate (the bound exaggerates'
  ' its harm), divergence (the bound knows none), other batch sizes, models,'
  ' data or weight decay than those of the runs, differences below the noise'
  ' of seeds (about 0.002 at 124M), and cooldowns of nearly none or all of the'
  ' run (exaggerated). G = 1 is used: measured l2 norms of adaptive methods'
  ' predicted worse.'
)

_NEGATIVE = 'A predicted loss is below 0: this fit cannot be used.'


class Point(NamedTuple):
  """A run: the learning rates until its last loss, and that loss."""

  name: str
  lr: np.ndarray
  loss: float
  tag: str
  config: Mapping[str, Any]  # empty in a log of another trainer
  data: str  # its hash, of a run of ours


# What may differ: the bound is about it, or it changes no loss.
_MAY_DIFFER = (
  *card.MAY_CHANGE, 'seed', 'num_steps', 'learning_rate', 'schedule.',
  'checkpoint.', 'branch', 'diagnostics', 'log_nuclear_norm',
  'grad_accum_steps',
)  # fmt: skip


def point(text: str, tag: str, lr_tag: str, last: int) -> Point:
  """Reads a run or log; the loss is the mean of the `last` values.

  Raises:
    UserError: diverged, no loss, no learning rate.
  """
  found = foreign_logs.read(text)
  if found.meta.get('status') == 'diverged':
    raise UserError(f'{text} diverged; the bound knows no divergence.')
  name = foreign_logs.tag_of(found, 'loss', tag)
  series = found.tags[name]
  loss = float(series.value[-last:].mean())
  if not np.isfinite(loss):
    raise UserError(f"{text}: the last value of '{name}' is {loss}.")
  lr = foreign_logs.learning_rates(found, lr_tag, '--lr_tag')
  lr = lr[: int(series.step[-1])]
  if lr.size < 2 or not lr.max() > 0:
    raise UserError(f"{text}: '{name}' ends at step {series.step[-1]}.")
  data = found.meta.get('data_fingerprint', '')
  return Point(text, lr, loss, name, found.config, data)


def warn(points: Sequence[Point]) -> None:
  """Says what differs between runs of ours that should not."""
  ours = [p for p in points if p.config]
  fields = {
    field
    for p in ours
    for field in card.diff(ours[0].config, p.config)
    if field == 'eval.num_sequences' or not field.startswith(_MAY_DIFFER)
  }
  if len({p.data for p in ours}) > 1:
    fields.add('the data (their hash)')
  if fields:
    print(
      f'warning: the runs differ in {", ".join(sorted(fields))}: one fit of '
      'their losses means little.'
    )


class Fitted(NamedTuple):
  fit: theory.Fit
  points: Sequence[Point]
  level: float

  def loss(self, lr) -> float:
    return theory.loss(self.fit, lr)

  def uncertainty(self, lrs) -> theory.Uncertainty:
    used, losses = _columns(self.points)
    return theory.uncertainty(self.fit, used, losses, lrs, level=self.level)


def fit(points: Sequence[Point], level: float) -> Fitted:
  """Fits the runs.

  Raises:
    UserError: too few runs or learning rates, or a bad level.
  """
  if not 0 < level < 1:
    raise UserError(f'--level={level} must lie between 0 and 1.')
  tags = {p.tag for p in points}
  if len(tags) > 1:
    raise UserError(
      f'the runs log different losses, {", ".join(sorted(tags))}; choose one '
      'by --tag.'
    )
  for i, p in enumerate(points):
    for q in points[:i]:
      if p.loss == q.loss and np.array_equal(p.lr, q.lr):
        raise UserError(
          f'--runs: {q.name} and {p.name} are one run, with the same rates and '
          'loss; legal: each run once.'
        )
  with cli.user_errors():
    return Fitted(theory.fit(*_columns(points)), points, level)


def _columns(points):
  return [p.lr for p in points], [p.loss for p in points]


def leave_one_out(points: Sequence[Point]) -> tuple[float, float] | None:
  """Returns mean absolute errors of the fit and of the mean of the others.

  None when a fit without one of the runs is impossible.
  """
  errors, nulls = [], []
  for i, p in enumerate(points):
    others = [*points[:i], *points[i + 1 :]]
    try:
      fitted = theory.fit(*_columns(others))
    except ValueError:
      return None
    errors.append(abs(theory.loss(fitted, p.lr) - p.loss))
    nulls.append(abs(np.mean([o.loss for o in others]) - p.loss))
  return float(np.mean(errors)), float(np.mean(nulls))


def print_fit(fitted: Fitted) -> None:
  """Prints the runs of the fit, and how well they predict each other."""
  rows = [
    [p.name, f'{p.lr.max():.3g}', p.lr.size, f'{p.loss:.4f}',
     f'{fitted.loss(p.lr):.4f}']
    for p in fitted.points
  ]  # fmt: skip
  header = ['run of the fit', 'peak', 'steps', 'loss', 'fitted']
  show.table(header, rows)
  f = fitted.fit
  print(
    f'{fitted.points[0].tag} = {f.offset:.4f} + {f.slope:.4g} x bound, '
    f'D/G = {f.distance:.4g}'
  )
  if f.slope <= 0:
    print('These losses do not grow with the bound: nothing can be predicted.')
  elif f.offset < 0:
    print(
      'The offset, the least loss that this fit allows, is negative: what it '
      f'says far below {min(p.loss for p in fitted.points):.4f} are guesses.'
    )
  if len(fitted.points) == 3:
    print(
      'Three runs leave no degree of freedom: that they are fitted says '
      'nothing, and there are no intervals; give four or more.'
    )
  each = leave_one_out(fitted.points)
  if each:
    print(
      f'left out in turn, mean error: {each[0]:.4f}; of the mean of the '
      f'others: {each[1]:.4f}'
    )
    if each[0] >= each[1]:
      print('These runs do not predict each other: what follows are guesses.')


def print_held_out(fitted: Fitted, held: Sequence[Point]) -> list[tuple]:
  """Prints and returns (name, measured, predicted, half width) of each run."""
  half = fitted.uncertainty([p.lr for p in held]).loss
  found = [
    (p.name, p.loss, fitted.loss(p.lr), h)
    for p, h in zip(held, half, strict=True)
  ]
  rows = [
    [n, f'{want:.4f}', f'{got:.4f}', _half(h), f'{got - want:+.4f}']
    for n, want, got, h in found
  ]
  level = f'± ({fitted.level:.0%})'
  show.table(['held out', 'loss', 'predicted', level, 'error'], rows)
  mean = np.mean([p.loss for p in fitted.points])
  error = np.mean([abs(g - w) for _, w, g, _ in found])
  null = np.mean([abs(mean - w) for _, w, _, _ in found])
  print(
    f'mean error of {len(found)} held-out runs: {error:.4f}; of the mean of '
    f'the runs of the fit: {null:.4f}'
  )
  if any(got < 0 for _, _, got, _ in found):
    print(_NEGATIVE)
  return found


def print_others(
  fitted: Fitted, names: Sequence[str], lengths: Sequence[int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Prints the best peak and its loss; returns loss by peak, to be drawn."""
  rows, lines = [], {}
  peaks = [p.lr.max() for p in fitted.points]
  for steps in lengths:
    for name in names:
      m = curves.curve(name, steps).value
      best = theory.best_peak(fitted.fit, m)
      about = fitted.uncertainty([best * m])
      rows.append(
        [name, steps, f'{best:.3g}', _range(best, about.peak),
         f'{fitted.loss(best * m):.4f}', _half(about.loss[0])]
      )  # fmt: skip
      at = np.geomspace(min(*peaks, best) / 2, max(*peaks, best) * 2, 40)
      label = f'{name}, {steps} steps' if len(lengths) > 1 else name
      lines[label] = (at, np.array([fitted.loss(x * m) for x in at]))
  level = f'{fitted.level:.0%}'
  header = ['schedule', 'steps', 'best peak', level, 'loss there',
            f'± ({level})']  # fmt: skip
  show.table(header, rows)
  if len(peaks) > 3 and any('-' in (row[3], row[5]) for row in rows):
    print('-: the runs do not tell it.')
  low, high = min(peaks), max(peaks)
  if any(not low <= float(r[2]) <= high for r in rows):
    print(f'Peaks outside {low:.3g} to {high:.3g}, of the runs, are guesses.')
  if any(float(r[4]) < 0 for r in rows):
    print(_NEGATIVE)
  return lines


def _half(x: float) -> str:
  return f'{x:.4f}' if np.isfinite(x) else '-'


def _range(best: float, factor: float) -> str:
  if not factor < 1e3:
    return '-'
  return f'{best / factor:.3g} to {best * factor:.3g}'


def common(points: Sequence[Point]) -> int:
  """Returns the largest number of steps of the runs."""
  return max(p.lr.size for p in points)
