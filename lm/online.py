"""Losses of averages during training, which the run itself never sees.

`config.eval.merged = 'linear:400,lawa:6,ema:0.1'` adds at every evaluation
- merged/linear_400/loss: had the learning rate been decayed linearly over the
  last 400 steps: the mean of the interval means, exact (see launch.emulate);
- merged/lawa_6/loss: of the mean of the last 6 checkpoints (arXiv 2209.14981);
- merged/ema_0.1/loss: of a tracker of checkpoint.ema.

What lies further back is read from the checkpoints of the run, so that there is
no other state, and a resumed run reports the same. Where they do not reach back
far enough, or are damaged, nothing is reported, nor a decay where the learning
rate was not constant. The loop waits for the reading.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import averages, checkpoint, step
from lm.errors import UserError
from lm.state import TrainState


class Average(NamedTuple):
  """One entry: `count` items named `item`, the newest of them in the state."""

  name: str
  item: str
  count: int


def parse(config: ConfigDict) -> list[Average]:
  """Returns the entries of `eval.merged`.

  Raises:
    UserError: an unknown entry, or one that this config does not store.
  """
  every, keep = config.checkpoint.every_steps, config.checkpoint.keep_latest
  found = []
  for text in filter(None, config.eval.merged.split(',')):
    kind, _, size = text.partition(':')
    refuse = lambda why, text=text: UserError(f"eval.merged: '{text}' {why}.")
    if kind == 'ema':
      try:
        name = f'ema_{float(size)}'  # as in `averages.gammas`
      except ValueError:
        name = ''
      if name not in averages.gammas(config):
        raise refuse(f"is not in checkpoint.ema='{config.checkpoint.ema}'")
      found.append(Average(name, name, 1))
      continue
    if kind not in ('linear', 'lawa') or not size.isdecimal():
      raise refuse('is unknown; legal: linear:STEPS, lawa:COUNT, ema:WIDTH')
    count, rest = divmod(int(size), every if kind == 'linear' else 1)
    if not count:
      raise refuse('must be at least 1')
    if rest:
      raise refuse(f'must be a multiple of checkpoint.every_steps={every}')
    if kind == 'linear' and not config.checkpoint.mean:
      raise refuse('needs checkpoint.mean=True')
    if config.eval.every_steps % every:
      raise refuse(
        f'needs an eval.every_steps that is a multiple of {every}, the steps '
        f'between checkpoints, not {config.eval.every_steps}'
      )
    if 0 < keep < count:
      raise refuse(f'needs {count} checkpoints; checkpoint.keep_latest={keep}')
    if kind == 'linear' and not _ends(config, int(size)):
      raise refuse(
        f'needs {size} steps at a constant rate before an evaluation, which '
        f'schedule={config.schedule.name} has not in num_steps='
        f'{config.num_steps}'
      )
    item = 'mean' if kind == 'linear' else 'params'
    found.append(Average(f'{kind}_{size}', item, count))
  return found


def _ends(config, window) -> set[int]:
  """Steps of evaluation that end `window` updates at a constant rate."""
  rates, every = step.multipliers(config), config.eval.every_steps
  ends = {config.num_steps}
  if every:
    ends |= {*range(0, config.num_steps, every)}
  return {
    n
    for n in ends
    if n >= window
    and n % config.checkpoint.every_steps == 0
    and np.ptp(rates[n - window : n]) < 1e-6
  }


def build(
  config: ConfigDict,
  checkpoints: checkpoint.Checkpoints,
  evaluate: Callable[[Any], dict[str, jax.Array]],
  first: int,
) -> Callable[[TrainState, int], dict[str, jax.Array]]:
  """Returns `evaluate(state, step)`: of its parameters and of all averages.

  Args:
    config: of the run.
    checkpoints: of the run.
    evaluate: params -> {'eval/loss': ...}.
    first: the step at which the run began.
  """
  entries = parse(config)
  window = lambda e: e.count * config.checkpoint.every_steps
  ends = {e: _ends(config, window(e)) for e in entries if e.item == 'mean'}

  def both(state, n):
    metrics = evaluate(state.params)
    for entry in (e for e in entries if n in ends.get(e, {n})):
      params = _average(config, checkpoints, state, n, first, entry)
      if params is not None:
        loss = evaluate(params)['eval/loss']
        metrics[f'merged/{entry.name}/loss'] = loss
    return metrics

  return both


def _average(config, checkpoints, state, n, first, entry):
  """Returns the uniform mean of an entry, None where it cannot be had."""
  if entry.item.startswith('ema'):
    return state.averages[entry.item] if n > 0 else None
  every = config.checkpoint.every_steps
  oldest = n - (entry.count - 1) * every
  # The mean of an interval also needs the interval.
  if n % every or oldest - (every if entry.item == 'mean' else 0) < first:
    return None
  newest = state.mean if entry.item == 'mean' else state.params
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    newest,
  )
  checkpoints.wait()
  total = None
  for at in range(oldest, n, every):
    try:
      one = checkpoint.restore_item(checkpoints.run, at, entry.item, like)
    except checkpoint.Damaged as e:
      print(f'warning: merged/{entry.name}/loss at step {n}: {e}')
      return None
    zero = jax.tree.map(jax.numpy.zeros_like, one) if total is None else total
    total = _add(zero, one, 1 / entry.count)
  return newest if total is None else _add(total, newest, 1 / entry.count)


@jax.jit
def _add(total, tree, weight):
  return jax.tree.map(lambda t, x: t + weight * x, total, tree)
