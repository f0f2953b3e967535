"""What a run was made with: hashes of its code, the commit, versions."""

import hashlib
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from ml_collections import ConfigDict

from lm import follow, spec

_PACKAGES = (
  'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy'
)  # fmt: skip


def code(config: ConfigDict) -> str:
  """Returns hashes of the optimizer, the schedules, and files they read."""
  schedules = [config.schedule, *(s for _, s in follow.parse(config).values())]
  found = [spec.code_hash('optimizers', config.optimizer.name)]
  found += [spec.code_hash('schedules', s.name) for s in schedules]
  tables = [pathlib.Path(s.path) for s in schedules if 'path' in s]
  digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  found += [digest(path) for path in tables if path.is_file()]
  return '-'.join(found)


def check(meta: Mapping[str, Any], config: ConfigDict) -> dict[str, str]:
  """Warns if a run goes on with other code of its optimizer or schedule.

  Args:
    meta: of the run's last start; empty at the first.
    config: of the run.

  Returns:
    {step: `code` until then} of all changes, for meta.json.
  """
  before, found = dict(meta.get('code_before', {})), code(config)
  old, step = meta.get('code', found), meta.get('step', 0)
  if old != found and step:
    before.setdefault(str(step), old)
    what = (
      f'optimizers/{config.optimizer.name}.py (or optimizers/parts)'
      if old.partition('-')[0] != found.partition('-')[0]
      else 'the schedule or a table that it reads'
    )
    print(
      f'warning: {what} has changed since step {step}: steps before and after '
      'it are of two methods. Undo the change, or use a new --workdir.'
    )
  return before


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the packages that compute."""
  found = {p: metadata.version(p) for p in _PACKAGES}
  return {'python': platform.python_version(), **found}


def git_commit() -> str:
  """Returns the commit of this code, with '-dirty' if a file is not in it."""

  def git(*args):
    done = subprocess.run(
      ['git', *args],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    )
    return done.stdout.strip()

  try:
    commit = git('describe', '--always', '--dirty', '--abbrev=40')
    new = git('ls-files', '--others', '--exclude-standard', '--', ':/*.py')
  except (OSError, subprocess.SubprocessError):
    return 'unknown'
  return f'{commit}-dirty' if new and not commit.endswith('-dirty') else commit
