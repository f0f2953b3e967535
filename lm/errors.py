"""The one exception that means: the user can fix this, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """One clear sentence with the offending value and the legal ones."""


def did_you_mean(word: str, legal: Iterable[str]) -> str:
  """Returns " Did you mean 'x'? Legal: a, b, x." for an unknown `word`."""
  legal = sorted(legal)
  near = difflib.get_close_matches(str(word), legal, n=1, cutoff=0.5)
  hint = f" Did you mean '{near[0]}'?" if near else ''
  return f'{hint} Legal: {", ".join(legal)}.'
