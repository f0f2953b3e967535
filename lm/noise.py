"""Keeps quiet what libraries print beside an exception that says it."""

import logging
import os
import re
import signal
import sys
import threading
from typing import Any

from lm.errors import FULL

_SAID = re.compile(
  # Orbax, when one item is read without its whole checkpoint. Of a damaged one,
  # lm/checkpoint.py's Damaged says it.
  r'Metadata file does not exist|Failed to get item metadata'
  # Orbax, of a full disk: dozens of tracebacks beside the one that is raised.
  rf'|.*({FULL.pattern})|.*Save Finalize thread'
  r'|.*cannot schedule new futures after shutdown',
  re.DOTALL,
)
# Orbax closes its event loop at the first error of a read; the other reads then
# complain, dozens of times, that it is closed.
_CLOSED = 'Event loop is closed'


def quiet() -> None:
  """Filters two loggers and what cannot be raised; once is enough."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(wanted)
  if sys.unraisablehook is not unraisable:
    _hooks.append(sys.unraisablehook)
    sys.unraisablehook = unraisable


def wanted(record: logging.LogRecord) -> bool:
  """Returns whether a line of a log says what nothing else says."""
  _, error, _ = record.exc_info or (None, '', None)
  return not _SAID.match(f'{record.getMessage()} {error}')


def unraisable(found: Any) -> None:
  """A sys.unraisablehook."""
  if found.exc_type is KeyboardInterrupt:  # it hit a callback: once more
    # launch/cli.py raises SIGTERM with its number.
    term = getattr(found.exc_value, 'args', ()) == (signal.SIGTERM,)
    number = signal.SIGTERM if term else signal.SIGINT
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
  elif str(found.exc_value) != _CLOSED:
    _hooks[-1](found)


_hooks = [sys.__unraisablehook__]
