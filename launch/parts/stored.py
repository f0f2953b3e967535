"""Merges of the averages that a run stored on request (not a command)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.parts import emulation, show
from launch.parts.emulation import Plan
from lm import address, branch, spec
from lm.errors import UserError, did_you_mean
from lm.run import Run
from merging.engine import coefficients, moments, posthoc, sources


def available(run: Run) -> list[str]:
  """Returns which of 'moments', 'trackers' and 'means' a run has."""
  items = sources.item(run.path, run.steps[-1], '')
  has = {
    'moments': (items / 'moment').is_dir(),
    'trackers': any(items.glob('ema_*')),
    'means': (items / 'mean').is_dir(),
  }
  return [name for name, there in has.items() if there]


def plan(
  run: Run,
  method: Mapping[str, Any],
  text: str,
  *,
  end: int | None = None,
  window: int = 0,
) -> Plan:
  """Plans a merge of 'moments' or 'trackers:ridge=1e-4,nonnegative=True'.

  Args:
    run: trained with checkpoint.moment or checkpoint.ema.
    method: decay, of trackers also power_ema.
    text: what to use, with the options of the fit of trackers.
    end, window: of the decay; the newest step, a fifth of the steps.

  Raises:
    UserError, ValueError: an unknown option; another method; nothing stored; a
      learning rate that varied in the window, or a window that is not in it.
  """
  kind, _, options = text.partition(':')
  plans = {'moments': from_moments, 'trackers': from_trackers}
  if kind not in plans:
    raise UserError(
      f"--stored: '{kind}' is unknown.{did_you_mean(kind, plans)}"
    )
  knobs = {'moments': {}, 'trackers': {'nonnegative': 'False', 'ridge': '0.0'}}
  knobs = spec.parse(options, **knobs[kind])
  at = f'{run.path}' if end is None else f'{run.path}@{end}'
  end = address.locate(at).step
  if end < 1:
    raise UserError(
      f'end={end}: {run.path} has stored averages of later steps.'
    )
  if window and method['name'] == 'power_ema':
    raise UserError(
      f'window={window} does not go with power_ema of trackers: it is of all '
      'steps.'
    )
  window = emulation.checked_window(run.steps, end, window)
  if method['name'] == 'decay':
    begun = branch.first_step(run.config)
    if end - window < begun:
      raise UserError(
        f'window={window} reaches to step {end - window}, but {run.path} is a '
        f'branch that begins at step {begun}; legal: at most {end - begun}.'
      )
    rates = run.learning_rates()[max(end - window, 0) : end]
    emulation.check_constant(run, rates)
  elif (method['name'], kind) != ('power_ema', 'trackers'):
    legal = 'decay' if kind == 'moments' else 'decay or power_ema'
    raise UserError(f"--stored={kind} needs {legal}, not '{method['name']}'.")
  found = plans[kind](run, method, end, window, **knobs)
  return found._replace(about={'stored': text, **found.about})


def from_moments(
  run: Run, method: Mapping[str, Any], end: int, window: int
) -> Plan:
  """Plans a decay that is quadratic between checkpoints."""
  knots = sources.mean_steps(run.path, end=end, window=window)
  c = moments.interval_moments(knots, method['shape'], method['floor'])
  found = [(sources.item(run.path, knots[0], 'params'), c.first)]
  for step, mean, moment in zip(knots[1:], c.means, c.moments, strict=True):
    path = sources.item(run.path, step, 'moment')
    if not path.is_dir():
      raise UserError(
        f'checkpoint {step} of {run.path} has no moment; train with '
        '--config.checkpoint.moment=True.'
      )
    found.append((sources.item(run.path, step, 'mean'), float(mean)))
    found.append((path, float(moment)))
  found.append((sources.item(run.path, end, 'params'), c.last))
  lengths = [b - a for a, b in zip(knots, knots[1:], strict=False)]
  each = [[c.first]]
  for n, mean, moment in zip(lengths, c.means, c.moments, strict=True):
    each.append(mean / n + moment * np.arange(1, n + 1) / (n * (n + 1) / 2))
  weights = np.concatenate(each)
  weights[-1] += c.last
  about = {'end': end, 'window': window}
  before = np.cumsum(weights)[np.subtract(knots[:-1], knots[0])]
  about |= _profile(knots[:-1], before)
  about['iterates'] = coefficients.effective_count(weights)
  return Plan([(p, x) for p, x in found if x], None, about)


def from_trackers(
  run: Run,
  method: Mapping[str, Any],
  end: int,
  window: int,
  *,
  nonnegative: str = 'False',
  ridge: str = '0.0',
) -> Plan:
  """Plans a decay or a power EMA as a fit of all trackers up to `end`.

  How good the fit is stands in `about`. The floor of a decay is the share of
  the newest parameters.
  """
  if nonnegative not in ('True', 'False'):
    raise UserError(f"nonnegative='{nonnegative}' must be True or False.")
  try:
    penalty = float(ridge)
  except ValueError as e:
    raise UserError(f"ridge='{ridge}' must be a number.") from e
  paths = [
    path
    for step in run.steps
    if 0 < step <= end
    for path in sorted(sources.item(run.path, step, '').glob('ema_*'))
  ]
  if not paths:
    raise UserError(
      f'{run.path} has no trackers up to step {end}; train with '
      '--config.checkpoint.ema=0.05,0.1.'
    )
  at = [int(path.parent.name) for path in paths]
  widths = [float(path.name.removeprefix('ema_')) for path in paths]
  steps = posthoc.grid(end, [*at, end - window])
  if method['name'] == 'decay':
    wanted, floor = (
      posthoc.decay(steps, window, method['shape']),
      method['floor'],
    )
  else:
    wanted = posthoc.power(steps, end, posthoc.gamma(method['sigma']))
    floor, window = 0.0, end
  rows = [
    posthoc.power(steps, s, posthoc.gamma(sigma))
    for s, sigma in zip(at, widths, strict=True)
  ]
  fit = posthoc.fit(
    rows, wanted, steps, nonnegative=nonnegative == 'True', ridge=penalty
  )
  fit = posthoc.floored(fit, floor, wanted, steps)
  c = fit.coefficients
  found = [(p, float(x)) for p, x in zip(paths, c, strict=True) if x]
  if floor:
    found.append((sources.item(run.path, end, 'params'), floor))
  quality = {k: v for k, v in fit._asdict().items() if k != 'coefficients'}
  about = {'end': end, 'window': window, 'fit': quality}
  total = c @ np.stack(rows)  # the newest parameters come after all of it
  knots = [s for s in run.steps if end - window <= s < end]
  about |= _profile(knots, total[np.searchsorted(steps, knots)])
  each = np.diff(total) / np.diff(steps)  # of the iterates in a cell
  squares = np.diff(steps) @ each**2 + (each[-1] + floor) ** 2 - each[-1] ** 2
  about['iterates'] = float(1 / squares)
  return Plan(found, None, about)


def _profile(steps: Sequence[int], before: np.ndarray) -> dict[str, Any]:
  """What the update after each step is multiplied by: 1 - all until there."""
  pairs = zip(steps, before, strict=True)
  return {'multipliers': {str(s): float(1 - x) for s, x in pairs}}


def amend(plan: Plan, about: dict[str, Any]) -> None:
  """Changes a provenance: these sources are no blocks.

  It has the multipliers by step, and of how many independent iterates the
  average has the noise.
  """
  for row in about['sources']:
    del row['multiplier']
  about['effective_count'] = plan.about['iterates']


def describe(run: Run, plan: Plan) -> None:
  """Prints coefficients, multipliers and, of trackers, how good the fit is."""
  rows = [
    [f'{path.parent.name} {path.name}', f'{c:.6f}'] for path, c in plan.sources
  ]
  show.table(['stored average', 'c'], rows)
  rates = run.learning_rates()
  rows = []
  for step, w in plan.about['multipliers'].items():
    rate = rates[min(int(step), len(rates) - 1)]
    rows.append([step, f'{rate:.3e}', f'{w:.4f}', f'{w * rate:.3e}'])
  show.table(['after step', 'LR used', 'w', 'effective LR'], rows)
  print(
    f'Averages noise like {plan.about["iterates"]:.1f} independent iterates of '
    'equal weight (1 / sum of the squared weights of all iterates).'
  )
  if 'fit' in plan.about:
    fit = plan.about['fit']
    print(
      f'The profile of the average is off by {fit["error"]:.2%} (l2), the '
      f'multiplier of the updates by at most {fit["multiplier_error"]:.4f}; '
      f'condition number {fit["condition"]:.1e}, sum |c| = '
      f'{fit["absolute"]:.2f}.'
    )
