"""Entries of benchmarks/RESULTS.md, with date, device and command: --write.

python -m benchmarks.data --write
"""

import contextlib
import datetime
import functools
import io
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence

from absl import flags

from lm.errors import UserError

_KEYS = ('model name', 'cpu family')
_RESULTS = pathlib.Path(__file__).with_name('RESULTS.md')


def entry(title: str) -> Callable[..., Callable]:
  """Makes a `main` that enters what it prints in RESULTS.md, with --write."""
  write = flags.DEFINE_bool(
    'write', False, 'enter the output in RESULTS.md', module_name=sys.argv[0]
  )

  def decorate(main):
    @functools.wraps(main)
    def wrapped(*args):
      _check_lists()
      if not write.value:
        return main(*args)
      printed = _Copy()
      with contextlib.redirect_stdout(printed):
        code = main(*args)
      enter(title, printed.getvalue())
      return code

    return wrapped

  return decorate


def _check_lists():
  """Refuses an empty list of what is to be measured."""
  for flag in flags.FLAGS.flags_by_module_dict().get(sys.argv[0], []):
    listed = isinstance(flag.parser, flags.ListParser)
    if listed and flag.default and not any(flag.value):
      raise UserError(
        f'--{flag.name} is empty; by default it is {",".join(flag.default)}.'
      )


def enter(title: str, text: str) -> None:
  """Puts an entry on top of RESULTS.md; text without a table stays as it is."""
  import jax  # late: a benchmark sets the environment of jax first

  device = jax.devices()[0].device_kind
  if jax.default_backend() == 'cpu':
    device = f'{_processor()}, {os.cpu_count()} cores'
  name = pathlib.Path(sys.argv[0]).stem
  given = shlex.join(a for a in sys.argv[1:] if a != '--write')
  given = re.sub(r"(--peer_dir[= ])('[^']*'|\S+)", r'\1PEERS', given)
  command = f'python -m benchmarks.{name} {given}'.strip()
  text = text.strip('\n')
  if '| --- |' not in text:
    text = f'```\n{text}\n```'
  new = (
    f'## {datetime.date.today()}, {title} ({device})\n\n`{command}`, Python '
    f'{platform.python_version()}, jax {jax.__version__}:\n\n{text}\n\n'
  )
  old = _RESULTS.read_text()
  at = old.index('## ')
  _RESULTS.write_text(old[:at] + new + old[at:])
  print(f'\nentered in {_RESULTS}')


def spread(values: Sequence[float]) -> str:
  """Returns 'median (least .. largest)'."""
  middle, low, high = (f(values) for f in (statistics.median, min, max))
  return f'{middle:.2f} ({low:.2f} .. {high:.2f})'


def _processor() -> str:
  """Returns its name and family, if this system tells them."""
  about = pathlib.Path('/proc/cpuinfo')
  text = about.read_text() if about.is_file() else ''
  found = [re.search(rf'^{key}\s*: (.*)', text, re.M) for key in _KEYS]
  return ', family '.join(m[1] for m in found if m) or platform.processor()


class _Copy(io.StringIO):
  """Keeps what is printed, and prints it."""

  def write(self, text: str) -> int:
    sys.__stdout__.write(text)
    sys.__stdout__.flush()
    return super().write(text)
