"""A schedule read from a file: refined, logged or drawn by hand."""

import csv
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from schedules.parts import phases


def table(num_steps: int, *, path: str = '') -> Callable[[Any], Any]:
  """Multipliers from an .npz, .csv or .json file.

  The file holds `multiplier` and, when it does not list every step, `step`
  (increasing) and `num_steps`, the length of the run that it describes (one
  more than its last step when absent). A table of another length is stretched
  so that first and last step fall on first and last step; between points the
  multiplier is linear, outside it keeps the nearest one.

  Raises:
    ValueError: a file or key that is missing or not readable, lists of
      different lengths, multipliers outside [0, 1] or not finite, steps that
      do not increase.
  """
  phases.check_steps(num_steps)
  values = jnp.asarray(_resample(read(path), num_steps), jnp.float32)

  def multiplier(step):
    return values[jnp.clip(jnp.asarray(step, jnp.int32), 0, num_steps - 1)]

  return multiplier


def read(path: str) -> dict[str, np.ndarray]:
  """Returns {'step', 'multiplier', 'num_steps'} of a file, checked, float64."""
  if not pathlib.Path(path).is_file():
    raise ValueError(f"path='{path}' is not a file with multipliers.")
  suffix = pathlib.Path(path).suffix
  if suffix not in _READERS:
    raise ValueError(
      f"'{path}' ends in '{suffix}'; legal: {', '.join(sorted(_READERS))}."
    )
  try:
    columns = _READERS[suffix](path)
    arrays = {k: np.asarray(columns[k], np.float64) for k in _KEYS & {*columns}}
  except _UNREADABLE as e:
    raise ValueError(f"'{path}' has no readable multipliers: {e}") from e
  if 'multiplier' not in arrays:
    raise ValueError(
      f"'{path}' has no key 'multiplier'; it has: {', '.join(sorted(columns))}."
    )
  return _check(path, arrays)


_KEYS = {'multiplier', 'step', 'num_steps'}
_UNREADABLE = (
  ValueError,
  TypeError,
  AttributeError,
  OSError,
  EOFError,
  zipfile.BadZipFile,
)


def _npz(path):
  with np.load(path, allow_pickle=False) as f:
    return {k: f[k] for k in f.files}


def _csv(path):
  with pathlib.Path(path).open(newline='') as f:
    rows = list(csv.DictReader(f, restkey='(unnamed)'))
  return {k: [row[k] for row in rows] for k in (rows[0] if rows else ())}


def _json(path):
  content = json.loads(pathlib.Path(path).read_text())
  return content if isinstance(content, dict) else {'multiplier': content}


_READERS = {'.npz': _npz, '.csv': _csv, '.json': _json}


def _check(path, arrays):
  m = arrays['multiplier']
  if m.ndim != 1 or not m.size:
    raise ValueError(
      f"'{path}' holds multipliers of shape {m.shape}; legal: one list."
    )
  if not np.isfinite(m).all() or m.min() < 0 or m.max() > 1:
    bad = m[~((m >= 0) & (m <= 1))][0]
    raise ValueError(
      f"'{path}' holds the multiplier {bad}; legal: 0 to 1 "
      '(divide by the maximum, which is the peak learning rate).'
    )
  steps = arrays.setdefault('step', np.arange(m.size, dtype=np.float64))
  if steps.shape != m.shape:
    raise ValueError(
      f"'{path}' holds {steps.size} steps for {m.size} multipliers."
    )
  if not (np.diff(steps) > 0).all() or not steps[0] >= 0:
    raise ValueError(f"the steps of '{path}' must increase from 0 on.")
  # A CSV repeats the length in every row.
  length = np.max(arrays.get('num_steps', steps[-1] + 1))
  if not steps[-1] < length < np.inf:
    raise ValueError(
      f"'{path}' says num_steps={length} but has the step {steps[-1]}."
    )
  return {'step': steps, 'multiplier': m, 'num_steps': length}


def _resample(content, num_steps):
  length = content['num_steps']
  position = np.arange(num_steps, dtype=np.float64)
  if length != num_steps:
    position *= (length - 1) / max(num_steps - 1, 1)
  return np.interp(position, content['step'], content['multiplier'])
