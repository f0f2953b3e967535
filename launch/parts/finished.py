"""Whether a merge is on disk already (not a command)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm import log
from lm.errors import UserError
from merging.engine import artifact, atomic, hashing, plan
from merging.engine.plan import Sources


def is_done(
  out: pathlib.Path,
  about: Mapping[str, Any],
  items: Sequence[str],
  sources: Sources = (),
  hashed: Mapping[str, pathlib.Path] | None = None,
) -> bool:
  """Returns whether `out` has this very merge, but for versions and time.

  Raises:
    UserError: its merge.json is there, and one of `items` is not, or has arrays
      that cannot be opened; it does not record the files of `hashed`
      (`artifact.write_at`) as they are.
    ValueError: `out` is something else.
  """
  done = _is_done(out, about, items, sources, hashed)
  if not done:
    atomic.refuse(out)
  return done


def _is_done(out, about, items, sources, hashed):
  if not (out / 'merge.json').is_file():
    return False
  for item in items:
    try:
      plan.check_item(out / item)
    except ValueError as e:
      what = f'no {item}' if not (out / item).exists() else f'this mistake: {e}'
      raise UserError(
        f"'{out}' is incomplete: it has merge.json and {what.rstrip('.')}; "
        'remove it and merge again.'
      ) from e
  old = log.read_json(out / 'merge.json')
  rows = old.get('sources') if isinstance(old, dict) else None
  if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
    return False
  contents = [row.pop('sha256', None) for row in rows]
  fields = ('method', 'accumulate', 'dtype')
  if rows != about['sources'] or any(old.get(f) != about[f] for f in fields):
    return False
  if contents != artifact.digests(sources, about['method'].get('tree', '')):
    return False
  if hashed:
    _check_files(
      out, old.get('files', {}), hashing.digests(hashing.listing(hashed))
    )
  return True


def _check_files(out, old, new):
  for name, digests in new.items():
    for file in sorted({*digests, *old.get(name, {})}):
      if old.get(name, {}).get(file) != digests.get(file):
        raise UserError(
          f"'{out}' is this very merge, but its merge.json does not have the "
          f"SHA-256 that '{name}/{file}' has now; use another name."
        )
