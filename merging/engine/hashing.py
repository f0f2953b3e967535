"""SHA-256 of files, beside the merge that reads them."""

import concurrent.futures
import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

Inputs = Mapping[str, pathlib.Path]  # {name: file or folder}
Listing = dict[str, dict[str, pathlib.Path]]  # {name: {file below it: path}}
Digests = dict[str, dict[str, str]]  # {name: {file below it: SHA-256}}
_THREADS = 2


def sha256(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file; ValueError if it cannot be read."""
  try:
    with path.open('rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()
  except OSError as e:
    raise ValueError(f"'{path}' cannot be hashed: {e.strerror}.") from e


@contextlib.contextmanager
def beside(
  paths: Iterable[pathlib.Path],
) -> Iterator[Callable[[pathlib.Path], str]]:
  """Hashes files in threads, each once; yields what waits for one of them."""
  pool = concurrent.futures.ThreadPoolExecutor(_THREADS, 'sha256')
  found = {path: pool.submit(sha256, path) for path in dict.fromkeys(paths)}
  try:
    yield lambda path: found[path].result()
  finally:
    pool.shutdown(cancel_futures=True)


def below(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns a file, or all files below a folder, in order."""
  if path.is_file():
    return [path]
  return sorted(p for p in path.rglob('*') if p.is_file())


def listing(inputs: Inputs) -> Listing:
  """Returns every file of every input."""
  place = lambda file, path: (
    file.name if file == path else file.relative_to(path).as_posix()
  )
  return {
    name: {place(file, path): file for file in below(path)}
    for name, path in inputs.items()
  }


def digests(
  files: Listing, sha: Callable[[pathlib.Path], str] = sha256
) -> Digests:
  """Returns the SHA-256 of all of them; ValueError if one cannot be read."""
  return {
    name: {key: sha(path) for key, path in each.items()}
    for name, each in files.items()
  }
