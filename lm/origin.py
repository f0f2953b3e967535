"""What a run was made with: hashes of its code, the commit, versions."""

import functools
import hashlib
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from ml_collections import ConfigDict

from lm import follow, log, spec

_PACKAGES = (
  'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy'
)  # fmt: skip


def code(config: ConfigDict) -> str:
  """Returns hashes of the optimizer, the schedules, and files they read."""
  schedules = [config.schedule, *(s for _, s in follow.parse(config).values())]
  found = [spec.code_hash('optimizers', config.optimizer.name)]
  found += [spec.code_hash('schedules', s.name) for s in schedules]
  tables = [pathlib.Path(s.path) for s in schedules if 'path' in s]
  found += [digest(path) for path in tables if path.is_file()]
  return '-'.join(found)


@functools.cache
def library() -> str:
  """Returns a hash of the code of lm/."""
  folder = pathlib.Path(__file__).parent
  return spec.hash_of_code(sorted(folder.glob('*.py')))


def everything(config: ConfigDict) -> str:
  """Returns hashes of all code that decides what a run computes."""
  return f'{code(config)}-{library()}'


def digest(path: pathlib.Path) -> str:
  """Returns 16 hex digits of a file."""
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def check_parent(config: Mapping[str, Any], data_fingerprint: str) -> None:
  """Warns if a branch's parent saw other data under the same names."""
  parent = pathlib.Path(config['branch'].rpartition('@')[0])
  old = log.read_config(parent)
  fields = ('data', 'seq_len', 'seed', 'batch_size')
  copied = not (parent / 'meta.json').is_file()  # without it
  meta = {} if copied else log.read_meta(parent)
  before = meta.get('data_fingerprint', data_fingerprint)
  if before != data_fingerprint and all(old[f] == config[f] for f in fields):
    print(
      f'warning: the data have changed since {parent} was trained: it saw '
      f'{before}, this branch sees {data_fingerprint}.'
    )


def check(meta: Mapping[str, Any], config: ConfigDict) -> dict[str, str]:
  """Warns if a run goes on with other code.

  Args:
    meta: of the run's last start; empty at the first.
    config: of the run.

  Returns:
    {step: `code` until then} of all changes of the optimizer, the schedule
    and its tables, for meta.json.
  """
  before, found = dict(meta.get('code_before', {})), code(config)
  old, step = meta.get('code', found), meta.get('step', 0)
  if step and meta.get('code_of_lm', library()) != library():
    print(f'warning: the code of lm/ has changed since step {step}.')
  if old != found and step:
    before.setdefault(str(step), old)
    what = (
      f'optimizers/{config.optimizer.name}.py (or what it imports, or parts/)'
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
