"""Rows of a CSV log, with a warning of cells that cannot be used."""

import csv
import math
import pathlib
from typing import Any


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows by column; says how many hold what is no finite number.

  An empty cell is no mistake (not every line logs everything), nor is a column
  without any number.
  """
  with path.open(newline='', encoding='utf-8-sig') as f:
    reader = csv.DictReader(f)
    rows = [(reader.line_num, row) for row in reader]
  columns = {k for _, row in rows for k, x in row.items() if _finite(x)}
  given = lambda x: x is not None and x.strip()
  bad = [
    line
    for line, row in rows
    if any(given(row[k]) and not _finite(row[k]) for k in columns)
  ]
  if bad:
    print(
      f'warning: {len(bad)} of {len(rows)} rows of {path} have cells that are '
      f'no finite number and are not used, the first in line {bad[0]}.'
    )
  return [row for _, row in rows]


def number(x: Any) -> float | None:
  """Returns what a cell says, None if that is no number."""
  try:
    return float(x)
  except (TypeError, ValueError):
    return None


def _finite(x):
  value = number(x)
  return value is not None and math.isfinite(value)
