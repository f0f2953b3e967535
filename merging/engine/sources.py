"""Which checkpoints of a run a merge reads.

A run keeps `checkpoints/<step>/{params,mean,meta}`; `mean` is the mean of the
iterates after step `mean_start` (in `meta`) up to and with <step>.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from merging.engine.coefficients import IntervalMeans

Sources = list[tuple[pathlib.Path, float]]  # (item directory, coefficient)


def saved(run: str | pathlib.Path) -> list[int]:
  """Returns the steps of the finished checkpoints, ascending."""
  found = pathlib.Path(run, 'checkpoints').glob('*')
  return sorted(
    int(p.name) for p in found if p.name.isdecimal() and (p / 'params').is_dir()
  )


def item(run: str | pathlib.Path, step: int, name: str) -> pathlib.Path:
  """Returns the directory of 'params' or 'mean' of a checkpoint."""
  return pathlib.Path(run, 'checkpoints', str(step), name)


def raw_steps(
  steps: Sequence[int], *, end: int, window: int, every: int = 1
) -> list[int]:
  """Returns the steps of a window (end - window, end], oldest first.

  Args:
    steps: of the checkpoints that exist.
    end: the last step of the window.
    window: its length in steps.
    every: least distance of two checkpoints, counted back from `end`.

  Raises:
    ValueError: `end` is not a checkpoint, or the window holds none but it.
  """
  if every < 1:
    raise ValueError(f'every={every} must be at least 1.')
  if end not in steps:
    raise ValueError(f'end={end} is not a checkpoint; {_listed(steps)}')
  chosen = [end]
  for step in sorted(steps, reverse=True):
    if end - window < step <= chosen[-1] - every:
      chosen.append(step)
  if len(chosen) < 2:
    raise ValueError(
      f'window={window} before step {end} holds one checkpoint, and a merge '
      f'needs two; {_listed(steps)}'
    )
  return chosen[::-1]


def mean_steps(run: str | pathlib.Path, *, end: int, window: int) -> list[int]:
  """Returns the knots end - window = s_0 < ... < s_k = end of stored means.

  Raises:
    ValueError: a knot is no checkpoint or has no mean, or the window does not
      begin at a knot.
  """
  if window < 1:
    raise ValueError(f'window={window} must be at least 1.')
  knots, steps = [end], saved(run)
  while knots[-1] > end - window:
    step = knots[-1]
    if step not in steps:
      raise ValueError(f'step {step} is not a checkpoint; {_listed(steps)}')
    if not item(run, step, 'mean').is_dir():
      raise ValueError(f'checkpoint {step} of {run} has no interval mean.')
    start = mean_start(item(run, step, 'mean'))
    if start >= step:
      raise ValueError(f'no interval mean ends before step {step} of {run}.')
    knots.append(start)
  if knots[-1] != end - window:
    legal = [str(end - k) for k in (knots[-2], knots[-1]) if k < end]
    raise ValueError(
      f'window={window} before step {end} does not begin at a checkpoint; '
      f'legal nearby: {", ".join(legal)}.'
    )
  return knots[::-1]


def mean_start(path: pathlib.Path) -> int:
  """Returns the step after which the interval of a stored mean begins.

  Raises:
    ValueError: its checkpoint does not say so.
  """
  meta = path.with_name('meta') / 'metadata'
  try:
    return int(json.loads(meta.read_text())['mean_start'])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f"'{meta}' cannot be read: {e}.") from e


def raw(
  run: str | pathlib.Path, steps: Sequence[int], coefficients: np.ndarray
) -> Sources:
  """Pairs checkpoints with their coefficients."""
  pairs = zip(steps, coefficients, strict=True)
  return [(item(run, s, 'params'), float(c)) for s, c in pairs]


def means(
  run: str | pathlib.Path, knots: Sequence[int], c: IntervalMeans
) -> Sources:
  """Pairs interval means, and the raw ends where they count, with theirs."""
  found = [(item(run, knots[0], 'params'), c.first)]
  for step, coefficient in zip(knots[1:], c.means, strict=True):
    found.append((item(run, step, 'mean'), float(coefficient)))
  found.append((item(run, knots[-1], 'params'), c.last))
  return [(path, c) for path, c in found if c != 0]


def _listed(steps: Sequence[int]) -> str:
  text = [str(s) for s in sorted(steps)]
  if len(text) > 12:
    text = [*text[:5], '...', *text[-5:]]
  return f'there are {", ".join(text) or "none"}.'
