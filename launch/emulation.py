"""From a run and a method to the sources of a merge (not a command)."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import progress

from lm import checkpoint, spec
from lm.errors import UserError
from lm.run import Run
from merging.engine import coefficients, sources, stream


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


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """One emulated decay: of a shape, over `window` steps until `end`."""

  end: int
  window: int
  shape: str
  source: str  # 'raw' or 'means'
  plan: Plan


class Cooldown(NamedTuple):
  """A branch that was really decayed."""

  run: Run
  end: int
  window: int
  losses: np.ndarray


def cooldown(run: Run, branch: Run) -> Cooldown:
  """Evaluates the end of a branch of `run`, on the tokens of `run`."""
  parent, _, start = branch.meta['parent'].partition('@')
  if pathlib.Path(parent).resolve() != run.path.resolve() or not start:
    raise UserError(
      f'{branch.path} is not a branch of {run.path}: its parent is '
      f"'{branch.meta['parent']}'."
    )
  if branch.meta['status'] != 'done':
    raise UserError(f'{branch.path} is not done: {branch.meta["status"]}.')
  end, begin = branch.steps[-1], int(start)
  rates = branch.learning_rates()[begin:end]
  if not np.isclose(rates[0], run.learning_rates()[begin], rtol=1e-5):
    raise UserError(
      f'{branch.path} begins at a learning rate of {rates[0]:.3e}, not at that '
      f'of {run.path} at step {begin}, {run.learning_rates()[begin]:.3e}.'
    )
  held = int(np.argmax(rates < rates[0] * (1 - 1e-6)))
  if not held:
    raise UserError(f'{branch.path} is no cooldown: its rate does not fall.')
  losses = run.losses(branch.params(end))
  return Cooldown(branch, end, end - begin - (held - 1), losses)


def grid(
  run: Run, ends: Sequence[int], windows: Sequence[int]
) -> list[tuple[int, int]]:
  """Returns pairs (end, window) whose both sides are checkpoints.

  Default ends are four, evenly spaced; default windows 10, 20 and 40 % of each.
  """
  saved = run.steps
  if len(saved) < 3:
    raise UserError(f'{run.path} has {len(saved)} checkpoints; 3 are needed.')
  near = lambda x: min(saved, key=lambda s: abs(s - x))
  ends = list(ends) or [near(saved[-1] * f) for f in (0.25, 0.5, 0.75, 1)]
  pairs = []
  for end in dict.fromkeys(ends):
    if end not in saved:
      raise UserError(f'--ends: {end} is not a checkpoint; there are {saved}.')
    lengths = list(windows) or [end - near(end * f) for f in (0.9, 0.8, 0.6)]
    pairs += [(end, w) for w in dict.fromkeys(lengths) if 0 < w <= end]
  unused = [w for w in windows if w not in {p[1] for p in pairs}]
  if unused or not pairs:
    raise UserError(f'--windows: none of {unused} steps fits before {ends}.')
  return pairs


def jobs(
  run: Run,
  grid: Sequence[tuple[int, int]],
  focus: Sequence[tuple[int, int]],
  shapes: Sequence[str],
  floor: float,
) -> list[Job]:
  """Plans every shape for every cell; cells in focus from raw and means."""
  with_means = sources.item(run.path, run.steps[-1], 'mean').is_dir()
  planned = []
  for end, window in dict.fromkeys([*focus, *grid]):
    enough = sum(end - window < s <= end for s in run.steps) > 1
    raw = ((end, window) in focus and enough) or not with_means
    kinds = ['raw'] * raw + ['means'] * with_means
    for source in kinds:
      for shape in shapes:
        method = parse_method(f'decay:shape={shape},floor={floor}')
        p = plan(run, method, means=source == 'means', end=end, window=window)
        planned.append(Job(end, window, shape, source, p))
  return planned


def measure(run: Run, jobs: Sequence[Job]) -> dict[Job, np.ndarray]:
  """Averages and evaluates; returns the loss of each validation batch."""
  results = {}
  for path in dict.fromkeys(p for job in jobs for p, _ in job.plan.sources):
    step, name = int(path.parent.name), path.name
    abstract = checkpoint.abstract_item(path)
    checkpoint.restore_item(run.path, step, name, abstract)  # verifies
  for job in progress.track(jobs, 'emulating', transient=True):
    params = stream.combine(job.plan.sources)
    results[job] = run.losses(params)
  return results


def as_json(results, last, real) -> dict[str, Any]:
  """Returns all numbers of an emulation, losses in nats."""
  return {
    'emulated': [
      {
        'end': j.end,
        'window': j.window,
        'shape': j.shape,
        'source': j.source,
        'loss': x.mean(),
      }
      for j, x in results.items()
    ],
    'last': {str(end): x.mean() for end, x in sorted(last.items())},
    'real': [
      {'run': str(r.run.path), 'end': r.end, 'window': r.window,
       'loss': r.losses.mean()} for r in real
    ],
  }  # fmt: skip
