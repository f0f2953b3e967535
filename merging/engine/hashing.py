"""SHA-256 of every file of some inputs, beside the merge that reads them."""

import concurrent.futures
import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping

Inputs = Mapping[str, pathlib.Path]  # {name: file or folder}
Digests = dict[str, dict[str, str]]  # {name: {file below it: SHA-256}}


def digests(inputs: Inputs) -> Digests:
  """Returns the SHA-256 of every file of every input.

  Raises:
    ValueError: a file that cannot be read.
  """
  with beside(inputs) as found:
    return found()


@contextlib.contextmanager
def beside(inputs: Inputs) -> Iterator[Callable[[], Digests]]:
  """Does so in one thread, in bounded memory; yields what waits for the end."""
  pool = concurrent.futures.ThreadPoolExecutor(1, 'sha256')
  waiting = {
    name: {key: pool.submit(_digest, file) for key, file in _files(path)}
    for name, path in inputs.items()
  }
  try:
    yield lambda: {
      name: {key: future.result() for key, future in each.items()}
      for name, each in waiting.items()
    }
  finally:
    pool.shutdown(cancel_futures=True)


def _files(path):
  if path.is_file():
    return [(path.name, path)]
  found = sorted(p for p in path.rglob('*') if p.is_file())
  return [(p.relative_to(path).as_posix(), p) for p in found]


def _digest(path):
  try:
    with path.open('rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()
  except OSError as e:
    raise ValueError(f"'{path}' cannot be hashed: {e.strerror}.") from e
