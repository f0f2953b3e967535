"""Signals that ask a run to stop."""

import os
import signal
import sys

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Notices SIGTERM and Ctrl-C; a second Ctrl-C interrupts at once.

  What one inside of another notices, the other knows when it ends.
  """

  def __enter__(self):
    self._noticed = self.at_once = False
    # Of several processes, jax's own handler of SIGTERM tells the others.
    self._several = jax.process_count() > 1
    signals = (
      [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
    )
    self._old = {s: signal.signal(s, self._notice) for s in signals}
    return self

  def _notice(self, number, frame):
    if self._noticed and number == signal.SIGINT:
      self.at_once = True
      raise KeyboardInterrupt
    self._noticed = True
    print('stopping after this step; saving', file=sys.stderr, flush=True)
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)

  def reached(self, n: int) -> bool:
    """Returns whether to stop at step `n`: the same on all processes."""
    if self._several:
      return multihost_utils.reached_preemption_sync_point(n)
    return self._noticed

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)
      outer = getattr(handler, '__self__', None)
      if isinstance(outer, Preemption):
        outer._noticed |= self._noticed
