"""Search for the best values by training (not a command)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from launch.parts.trials import Method, Trials
from lm import follow, spec
from lm.errors import UserError, did_you_mean


class Found(NamedTuple):
  """What was measured, {value: loss} in that order, and the best value.

  edge: 'lower' or 'higher' where the search had to stop although it might be
    better there; '' if both neighbours of the best are no better.
  """

  losses: dict[float, float]
  best: float
  edge: str


class Tuned(NamedTuple):
  """The fields that were tuned, and how: {field: what was found}.

  count: different settings that were trained.
  """

  fields: dict[str, float]
  searches: dict[str, Found]
  count: int


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


def fields_of(method: Method, knobs: Sequence[str]) -> dict[str, float]:
  """Returns {field: value} where the search of each knob begins.

  Args:
    method: what is tuned.
    knobs: 'learning_rate' or floats of its optimizer; those it has not are left
      out.

  Raises:
    UserError: a knob whose value is zero, which no factor changes.
  """
  config, found = method.config(), {}
  known = spec.floats('optimizers', config.optimizer)
  for knob in knobs:
    if knob != 'learning_rate' and knob not in known:
      continue
    field = knob if knob == 'learning_rate' else f'optimizer.{knob}'
    value = config.learning_rate if knob == 'learning_rate' else known[knob]
    if _away(field, value) <= 0:
      raise UserError(
        f'--tune={knob}: {method.name} has {field}={value:g}, which no factor '
        'changes; give it a value to start from.'
      )
    found[field] = value
  return found


def check_knobs(methods: Sequence[Method], knobs: Sequence[str]) -> None:
  """Refuses a knob that is repeated, or that no method has."""
  legal = {'learning_rate'}
  for method in methods:
    legal |= {*spec.floats('optimizers', method.config().optimizer)}
  for knob in knobs:
    if knob not in legal or knobs.count(knob) > 1:
      raise UserError(
        f"--tune: '{knob}' is repeated or no float of these optimizers."
        + did_you_mean(knob, legal)
      )


def tune(
  trials: Trials,
  method: Method,
  knobs: Sequence[str],
  *,
  seeds: Sequence[int],
  factor: float,
  most: int,
) -> Tuned:
  """Searches one knob after the other, each at the best of those before.

  A loss is the mean over the seeds. A float between 0 and 1, as b1, is searched
  by its distance from 1.
  """
  fields, searches, settings = fields_of(method, knobs), {}, set()
  for field, start in fields.items():

    def measure(x, field=field):
      at = {**fields, field: _away(field, x)}
      settings.add(tuple(at.values()))
      return sum(trials.loss(method, at, s) for s in seeds) / len(seeds)

    found = search(
      measure,
      _away(field, start),
      factor=factor,
      most=most,
      legal=lambda x, field=field: _accepted(
        method, {**fields, field: _away(field, x)}
      ),
    )
    losses = {_away(field, x): loss for x, loss in found.losses.items()}
    fields[field] = _away(field, found.best)
    edge = found.edge
    if edge and _away(field, 0.0):  # what is lower from 1 is higher
      edge = {'lower': 'higher', 'higher': 'lower'}[edge]
    searches[field] = Found(losses, fields[field], edge)
  return Tuned(fields, searches, len(settings))


def _accepted(method, fields) -> bool:
  """Whether the optimizer takes these values."""
  config = method.config(**fields)
  for field, value in fields.items():
    least, largest = follow.legal(field.rpartition('.')[2])
    if not least <= value <= largest:
      return False
    if value != 1 and np.float32(value) == 1:  # in a step it would be
      return False
  try:
    spec.build('optimizers', config.optimizer, config.learning_rate)
  except UserError:
    return False
  return True


def _away(field, value):
  """Returns 1 - value of what lies between 0 and 1; its own inverse."""
  largest = follow.legal(field.rpartition('.')[2])[1]
  return 1 - value if math.isclose(largest, 1.0) else value
