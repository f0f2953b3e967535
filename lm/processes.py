"""Several processes of one run: they go on together or stop together.

An error on one process alone would leave the others waiting for it, for
minutes and without a word. All functions here are called by all processes.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.errors import UserError

T = TypeVar('T')
_BYTES = 2000  # longer texts are cut


def gather(text: str) -> list[str]:
  """Returns the text of each process."""
  if jax.process_count() == 1:
    return [text]
  mine = text.encode()[:_BYTES].ljust(_BYTES, b'\0')
  rows = multihost_utils.process_allgather(np.frombuffer(mine, np.uint8))
  return [bytes(r).rstrip(b'\0').decode(errors='replace') for r in rows]


def together(action: Callable[[], T], error: type[UserError] = UserError) -> T:
  """Returns `action()`; if it fails on one process, it fails on all.

  Args:
    action: it may raise `error`, and must not wait for other processes.
    error: the type that is passed on to all processes.
  """
  result, mistake = None, None
  try:
    result = action()
  except error as e:
    mistake = e
  found = [m for m in gather(str(mistake or '')) if m]
  if found:
    raise mistake or error(found[0])
  return result


def check_alike(what: str, text: str) -> None:
  """Raises UserError unless all processes have the same text."""
  found = gather(text)
  if len(set(found)) > 1:
    listed = ', '.join(f'{i}: {t}' for i, t in enumerate(found))
    raise UserError(f'{what} must be the same on all processes, not {listed}.')


def check_fields(what: str, fields: Mapping[str, Any]) -> None:
  """As `check_alike` of a config; the sentence has the part that differs."""
  text = {k: json.dumps(v, sort_keys=True) for k, v in fields.items()}
  digest = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
  if len(set(gather(digest.hexdigest()))) == 1:
    return
  check_alike(f'The fields of {what}', ', '.join(sorted(text)))
  for name in sorted(text):  # the same names on all
    check_alike(f'{what}.{name}', text[name])
  # Where the texts differ only behind what is gathered of them.
  raise UserError(f'The {what} must be the same on all processes.')


def check_shared(path: pathlib.Path) -> None:
  """Raises UserError unless a file written by process 0 is seen by all."""
  seen = gather('yes' if path.exists() else '')
  if not all(seen):
    raise UserError(
      f'Process {seen.index("")} does not see {path}: the --workdir must be on '
      'storage that all processes share.'
    )
