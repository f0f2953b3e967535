"""Emulated decays beside real ones, on the same tokens (not a command)."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich import progress

from launch.parts import emulation, stored
from lm import address, checkpoint, log
from lm.errors import UserError
from lm.run import Run
from merging.engine import sources


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """One emulated decay: of a shape, over `window` steps until `end`."""

  end: int
  window: int
  shape: str
  source: str  # 'raw', 'means', 'moments', 'trackers' or 'merged'
  plan: emulation.Plan
  decay: str = ''  # the shape, where `shape` is the name of a merge


def grid(
  run: Run, ends: Sequence[int], windows: Sequence[int]
) -> list[tuple[int, int]]:
  """Returns pairs (end, window) whose both sides are checkpoints.

  Default ends are four, evenly spaced; default windows 10, 20 and 40 % of each,
  those that hold two checkpoints, or that interval means cover.
  """
  saved = emulation.regular(run)
  if len(saved) < 3:
    raise UserError(f'{run.path} has {len(saved)} checkpoints; 3 are needed.')
  near = lambda x: min(saved, key=lambda s: abs(s - x))
  ends = list(ends) or [
    near(saved[-1] * f) or saved[1] for f in (0.25, 0.5, 0.75, 1)
  ]
  means, pairs = 'means' in stored.available(run), []
  legal = [s for s in run.steps if s > 0]
  for end in dict.fromkeys(ends):
    if end not in legal:
      raise UserError(f'{end} is not a checkpoint; there are {legal}.')
    fifths = [end - near(end * f) for f in (0.9, 0.8, 0.6)]
    lengths = windows or [w for w in fifths if means or _enough(run, end, w)]
    pairs += [(end, w) for w in dict.fromkeys(lengths) if 0 < w <= end]
  unused = [w for w in windows if w not in {p[1] for p in pairs}]
  if unused or not pairs:
    what = f'{unused} steps' if unused else 'the default 10, 20 and 40 %'
    raise UserError(
      f'--windows: none of {what} fits before {ends}; raw checkpoints need a '
      'window that holds two.'
    )
  return pairs


def _enough(run, end, window):
  return sum(end - window < s <= end for s in run.steps) > 1


def jobs(
  run: Run,
  grid: Sequence[tuple[int, int]],
  focus: Sequence[tuple[int, int]],
  shapes: Sequence[str],
  floor: float,
) -> list[Job]:
  """Plans every shape for every cell; in focus from all that is stored.

  Says which windows the raw checkpoints do not cover as they are asked for.
  """
  kept = stored.available(run)
  planned, other = [], {}
  for end, window in dict.fromkeys([*focus, *grid]):
    if (end, window) in focus:
      kinds = ['raw'] * _enough(run, end, window) + kept
    else:
      kinds = ['means'] if 'means' in kept else ['raw']
    for source in kinds:
      for shape in shapes:
        method = emulation.parse_method(f'decay:shape={shape},floor={floor}')
        at = {'end': end, 'window': window}
        if source in ('moments', 'trackers'):
          p = stored.plan(run, method, source, **at)
        else:
          p = emulation.plan(run, method, means=source == 'means', **at)
        planned.append(Job(end, window, shape, source, p))
        if source == 'raw' and p.about['window'] != window:
          other.setdefault((window, p.about['window']), end)
  for (window, covered), end in other.items():
    print(
      f'warning: the raw checkpoints before step {end} emulate a decay of '
      f'{covered} steps, not of {window}.'
    )
  return planned


def merged(run: Run, name: str, step: int) -> Job:
  """Returns what was written as RUN/merged/NAME, named by its name.

  Raises:
    UserError: no such merge, one that ends elsewhere or has parts of others.
  """
  address.in_run(f'{run.path}/merged/{name}')
  folder = run.path / 'merged' / name
  about = log.read_typed(
    folder / 'merge.json', {'method': dict, 'sources': list}, {}
  )
  method, found = about['method'], []
  damaged = UserError(f'{folder}/merge.json is damaged: its sources.')
  for row in about['sources']:
    if not isinstance(row, dict) or not {'path', 'coefficient'} <= row.keys():
      raise damaged
    # Of --inputs they are beside the result.
    paths = [run.path / row['path'], folder / row['path']]
    path = next((p for p in paths if p.is_dir()), paths[0])
    if not path.is_dir():
      raise UserError(f'{folder} is of {path}, which is gone.')
    if not path.resolve().is_relative_to((run.path / 'checkpoints').resolve()):
      raise UserError(
        f'{folder} has parts that are no checkpoints of {run.path}; '
        'launch.evaluate compares it.'
      )
    found.append((path, row['coefficient']))
  if not found:
    raise damaged
  newest = max(int(path.parent.name) for path, _ in found)
  end, window = method.get('end', newest), method.get('window', 0)
  if end != step:
    raise UserError(f'{folder} ends at step {end}, not at {step}.')
  plan = emulation.Plan(found, None, {})
  return Job(end, window, name, 'merged', plan, method.get('shape', ''))


def measure(
  run: Run, jobs: Sequence[Job], max_bytes: int = 4 << 30
) -> dict[Job, np.ndarray]:
  """Averages and evaluates; returns the loss of each validation batch.

  A stored item is read and verified once for all jobs that use it, as many
  jobs at a time as have sums of together `max_bytes`. The averages are those of
  `stream.combine`, to the last bit but where `_prefixed` makes them cheaper.
  """
  results = {}
  if not jobs:
    return results
  like = checkpoint.abstract_item(jobs[0].plan.sources[0][0])
  size = sum(x.size * 8 for x in jax.tree.leaves(like))  # of float64
  together = max(max_bytes // size, 1)
  show = progress.Progress(transient=True)
  task = show.add_task('emulating', total=len(jobs))
  with show:
    for i in range(0, len(jobs), together):
      some = jobs[i : i + together]
      for job, params in zip(some, _averages(run, some), strict=True):
        results[job] = run.losses(params)
        show.advance(task)
  return results


def _averages(run, jobs):
  """Returns the weighted sums of all jobs; reads each item once."""
  uses = [dict(job.plan.sources) for job in jobs]
  age = lambda path: (int(path.parent.name), path.name)
  items = sorted(set(itertools.chain(*uses)), key=age)
  steps = {
    path: int(path.parent.name) - sources.mean_start(path)
    for path in items
    if path.name == 'mean'
  }
  prefixed = [_prefixed(use, steps) for use in uses]
  sums, prefix = [None] * len(jobs), None
  for path in items:
    tree = read(run, path)
    if path in steps and any(prefixed):
      prefix = _added(prefix, tree, np.float64(steps[path]))
    for i, use in enumerate(uses):
      if not prefixed[i] and path in use:
        sums[i] = _added(sums[i], tree, np.float32(use[path]))
      elif c := prefixed[i].get(path):
        term = prefix if path in steps else tree
        sums[i] = _added(sums[i], term, np.float64(c))
  single = lambda x: x.astype(np.float32, copy=False)
  return [jax.tree.map(single, total) for total in sums]


def _prefixed(use, steps) -> dict[pathlib.Path, float]:
  """Returns the coefficients of a sum with the interval means summed up.

  With means M_i of n_i steps, and P_k = n_1 M_1 + .. + n_k M_k,

    sum_i c_i M_i = sum_k (c_k / n_k - c_{k+1} / n_{k+1}) P_k,

  of which only the kinks of the decay remain: two terms for a linear one,
  whatever its window. Returns {} where this does not save anything.

  Args:
    use: {item: coefficient}.
    steps: {item: n} of all interval means, oldest first.
  """
  slopes = np.array([use.get(path, 0) / n for path, n in steps.items()])
  kinks = slopes - np.append(slopes, 0)[1:]
  kinks[np.abs(kinks) < 1e-12 * np.abs(slopes).max(initial=0)] = 0
  if max(np.count_nonzero(kinks), 2) >= np.count_nonzero(slopes):
    return {}
  others = {path: c for path, c in use.items() if path not in steps}
  return {**others, **dict(zip(steps, kinks.tolist(), strict=True))}


def _added(total, tree, c):
  # The first product is the sum, as in merging/engine/stream.py.
  product = jax.tree.map(lambda x: x * c, tree)
  return jax.tree.map(np.add, total, product) if total else product


def read(run: Run, path: pathlib.Path) -> Any:
  """Returns an item of a checkpoint as float arrays of numpy, verified."""
  step, name = int(path.parent.name), path.name
  abstract = checkpoint.abstract_item(path)
  tree = checkpoint.restore_item(run.path, step, name, abstract)
  return jax.tree.map(np.asarray, tree)


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
