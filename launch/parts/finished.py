"""Whether a merge is on disk already (not a command)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm import log
from lm.errors import UserError


def is_done(
  out: pathlib.Path, about: Mapping[str, Any], items: Sequence[str]
) -> bool:
  """Returns whether `out` has this very merge, but for versions and time.

  Raises:
    UserError: its merge.json is there, and one of `items` is not.
  """
  if not (out / 'merge.json').is_file():
    return False
  for item in items:
    if not (out / item).exists():
      raise UserError(
        f"'{out}' is incomplete: it has merge.json and no {item}; remove it "
        'and merge again.'
      )
  old = log.read_json(out / 'merge.json')
  fields = ('method', 'sources', 'accumulate', 'dtype')
  return all(old.get(f) == about[f] for f in fields)
