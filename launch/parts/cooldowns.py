"""Branches that were really decayed, to judge merges by (not a command)."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm import card
from lm.branch import data_offset
from lm.errors import UserError
from lm.run import Run


class Cooldown(NamedTuple):
  """A branch that was really decayed."""

  run: Run
  end: int
  window: int
  losses: np.ndarray

  @property
  def shape(self) -> str:
    schedule = self.run.config.schedule
    return schedule.shape if 'shape' in schedule else schedule.name


def read(run: Run, paths: Sequence[str], floor: float) -> list[Cooldown]:
  """Evaluates the ends of branches; says what emulations to `floor` leave out.

  Raises:
    UserError: see `read_one`.
  """
  found = [read_one(run, Run(path)) for path in paths]
  for branch, *_ in found:
    if others := _other_knobs(run, branch):
      print(
        f'warning: {branch.path} differs from {run.path} in more than its '
        f'schedule, which no merge emulates: {others}.'
      )
    final = branch.config.schedule.get('final', floor)
    if final != floor:
      print(
        f'warning: {branch.path} decays to {final} of its peak, merges here to '
        f'--floor={floor}.'
      )
  return found


def read_one(run: Run, branch: Run) -> Cooldown:
  """Evaluates the end of a branch of `run`, on the tokens of `run`."""
  origin = branch.meta.get('parent', '')  # an imported run has none
  parent, _, start = origin.rpartition('@')
  here = pathlib.Path(parent).resolve() == run.path.resolve()
  if not (parent and here and start.isdecimal()):
    raise UserError(
      f"{branch.path} is not a branch of {run.path}: its parent is '{origin}'."
    )
  if branch.meta['status'] != 'done':
    raise UserError(f'{branch.path} is not done: {branch.meta["status"]}.')
  card.check_same_model(run, branch)
  end, begin = branch.steps[-1], int(start)
  rates = branch.learning_rates()[begin:end]
  # At the end of the run: that of its last update.
  before = run.learning_rates()[: begin + 1][-1]
  if not np.isclose(rates[0], before, rtol=1e-5):
    raise UserError(
      f'{branch.path} begins at a learning rate of {rates[0]:.3e}, not at that '
      f'of {run.path} at step {begin}, {before:.3e}.'
    )
  held = int(np.argmax(rates < rates[0] * (1 - 1e-6)))
  if not held:
    raise UserError(f'{branch.path} is no cooldown: its rate does not fall.')
  first = begin + held - 1
  if first not in run.steps:
    raise UserError(
      f'the cooldown of {branch.path} begins at step {first}, which is no '
      f'checkpoint of {run.path}; it has {run.steps}.'
    )
  losses = run.losses(branch.params(end))
  return Cooldown(branch, end, end - first, losses)


# What a cooldown has of its own; its rates and its model are compared.
_OWN = ('learning_rate', 'num_steps', 'branch', 'init', 'init_state')
_OWN_SECTIONS = ('schedule.', 'checkpoint.', 'model.', *card.MAY_CHANGE)


def _other_knobs(run, branch):
  """Returns 'optimizer.b2=0.9 (0.99), ...' or ''."""
  changed = card.diff(card.as_dict(run.config), card.as_dict(branch.config))
  there, here = (data_offset(r.config, r.path) for r in (run, branch))
  if there == here:
    changed.pop('branch_data', None)  # the same batches
  return ', '.join(
    f'{k}={b} ({a})'
    for k, (a, b) in changed.items()
    if k not in _OWN and not k.startswith(_OWN_SECTIONS)
  )
