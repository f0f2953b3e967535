"""A merged checkpoint with its provenance: <run>/merged/<name>/.

`params` is an ordinary Orbax item, `merge.json` says what it was made of; the
two appear together.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merging.engine import atomic, coefficients, stream
from merging.engine.plan import Options, Path, Sources

_PACKAGES = ('numpy', 'tensorstore', 'orbax-checkpoint', 'jax')


def provenance(
  run_dir: Path,
  sources: Sources,
  *,
  method: Mapping[str, Any],
  learning_rates: Sequence[float] | None = None,
  **options: Any,
) -> dict[str, Any]:
  """Returns the content of merge.json, before anything is read or written.

  Args:
    run_dir: the run; paths of sources are stored relative to it.
    sources: pairs (<run>/checkpoints/<step>/<item>, coefficient), oldest
      first; the mean of an interval before the parameters at its end.
    method: what chose the coefficients: name, shape, floor, grid, ...
    learning_rates: used in the block that ends with each source; adds the
      effective learning rate of the merge, multiplier * learning_rate.
    **options: as for `stream.merge`.
  """
  made_with = Options(**options)
  c = [float(x) for _, x in sources]
  multipliers = [1.0, *coefficients.forward(c).tolist()]
  rows = []
  for i, (path, coefficient) in enumerate(sources):
    path = pathlib.Path(path)
    step = path.parent.name
    row = {
      'path': os.path.relpath(path, run_dir),
      'step': int(step) if step.isdecimal() else None,
      'item': path.name,
      'coefficient': float(coefficient),
      'multiplier': multipliers[i],
      'sha256': _sha256(path),
    }
    if learning_rates is not None:
      row['learning_rate'] = float(learning_rates[i])
      row['effective_learning_rate'] = multipliers[i] * row['learning_rate']
    rows.append(row)
  now = datetime.datetime.now(datetime.UTC)
  return {
    'method': dict(method),
    'sources': rows,
    'effective_count': coefficients.effective_count(c),
    'accumulate': made_with.accumulate,
    'dtype': made_with.dtype or 'as stored',
    'versions': _versions(),
    'created': now.isoformat(timespec='seconds'),
  }


def write(
  run_dir: Path,
  name: str,
  *,
  sources: Sources,
  provenance: Mapping[str, Any],
  before_commit: Callable[[pathlib.Path], None] | None = None,
  **options: Any,
) -> pathlib.Path:
  """Writes <run_dir>/merged/<name>/{params,merge.json} and returns its path.

  Args:
    run_dir: the run.
    name: of the merge.
    sources, **options: as for `stream.merge`.
    provenance: the content of merge.json.
    before_commit: called with the unfinished directory when all is read and
      written: it may add files; what it raises leaves no result.

  Raises:
    ValueError: a name that is not a plain file name; as `stream.merge`.
  """
  if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.=+-]*', name):
    raise ValueError(
      f"name='{name}' must be a plain file name: letters, digits and _ . = + -."
    )
  out = pathlib.Path(run_dir) / 'merged' / name
  text = json.dumps(provenance, indent=2) + '\n'
  with atomic.directory(out) as temporary:
    (temporary / 'params').mkdir()
    stream.write_item(sources, temporary / 'params', **options)
    (temporary / 'merge.json').write_text(text)
    if before_commit:
      before_commit(temporary)
  return out


def _sha256(item):
  """Hashes an item's metadata; the manifest names every block of its data."""
  digest = hashlib.sha256()
  for file in ('_METADATA', 'manifest.ocdbt'):
    path = item / file
    if path.is_file():
      digest.update(path.read_bytes())
  return digest.hexdigest()


def _versions():
  found = {'python': platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
