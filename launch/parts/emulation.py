"""From a run and a method to the sources of a merge (not a command)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from launch.parts import curves, merged_state, verified
from lm import processes, spec
from lm.errors import UserError
from lm.run import Run
from merging import from_run
from merging.engine import artifact, coefficients, controls, hashing, sources
from merging.engine import group as groups


class Plan(NamedTuple):
  """What a merge will add.

  sources: (item directory, coefficient), oldest first.
  learning_rates: mean of those used in the block that ends with each source;
    None where sources are no blocks (launch/parts/stored.py).
  about: {'end': step, 'window': steps}, for the provenance.
  state: as `sources`, of optimizer states (launch/parts/merged_state.py).
  """

  sources: sources.Sources
  learning_rates: np.ndarray | None
  about: dict[str, Any]
  state: sources.Sources = ()


def parse_method(text: str) -> dict[str, Any]:
  """Parses 'decay:shape=cosine,floor=0.1' into a name and all its knobs."""
  return dict(curves.parse(text, 'merging'))


def plan(
  run: Run,
  method: Mapping[str, Any],
  *,
  means: bool = False,
  end: int | None = None,
  window: int = 0,
  every: int = 1,
  steps: Sequence[int] = (),
  target: str = '',
) -> Plan:
  """Chooses the checkpoints of a window and their coefficients.

  A window of the grid 'left' (the paper's) and of averages holds the
  checkpoints in (end - window, end]; with the grid 'block', from_run and means
  it also reads the one at end - window, where the decay begins.

  Args:
    run: its checkpoints are averaged.
    method: as parsed by `parse_method`.
    means: interval means instead of raw checkpoints.
    end, window, every: which checkpoints; the newest, a fifth of the steps.
    steps: these checkpoints instead.
    target: a schedule for from_run, as 'wsd:decay=0.2', over `end` steps.

  Raises:
    ValueError, UserError: no such checkpoints; a method that cannot do this; a
      learning rate that varied in the window, except with from_run.
  """
  saved = run.steps
  if not saved:
    raise UserError(f'{run.path} has no checkpoints.')
  end = saved[-1] if end is None else end
  planned = regular(run, end)
  window = checked_window(planned, end, window)
  closed = method.get('grid') == 'block' or method['name'] == 'from_run'
  if means:
    knots = sources.mean_steps(run.path, end=end, window=window)
  elif steps:
    knots = _listed(run, saved, steps)
    end = knots[-1]
  else:
    knots = sources.raw_steps(
      planned, end=end, window=window + closed, every=every
    )
  rates = run.learning_rates()
  if not len(rates[knots[0] : end]):
    raise UserError(f'step {end} is not a step of the schedule of {run.path}.')
  if method['name'] != 'from_run':
    check_constant(run, rates[knots[0] : end])
    if target:
      raise UserError(f'--target needs from_run, not {method["name"]}.')
  wanted = _target(run, target, end) if target else None
  if means:
    found = sources.means(run.path, knots, _means(method, knots, rates, wanted))
    about = {'end': end, 'window': window}
    used = _mean_rates(rates, knots, found)
  else:
    c = spec.build('merging', method, knots, rates, wanted)
    c = coefficients.checked(c, knots, method['name'])
    found = sources.raw(run.path, knots, c)
    about = {'end': end, 'window': _covered(knots, closed)}
    used = block_rates(rates, knots)
  return Plan(found, used, {**about, 'target': target} if target else about)


def control(plan: Plan, name: str, seed: int) -> Plan:
  """Puts the coefficients into a wrong order: 'reverse' or 'scramble'."""
  paths, c = zip(*plan.sources, strict=True)
  wrong = controls.control(c, name, seed)
  about = {'control': name, **({'seed': seed} if name == 'scramble' else {})}
  found = [(p, float(x)) for p, x in zip(paths, wrong, strict=True)]
  return plan._replace(sources=found, about={**plan.about, **about})


def write(
  run: Run,
  name: str,
  plan: Plan,
  about: Mapping[str, Any],
  options: Mapping[str, Any],
  hashed: hashing.Inputs | None = None,
) -> None:
  """Writes RUN/merged/NAME and verifies every source by its fingerprints.

  Args:
    run, name: where.
    plan: the sources, checkpoints of runs.
    about: the content of merge.json.
    options: how to add, see `stream.merge`.
    hashed: see `artifact.write_at`.

  Raises:
    ValueError: as `artifact.write`; UserError: a damaged checkpoint.
  """

  together, finish_state = group(), lambda: None
  hooks = verified.hooks(plan.sources, together, plan.state)

  def after_part(folder):
    nonlocal finish_state
    if plan.state:
      finish_state = merged_state.write_part(
        plan.state, folder, together, observe=hooks['observe'], **options
      )
    hooks['after_part'](folder)

  def before_commit(folder):
    finish_state()
    hooks['before_commit'](folder)

  artifact.write(
    run.path,
    name,
    sources=plan.sources,
    provenance=about,
    hashed=hashed,
    observe=hooks['observe'],
    after_part=after_part,
    before_commit=before_commit,
    group=together,
    **options,
  )


def group() -> groups.Group:
  """Returns the processes that merge together."""
  return groups.Group(
    jax.process_index(), jax.process_count(), processes.gather
  )


def _listed(run, saved, steps):
  missing = [s for s in steps if s not in saved]
  if missing:
    raise UserError(
      f'{run.path} has no checkpoint {missing[0]}; it has {saved}.'
    )
  if len(set(steps)) < max(len(steps), 2):
    raise UserError(f'--steps={steps}: a merge needs two or more, each once.')
  return sorted(steps)


def _target(run, text, end):
  """Returns the learning rates of a run of `end` steps with that schedule."""
  schedule = spec.build('schedules', curves.parse(text), end)
  multipliers = jax.vmap(schedule)(np.arange(end + 1, dtype=np.int32))
  return run.config.learning_rate * np.asarray(multipliers, np.float64)


def _means(method, knots, rates, wanted):
  if method['name'] == 'decay':
    return coefficients.interval_means(knots, method['shape'], method['floor'])
  if method['name'] == 'from_run':
    knobs = {k: v for k, v in method.items() if k != 'name'}
    return from_run.from_run_means(knots, rates, wanted, **knobs)
  raise UserError(
    f"--means needs --method=decay:... or from_run:..., not '{method['name']}'."
  )


def _mean_rates(rates, knots, found):
  """The multiplier beside a mean is that of the knot where it begins."""
  at = dict(zip(knots, rates[np.minimum(knots, len(rates) - 1)], strict=True))
  before = dict(zip(knots[1:], knots[:-1], strict=True))
  steps = [(p.name, int(p.parent.name)) for p, _ in found]
  return np.array([at[before[s] if n == 'mean' else s] for n, s in steps])


def regular(run: Run, end: int | None = None) -> list[int]:
  """Returns the checkpoints that the run has however often it was stopped.

  Those are at multiples of every_steps, and at the end.
  """
  steps, every = run.steps, run.config.checkpoint.every_steps
  return [s for s in steps if s % every == 0 or s in (end, steps[-1])]


def warn_of_code(run: Run, end: int, window: int) -> None:
  """Says so if the code of the method changed inside a window."""
  known = (run.path / 'meta.json').is_file()  # a merge can do without
  changes = run.meta.get('code_before', ()) if known else ()
  inside = [step for step in changes if end - window < int(step) < end]
  if inside:
    print(
      f'warning: the optimizer or schedule of {run.path} changed at step '
      f'{", ".join(inside)}; what is averaged across it is of two methods.'
    )


def warn_of_gaps(run: Run, plan: Plan, window: int) -> None:
  """Says so if checkpoints that the run was to keep are gone from a window."""
  made, end = run.config.checkpoint, plan.about['end']
  first = end - (window or plan.about['window']) + 1
  wanted = range(max(first, run.steps[0]), end)
  lost = [s for s in wanted if s % made.every_steps == 0 and s not in run.steps]
  if lost and not made.keep_latest:
    print(
      f'warning: {run.path} has no checkpoint {", ".join(map(str, lost))}; the '
      'coefficients are those of the steps that are there.'
    )


def checked_window(saved: Sequence[int], end: int, window: int) -> int:
  """Returns the window, by default a fifth; refuses one that does not fit."""
  if window < 0 or window > end:
    raise UserError(f'window={window} must be from 1 to the end step, {end}.')
  return window or fifth(saved, end)


def fifth(saved: Sequence[int], end: int) -> int:
  """Returns about a fifth of the steps, but at least two checkpoints."""
  before = [s for s in saved if s < end]
  starts = [s for s in before[:-1] if s <= 0.8 * end] or before[:1]
  return end - starts[-1] if starts else end


def _covered(knots, closed):
  """Returns the length of the decay that checkpoints emulate, in steps."""
  length = knots[-1] - knots[0]
  if closed:
    return length
  return min(length + round(length / (len(knots) - 1)), knots[-1])


def check_constant(run: Run, rates: np.ndarray) -> None:
  """Refuses a window in which the learning rate varied."""
  if np.ptp(rates) <= 1e-6 * rates.max():
    return
  raise UserError(
    f'the learning rate of {run.path} varied in this window, from '
    f'{rates.max():.3e} to {rates.min():.3e}, so these coefficients would not '
    'emulate this decay; choose a window where it is constant, or '
    'launch.merge --method=from_run, which divides by what was used, or '
    f'--inputs={run.path}/checkpoints for an average that emulates nothing.'
  )


def block_rates(rates: np.ndarray, knots: Sequence[int]) -> np.ndarray:
  """Returns the mean learning rate of the block that ends at each knot."""
  first = max(2 * knots[0] - knots[1], 0) if len(knots) > 1 else 0
  blocks = zip([first, *knots[:-1]], knots, strict=True)
  return np.array(
    [rates[min(a, max(b - 1, 0)) : max(b, 1)].mean() for a, b in blocks]
  )
