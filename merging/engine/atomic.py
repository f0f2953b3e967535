"""A directory appears whole or not at all, and never replaces another."""

import contextlib
import os
import pathlib
import secrets
import shutil
import socket
from collections.abc import Iterator

from merging.engine.group import Group

_ALONE = Group()


@contextlib.contextmanager
def directory(
  out: str | pathlib.Path, group: Group = _ALONE
) -> Iterator[pathlib.Path]:
  """Yields a temporary directory beside `out` that becomes `out` at the end.

  An exception removes it. What a killed process left is removed by the next
  write of the same `out` on the same machine. In a group all processes get the
  same directory, and process 0 makes, renames and removes it; inside, errors
  must be raised on all (`Group.together`).

  Raises:
    ValueError: `out` exists, or cannot be made.
  """
  out, made = pathlib.Path(out).absolute(), []
  temporary = pathlib.Path(group.first(lambda: str(_make(out, made))))
  try:
    yield temporary
    group.first(lambda: _commit(temporary, out))
  except BaseException:
    if group.index == 0:
      shutil.rmtree(temporary, ignore_errors=True)
      _remove_empty(made)
    raise


def _make(out, made):
  refuse(out)
  prefix = f'.{out.name}.tmp-{socket.gethostname()}-'
  token = secrets.token_hex(4)
  temporary = out.parent / f'{prefix}{os.getpid()}-{token}'
  try:
    made += [p for p in out.parents if not p.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(out.parent, prefix)
    temporary.mkdir()
  except OSError as e:
    _remove_empty(made)
    raise ValueError(f"'{out}' cannot be made: {e.strerror}.") from e
  return temporary


def _remove_empty(folders):
  for folder in folders:
    with contextlib.suppress(OSError):
      folder.rmdir()


def _commit(temporary, out):
  refuse(out)
  temporary.rename(out)
  return ''


def refuse(out: pathlib.Path) -> None:
  """Raises ValueError if `out` exists."""
  if os.path.lexists(out):
    raise ValueError(
      f"'{out}' exists and is never overwritten: choose another name."
    )


def _remove_left_behind(parent, prefix):
  for path in parent.iterdir():
    if not path.name.startswith(prefix):
      continue
    pid = path.name.removeprefix(prefix).split('-')[0]
    if pid.isdigit() and not _alive(int(pid)):
      shutil.rmtree(path, ignore_errors=True)


def _alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
