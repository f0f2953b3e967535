"""The one exception that means: the user can fix this, no traceback."""

import contextlib
import difflib
import pathlib
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator

# Files whose lines say nothing to a user: of libraries, and '<frozen ...>'.
_LIBRARIES = (
  '<', *(sysconfig.get_path(k) for k in ('stdlib', 'purelib', 'platlib'))
)  # fmt: skip


# What jax says of code that it cannot trace, in terms of this code.
_REMEDIES = {
  'TracerBoolConversionError': '`if` on an array, or on a float keyword, which '
  'is one; take jnp.where, or a bool, int or str keyword.',
  'TracerArrayConversionError': 'numpy on an array that is traced, as the step '
  'and float keywords are; take jnp, as jnp.asarray(table)[step].',
  'ConcretizationTypeError': 'a Python number is needed where an array is '
  'traced, as the step and float keywords are; take jnp for math.',
}


class UserError(ValueError):
  """One clear sentence with the offending value and the legal ones."""


# What systems say of a disk that takes no more.
FULL = re.compile('No space left on device|Disk quota exceeded|File too large')


def did_you_mean(word: str, legal: Iterable[str]) -> str:
  """Returns " Did you mean 'x'? Legal: a, b, x." for an unknown `word`."""
  legal = sorted(legal)
  near = difflib.get_close_matches(str(word), legal, n=1, cutoff=0.5)
  hint = f" Did you mean '{near[0]}'?" if near else ''
  words = ', '.join(word or "''" for word in legal)
  return f'{hint} Legal: {words or "none"}.'


def of_flag(text: str) -> str:
  """Returns a sentence of absl with our words for what is no number."""
  for theirs, ours in (
    ('invalid literal for int', 'an integer'),
    ('could not convert string to float', 'a number'),
  ):
    text = re.sub(f'^flag (.*): {theirs}.*', rf'\1 must be {ours}.', text)
  return text


@contextlib.contextmanager
def of_code(path: str) -> Iterator[None]:
  """Inside, whatever the user's Python file `path` raises is a UserError.

  It names the cause, and the innermost line that is not a library's.
  """
  try:
    yield
  except UserError:
    raise
  except SyntaxError as e:
    raise UserError(f"'{e.filename}', line {e.lineno}: {e.msg}.") from e
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    ours = [f for f in frames if not f.filename.startswith(_LIBRARIES)]
    at = f"'{path}'"  # the first two are this function and its caller
    if len(ours) > 2:
      file, line = pathlib.Path(ours[-1].filename), ours[-1].lineno
      own, here = file.name == pathlib.Path(path).name, pathlib.Path.cwd()
      file = file.relative_to(here) if file.is_relative_to(here) else file
      at = f"'{file}', line {line}" if own else f'{at} ({file}, line {line})'
    # What ml_collections says of an unknown field has the whole config in it.
    what = re.sub('(?s)Other fields present: .*?(?=Did you|$)', '', str(e))
    what, _, _ = what.partition('\n')
    what = _REMEDIES.get(type(e).__name__, what)
    raise UserError(f'{at}: {type(e).__name__}: {what}') from e


@contextlib.contextmanager
def through(path: str) -> Iterator[None]:
  """Does so if the exception came through a file of this name, else nothing."""
  with contextlib.ExitStack() as stack:
    try:
      yield
    except Exception as e:
      frames = traceback.extract_tb(e.__traceback__)
      name = f'/{path.rpartition("/")[2]}'
      ours = [
        f.filename for f in frames if not f.filename.startswith(_LIBRARIES)
      ]
      if any(file.endswith(name) for file in ours):
        stack.enter_context(of_code(path))
      raise
