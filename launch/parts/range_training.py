"""A run in which one float grows from step to step (not a command)."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich import progress

from lm import branch, follow, loop, mesh, restore, spec, step, width
from lm.errors import UserError, did_you_mean
from schedules.theory import lr_range


def check_knob(config: ConfigDict, knob: str, low: float, high: float) -> None:
  """Refuses what is no float of the optimizer, or cannot have these values."""
  legal = ['learning_rate', *spec.floats('optimizers', config.optimizer)]
  if knob not in legal:
    raise UserError(
      f"--knob='{knob}' is no float of optimizers/{config.optimizer.name}.py."
      f'{did_you_mean(knob, legal)}'
    )
  least, most = follow.legal(knob)
  for flag, value in (('low', low), ('high', high)):
    if not least <= value <= most:
      raise UserError(
        f'--{flag}={value} must be from {least} to {most}, as {knob}.'
      )
  if knob != 'learning_rate':
    rules = []
    for value in (low, high):
      c = ConfigDict(config.to_dict())
      c.optimizer[knob] = value
      rules.append(width.factors(c))
    if rules[0] != rules[1]:
      raise UserError(
        f'--knob={knob} changes the width rule of {config.optimizer.name}, '
        'which is fixed for a run; give --config.model.base_width=0.'
      )


def train(
  config: ConfigDict, knob: str, values: np.ndarray
) -> tuple[list[float], str]:
  """Takes one step with each value; writes nothing, changes no run.

  Starts where the config says: from scratch, or with `branch` and `init`.

  Returns:
    The training loss after each step, up to the divergence or the last value
    but one; and a line that says where it began.
  """
  c = _constant(config, len(values))
  branch.begin(c)
  built = loop.build(c)
  restore.check_shapes(c, built.abstract)
  mesh.check_memory(built.abstract)
  losses, watch = [], lr_range.Watch()
  with jax.set_mesh(built.mesh):
    state, origin = restore.begin(c, built.abstract, built.init)
    first = int(state.step) - branch.data_offset(c)
    for n, value in enumerate(progress.track(values, knob, transient=True)):
      tokens = built.batch(first + n)
      traced = _floats(config, c, knob, float(value))
      state, metrics = built.train_step(state, tokens, traced)
      losses.append(float(metrics['train/loss']))
      if watch.diverged(losses[-1]):
        break
  return losses[1:], origin  # a loss is that before its step


def _constant(config, num_values) -> ConfigDict:
  c = ConfigDict(config.to_dict())
  c.schedule = spec.spec('schedules', 'constant')
  c.follow = ''
  c.checkpoint.update(mean=False, moment=False, ema='')
  c.eval.merged = ''
  c.normalize_decay = False  # by another num_steps: `_floats` does it
  c.num_steps = 2**31 - 2 - num_values  # of no meaning at a constant rate
  return c.lock()


def _floats(config, constant, knob: str, value: float) -> dict[str, Any]:
  """Returns the traced numbers of a step, with those that `config` means."""
  found = step.floats(constant)
  place = found if knob == 'learning_rate' else found['optimizer']
  place[knob] = value
  if config.normalize_decay:
    found['optimizer']['weight_decay'] /= config.num_steps**0.5
  return found
