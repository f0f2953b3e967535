"""From a run and a method to the sources of a merge (not a command)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import spec
from lm.errors import UserError
from lm.run import Run
from merging.engine import coefficients, sources


class Plan(NamedTuple):
  """What a merge will add.

  sources: (item directory, coefficient), oldest first.
  learning_rates: mean of those used in the block that ends with each source.
  about: {'end': step, 'window': steps}, for the provenance.
  """

  sources: sources.Sources
  learning_rates: np.ndarray
  about: dict[str, Any]


def parse_method(text: str) -> dict[str, Any]:
  """Parses 'decay:shape=cosine,floor=0.1' into a name and all its knobs."""
  name, _, arg = text.partition(':')
  defaults = spec.spec('merging', name)
  knobs = {k: v for k, v in defaults.items() if k != 'name'}
  chosen = spec.parse(arg, **{k: str(v) for k, v in knobs.items()})
  for key, value in knobs.items():
    try:
      knobs[key] = type(value)(chosen[key])
    except ValueError as e:
      raise UserError(
        f"--method={text}: {key}='{chosen[key]}' must be a "
        f'{type(value).__name__}.'
      ) from e
  return {'name': name, **knobs}


def plan(
  run: Run,
  method: Mapping[str, Any],
  *,
  means: bool = False,
  end: int | None = None,
  window: int = 0,
  every: int = 1,
  steps: Sequence[int] = (),
  correct: bool = False,
) -> Plan:
  """Chooses the checkpoints of a window and their coefficients.

  A window of the grid 'left' (the paper's) and of averages holds the
  checkpoints in (end - window, end]; with the grid 'block' and with means it
  also reads the one at end - window, where the decay begins.

  Raises:
    ValueError, UserError: no such checkpoints; a method that cannot do this; a
      learning rate that varied in the window, unless `correct`.
  """
  saved = run.steps
  if not saved:
    raise UserError(f'{run.path} has no checkpoints.')
  end = saved[-1] if end is None else end
  if window < 0 or window > end:
    raise UserError(f'window={window} must be from 1 to the end step, {end}.')
  window = window or _fifth(saved, end)
  if means:
    _only_decay(method, 'means')
    knots = sources.mean_steps(run.path, end=end, window=window)
  elif steps:
    knots = sorted(steps)
    missing = [s for s in knots if s not in saved]
    if missing:
      raise UserError(
        f'{run.path} has no checkpoint {missing[0]}; it has {saved}.'
      )
    if len(set(knots)) < 2:
      raise UserError(f'--steps={steps}: a merge needs two checkpoints.')
    end = knots[-1]
  else:
    closed = method.get('grid') == 'block'
    knots = sources.raw_steps(
      saved, end=end, window=window + closed, every=every
    )
  about = {'end': end, 'window': window}
  if not means:
    rates = _block_rates(run, knots)
    _check_constant(run, knots, correct)
    about['window'] = _covered(knots, method.get('grid') == 'block')
    c = spec.build('merging', method, knots)
    if correct:
      _only_decay(method, 'correct')
      target = coefficients.forward(c) * rates.max()
      c = coefficients.inverse(coefficients.correct(target, rates[1:]))
    return Plan(sources.raw(run.path, knots, c), rates, about)
  rates = _rates(run, knots)
  _check_constant(run, knots, correct)
  c = coefficients.interval_means(knots, method['shape'], method['floor'])
  if correct:
    target = (1 - np.cumsum([c.first, *c.means])) * rates.max()
    c = coefficients.from_knots(coefficients.correct(target, rates))
  found = sources.means(run.path, knots, c)
  # The multiplier beside a mean is that of the knot where its interval begins.
  begins = dict(zip(knots[1:], rates[:-1], strict=True))
  at = dict(zip(knots, rates, strict=True))
  rates = [
    (begins if p.name == 'mean' else at)[int(p.parent.name)] for p, _ in found
  ]
  return Plan(found, np.array(rates), about)


def _fifth(saved, end):
  """Returns about a fifth of the steps, but at least two checkpoints."""
  before = [s for s in saved if s < end]
  starts = [s for s in before[:-1] if s <= 0.8 * end] or before[:1]
  return end - starts[-1] if starts else end


def _covered(knots, block):
  """Returns the length of the decay that checkpoints emulate, in steps."""
  length = knots[-1] - knots[0]
  return length if block else length + round(length / (len(knots) - 1))


def _check_constant(run, knots, correct):
  rates = run.learning_rates()[knots[0] : knots[-1]]
  if not len(rates):
    raise UserError(
      f'steps {knots} are not steps of the schedule of {run.path}.'
    )
  if correct or np.ptp(rates) <= 1e-6 * rates.max():
    return
  raise UserError(
    f'the learning rate of {run.path} varied in this window, from '
    f'{rates.max():.3e} to {rates.min():.3e}, so these coefficients would not '
    'emulate this decay; choose a window where it is constant, or --correct '
    'to divide by what was used.'
  )


def _only_decay(method, option):
  if method['name'] != 'decay':
    raise UserError(
      f"--{option} needs --method=decay:..., not '{method['name']}'."
    )


def _rates(run, steps):
  """Returns the learning rate at each step; after the last, the last."""
  rates = run.learning_rates()
  return rates[np.minimum(steps, len(rates) - 1)]


def _block_rates(run, knots):
  """Returns the mean learning rate of the block that ends at each knot."""
  rates = run.learning_rates()
  first = max(2 * knots[0] - knots[1], 0) if len(knots) > 1 else 0
  blocks = zip([first, *knots[:-1]], knots, strict=True)
  return np.array(
    [rates[min(a, max(b - 1, 0)) : max(b, 1)].mean() for a, b in blocks]
  )
