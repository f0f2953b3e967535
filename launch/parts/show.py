"""How commands print tables and draw pictures (not a command)."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import console
from rich import table as rich_table

from lm.errors import UserError


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
  """Prints a table; all columns but the first are right-aligned."""
  # Wide enough for a file or a pipe, where there is no terminal to fit.
  out = console.Console(width=None if console.Console().is_terminal else 200)
  rows = [[str(x) for x in row] for row in rows]
  # Where it is narrow, nothing is cut off, and numbers stay whole.
  words = [
    ' '.join(column).split() for column in zip(header, *rows, strict=True)
  ]
  least = [min(max(map(len, each), default=0), 12) for each in words]
  roomy = sum(least) + 3 * len(least) < out.width
  grid = rich_table.Table(padding=(0, int(roomy)))
  for i, (name, width) in enumerate(zip(header, least, strict=True)):
    justify = 'left' if i == 0 else 'right'
    grid.add_column(name, justify=justify, overflow='fold', min_width=width)
  for row in rows:
    grid.add_row(*row)
  out.print(grid)


def loss(run: Any, losses: np.ndarray) -> tuple[str, str, str]:
  """Formats mean loss in nats, its standard error, and bits per byte."""
  mean = losses.mean()
  each = run.data.bytes_per_token
  bits = f'{mean / math.log(2) / each:.4f}' if each else '-'
  return f'{mean:.4f}', _error(losses), bits


def gain(last: np.ndarray, losses: np.ndarray) -> tuple[str, str]:
  """Formats the mean paired difference last - losses and its standard error."""
  d = last - losses
  return f'{d.mean():.4f}', _error(d)


def _error(x: np.ndarray) -> str:
  """Formats the standard error of a mean; two values do not tell it."""
  if len(x) < 3:
    return '-'
  error = x.std(ddof=1) / math.sqrt(len(x))
  return '<0.0001' if 0 < error < 1e-4 else f'{error:.4f}'


def coefficients(about: Mapping[str, Any], tokens: int = 0) -> None:
  """Prints coefficients and multipliers of a merge's provenance.

  tokens: of a step; with it, and with the rates of a run, also these.
  """
  rows = []
  none = {'multiplier': 0.0, 'effective_learning_rate': 0.0}
  later = [*about['sources'][1:], none]
  for row, after in zip(about['sources'], later, strict=True):
    mean = row['item'] == 'mean'  # falls linearly over the interval
    w = f'{row["multiplier"]:.4f}'
    w += f' -> {after["multiplier"]:.4f}' if mean else ''
    name = f'{row["step"]} {row["item"]}'.removesuffix(f' {row["step"]}')
    cells = [name, f'{row["coefficient"]:.6f}', w]
    if tokens:
      effective = f'{row["effective_learning_rate"]:.3e}'
      effective += f' -> {after["effective_learning_rate"]:.3e}' if mean else ''
      rate = f'{row["learning_rate"]:.3e}'
      cells[1:1] = [f'{row["step"] * tokens:,}', rate]
      cells.append(effective)
    rows.append(cells)
  header = ['checkpoint', 'c', 'w']
  if tokens:
    header = ['checkpoint', 'tokens', 'LR used', 'c', 'w', 'effective LR']
  table(header, rows)
  used = (
    'LR used: their mean; of an interval mean that of its first update.'
    if tokens
    else 'The learning rates used are not known here: w x LR is the result.'
  )
  print(
    'w: what the updates between the checkpoint before and this one are '
    f'multiplied by; 1 before the first. {used}'
  )
  effective_count(about)


def effective_count(about: Mapping[str, Any]) -> None:
  """Prints what a merge's provenance says of the noise that is left."""
  if len(about['sources']) == 1:
    print('This is that one item itself: nothing is averaged.')
    return
  items = {row['item'] for row in about['sources']}
  means = ', each a mean itself' if items & {'mean', 'moment'} else ''
  print(
    f'Averages noise like {about["effective_count"]:.1f} independent items of '
    f'equal weight{means} (1 / sum c^2).'
  )


def results_path(workdir: str, name: str, *suffixes: str) -> pathlib.Path:
  """Returns where the results go; refuses, early, what cannot be written."""
  if ',' in workdir:
    raise UserError(f"--workdir='{workdir}' must have no comma.")
  if pathlib.Path(workdir, 'config.json').exists():
    raise UserError(f"--workdir='{workdir}' is a run; use a directory of runs.")
  try:
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(
      f"--workdir='{workdir}' cannot be used: {e.strerror}."
    ) from e
  out = pathlib.Path(workdir, name)
  for path in (out, *map(out.with_suffix, suffixes)):
    if path.is_dir():
      raise UserError(f"'{path}' is a directory; use another --workdir.")
  return out


def save(figure: Any, path: pathlib.Path) -> None:
  """Writes a figure as PNG."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120, bbox_inches='tight')
