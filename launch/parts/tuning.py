"""Search for a value by training (not a command)."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Found(NamedTuple):
  """What was measured, {value: loss} in that order, and the best value.

  edge: 'lower' or 'higher' where the search had to stop although it might be
    better there; '' if both neighbours of the best are no better.
  """

  losses: dict[float, float]
  best: float
  edge: str


def search(
  measure: Callable[[float], float],
  start: float,
  *,
  factor: float,
  most: int,
  legal: Callable[[float], bool] = lambda value: True,
) -> Found:
  """Finds a value whose neighbours, `factor` times it and less, are no better.

  Measures the start, and then a neighbour of the best so far that is missing,
  the lower one first. So every method gets the runs that it needs from its own
  start, and none is judged at the end of a range that was chosen for another.

  Args:
    measure: value -> loss; inf or NaN of a run that diverged.
    start: the first value, positive.
    factor: of two neighbours, above 1.
    most: measurements, at least 3.
    legal: whether a value may be measured.
  """
  losses: dict[int, float] = {}
  value = lambda k: start * factor**k

  def missing(k):
    return [k for k in (k - 1, k + 1) if k not in losses and legal(value(k))]

  best, following = 0, [0]
  while following and len(losses) < most:
    loss = measure(value(following[0]))
    losses[following[0]] = math.inf if math.isnan(loss) else loss
    # Of equal ones the smallest: where all diverge, it goes down.
    best = min(losses, key=lambda k: (losses[k], k))
    following = missing(best)
  edge = ('lower' if following[0] < best else 'higher') if following else ''
  return Found({value(k): x for k, x in losses.items()}, value(best), edge)
