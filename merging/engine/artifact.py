"""A merged checkpoint with its provenance, as <run>/merged/<name>/.

`params` is an ordinary Orbax item, `merge.json` says what it was made of; the
two appear together. Of safetensors the merge is the folder itself.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merging.engine import (
  atomic,
  coefficients,
  files,
  hashing,
  plan,
  stream,
)
from merging.engine.group import Group
from merging.engine.plan import Options, Path, Sources

_ALONE = Group()
_PACKAGES = ('numpy', 'tensorstore', 'orbax-checkpoint', 'jax')


def provenance(
  run_dir: Path,
  sources: Sources,
  *,
  method: Mapping[str, Any],
  steps: Sequence[int] | None = None,
  learning_rates: Sequence[float] | None = None,
  **options: Any,
) -> dict[str, Any]:
  """Returns the content of merge.json, before anything is read or written.

  `write` adds the SHA-256 that names the content of each source.

  Args:
    run_dir: the run; paths of sources are stored relative to it.
    sources: pairs (<run>/checkpoints/<step>/<item>, coefficient), oldest
      first; the mean of an interval before the parameters at its end.
    steps: of the sources; None = the names of their folders.
    method: what chose the coefficients: name, shape, floor, grid, ...
    learning_rates: used in the block that ends with each source; adds the
      effective learning rate of the merge, multiplier * learning_rate.
    **options: as for `stream.merge`.
  """
  made_with = Options(**options)
  plan.check_options(made_with)
  c = [float(x) for _, x in sources]
  multipliers = [1.0, *coefficients.forward(c).tolist()]
  rows = []
  for i, (path, coefficient) in enumerate(sources):
    path = pathlib.Path(path)
    name = path.parent.name
    step = int(name) if name.isdecimal() else None
    row = {
      'path': os.path.relpath(path, run_dir),
      'step': steps[i] if steps else step,
      'item': path.name,
      'coefficient': float(coefficient),
      'multiplier': multipliers[i],
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


def check_name(name: str) -> None:
  """Raises ValueError unless `name` is a plain file name."""
  if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}', name):
    raise ValueError(
      f"name='{name:.80}' must be a plain file name: at most 200 letters, "
      'digits and _ . = + -.'
    )


def write(
  run_dir: Path, name: str, *, sources: Sources, **options: Any
) -> pathlib.Path:
  """Writes <run_dir>/merged/<name>/{params,merge.json} and returns its path.

  Arguments and errors are those of `write_at`, and:

  Raises:
    ValueError: a name that is not a plain file name.
  """
  check_name(name)
  out = pathlib.Path(run_dir) / 'merged' / name
  write_at(out, 'params', sources=sources, **options)
  return out


def write_at(
  out: pathlib.Path,
  item: str,
  *,
  sources: Sources,
  provenance: Mapping[str, Any],
  hashed: hashing.Inputs | None = None,
  after_part: Callable[[pathlib.Path], None] | None = None,
  before_commit: Callable[[pathlib.Path], None] | None = None,
  group: Group = _ALONE,
  **options: Any,
) -> None:
  """Writes <out>/<item> and <out>/merge.json, together or not at all.

  Args:
    out: directory to create.
    item: of the result in it; '' = the result is `out` itself.
    sources, **options: as for `stream.merge`.
    provenance: the content of merge.json. What names the content of its
      'sources' is added; the first process hashes it meanwhile.
    hashed: inputs all of whose files are hashed, too, into its 'files'.
    after_part, before_commit: called with the unfinished directory, by every
      process after its part, by the first when all is written: they may add
      files; what they raise leaves no result.
    group: the processes that share the work.

  Raises:
    ValueError: as `stream.merge`.
  """

  def part(folder):
    done = stream.write_part(
      sources, folder / item, (group.index, group.count), **options
    )
    if after_part:
      after_part(folder)
    _flush(folder)
    return done

  def finish(folder, done):
    done()
    about = dict(provenance)
    if rows := provenance.get('sources'):
      about['sources'] = [
        {**row, 'sha256': opened.digest(sha)}
        for row, opened in zip(rows, named, strict=True)
      ]
    if hashed:
      about['files'] = hashing.digests(listed, sha)
    (folder / 'merge.json').write_text(json.dumps(about, indent=2) + '\n')
    if before_commit:
      before_commit(folder)
    _flush(folder)
    return ''

  for path, _ in sources:
    if out.resolve().is_relative_to(pathlib.Path(path).resolve()):
      raise ValueError(f"'{out}' lies in '{path}', one of its sources.")
  named = _named(sources, options.get('tree', ''))
  listed = hashing.listing(hashed or {})
  paths = [path for opened in named for path in opened.named_by]
  paths += [path for below in listed.values() for path in below.values()]
  with (
    atomic.directory(out, group) as temporary,
    hashing.beside(paths if group.index == 0 else []) as sha,
  ):
    (temporary / item).mkdir(exist_ok=True)
    done = group.together(lambda: part(temporary))
    group.first(lambda: finish(temporary, done))


def digests(sources: Sources, tree: str = '') -> list[str]:
  """Returns what names the content of each source."""
  named = _named(sources, tree)
  with hashing.beside(p for item in named for p in item.named_by) as sha:
    return [item.digest(sha) for item in named]


def _named(sources, tree):
  return [plan.open_item(pathlib.Path(path), tree) for path, _ in sources]


def _flush(folder):
  with plan.named(folder, 'all', 'written'):
    files.flush(folder)


def _versions():
  found = {'python': platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
