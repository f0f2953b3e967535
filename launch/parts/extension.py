"""How a run goes on to a longer horizon (not a command)."""

import pathlib
import re
import shlex
from typing import Any, NamedTuple

import numpy as np

from launch.parts import curves
from lm import address
from lm.errors import UserError
from lm.foreign_logs import Log
from schedules.theory import bound, transfer

_MOST = 20_000  # steps of the theory's schedules: only their ratios matter


class Tuned(NamedTuple):
  """The cooldown for which the learning rate of a run was chosen.

  start: the step at which it began; the run's multiplier was 1 before.
  """

  num_steps: int
  decay: float
  shape: str
  start: int
  warmup_steps: int


class Proposal(NamedTuple):
  """A way to go on: what it is, its bound, and the command."""

  name: str
  bound: float
  command: str


def tuned(found: Log, decay: float) -> Tuned | None:
  """Reads it off the run; None for schedules that have no stable phase.

  Args:
    found: a run of ours.
    decay: the fraction, for a run at constant rate; 0 = that of the run.

  Raises:
    UserError: a fraction outside (0, 1), or one that the run does not have.
  """
  schedule, steps = found.config['schedule'], found.config['num_steps']
  if schedule['name'] == 'constant':
    own, warmup, shape = 0.0, schedule['warmup_steps'], 'linear'
  elif schedule['name'] == 'wsd' and schedule['decay'] < 1:
    own, warmup = schedule['decay'], round(schedule['warmup'] * steps)
    shape = schedule['shape']
  else:
    return None
  if own and decay:
    raise UserError(
      f'--decay={decay} is for runs at a constant rate; {found.name} has '
      f'decay={own}.'
    )
  fraction = own or decay or 0.2
  if not 0 < fraction < 1:
    raise UserError(f'--decay={decay} must lie between 0 and 1.')
  return Tuned(steps, fraction, shape, steps - round(own * steps), warmup)


def proposals(found: Log, was: Tuned, num_steps: int) -> list[Proposal]:
  """Returns the ways to go on at the run's learning rate, best bound first.

  Raises:
    UserError: no checkpoint of the stable phase is left.
  """
  shrink = max(1.0, num_steps / _MOST)
  old, new = (round(n / shrink) for n in (was.num_steps, num_steps))
  shape = {'decay': was.decay, 'shape': was.shape}
  at = _checkpoint(found, was, round((1 - was.decay) * num_steps))
  if at is None:
    raise UserError(
      f'{found.name} has no checkpoint between the end of its warm-up, step '
      f'{was.warmup_steps}, and its cooldown at step {was.start}; it has '
      f'{address.steps(found.name)}.'
    )
  ways = [('unchanged', 'unchanged', at, was.decay, 1.0)]
  longer = transfer.longer_decay(old, new, **shape)
  if longer is not None and longer < 1:
    begin = _checkpoint(found, was, round((1 - longer) * num_steps))
    name = f'longer cooldown, {longer:.3f} of the run'
    if begin is not None:
      ways.append((name, 'longer', begin, longer, 1.0))
  rho = transfer.lower_rate(
    old, new, switch=max(round(at / shrink), 1), **shape
  )
  name = f'lower rate, {rho:.3f} of the old from step {at} on'
  ways.append((name, 'lower', at, was.decay, rho))
  make = _Commands(found, was, num_steps)
  theory = _Theory(old, new, shrink, was)
  built = [
    Proposal(name, theory.bound(*how), make(way, *how))
    for name, way, *how in ways
  ]
  return sorted(built, key=lambda p: p.bound)


def _checkpoint(found, was, cooldown):
  """Returns the newest checkpoint of the stable phase before a cooldown."""
  every = found.config['checkpoint']['every_steps']
  mean = found.config['checkpoint']['mean']
  saved = address.steps(found.name)
  latest = min(was.start, cooldown)
  usable = [s for s in saved if was.warmup_steps <= s <= latest and s > 0]
  usable = [s for s in usable if not mean or s % every == 0]
  return usable[-1] if usable else None


class _Theory:
  """The bound of a longer run, at the rate that is best for the old one."""

  def __init__(self, old: int, new: int, shrink: float, was: Tuned) -> None:
    self._new, self._shrink, self._shape = new, shrink, was.shape
    before = self._wsd(old, was.decay)
    self._peak = bound.best(before).learning_rate

  def bound(self, switch: int, decay: float, rho: float) -> float:
    m = self._wsd(self._new, decay)
    m = np.where(np.arange(m.size) < switch / self._shrink, 1.0, rho * m)
    return bound.omega(self._peak * m)

  def _wsd(self, num_steps, decay):
    text = f'wsd:warmup=0,decay={decay},shape={self._shape}'
    return curves.curve(text, num_steps).value


class _Commands:
  def __init__(self, found: Log, was: Tuned, num_steps: int) -> None:
    self._found, self._was, self._num_steps = found, was, num_steps

  def __call__(self, way: str, at: int, decay: float, rho: float) -> str:
    config = self._found.config
    run = self._found.name.rstrip('/')
    fields: dict[str, Any] = {
      'branch': f'{run}@{at}',
      'num_steps': self._num_steps,
      'schedule.warmup': round(self._was.warmup_steps / self._num_steps, 9),
      'schedule.decay': round(decay, 4),
      'schedule.shape': self._was.shape,
    }
    if config['branch']:  # of a branch this is the run's own state and data
      fields |= {'branch_state': '', 'branch_data': 'continue'}
    if config.get('init'):
      fields |= {'init': '', 'init_state': False}
    if rho != 1:
      fields['learning_rate'] = float(f'{rho * config["learning_rate"]:.5g}')
    name = pathlib.Path(f'{run}-{self._num_steps}-{way}')
    return _train(f'{run}/config.json:schedule=wsd', name, fields)


def _train(
  config: str, workdir: pathlib.Path | str, fields: dict[str, Any], *more: str
) -> str:
  flags = [f'--config={config}', f'--workdir={workdir}']
  flags += [f'--config.{k}={v}' for k, v in fields.items()]
  return shlex.join(['python', '-m', 'launch.train', *flags, *more])


def another(found: Log, text: str, num_steps: int) -> str:
  """Returns the command that trains from scratch with another schedule.

  The peak is multiplied by the ratio of the best peaks of both schedules, as if
  a branch had been trained with its own from step 0.
  """
  old = curves.values(found.config['schedule'], found.config['num_steps'])
  new = curves.curve(text, num_steps).value
  peak = found.config['learning_rate'] * transfer.ratio(old, new)
  run = found.name.rstrip('/')
  head, *flags = curves.as_flags(text, found.config['schedule'])
  fields = {'num_steps': num_steps, 'learning_rate': float(f'{peak:.5g}')}
  if found.config['branch']:
    fields['branch'] = ''
  # Only what the file has otherwise, without folders: wsd-decay-0.4, table.
  words = [head.rpartition('=')[2]]
  words += [f.removeprefix('--config.schedule.') for f in flags]
  words = [re.sub(r'[^=]*/', '', w) for w in words]
  name = re.sub(r'[^\w.]+', '-', '-'.join(words)).strip('-')
  return _train(
    f'{run}/config.json{head}', f'{run}-{num_steps}-{name}', fields, *flags
  )
