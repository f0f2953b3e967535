"""Where a branch starts, in steps and in the order of the data."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lm import address, averages, log, opt_state
from lm.errors import UserError, did_you_mean


def begin(config: ConfigDict, run: pathlib.Path | None = None) -> int:
  """Returns the step at which this run starts: 0 unless it is a branch.

  A branch without @STEP means the newest step when it begins: the step is
  written into the config, and at a resume the parent is not looked at again.

  Raises:
    UserError: contradicting fields, or a step at which no branch can start.
  """
  _check(config)
  if not config.branch:
    return 0
  stored = run and (run / 'config.json').is_file()
  begun = log.read_config(run)['branch'] if stored else ''
  if begun and _place(config.branch) in (_place(begun), _place(begun)[:1]):
    config.branch = begun
    if address.steps(run):
      return first_step(config)
  ref = address.locate(config.branch)
  step = ref.step
  if step is None:
    raise UserError(
      f"branch='{config.branch}' is a merge, which has no optimizer state; "
      'use --config.init for it.'
    )
  if config.checkpoint.mean and step % config.checkpoint.every_steps:
    raise UserError(
      f'branch at step {step} needs a checkpoint.every_steps that divides it, '
      f'not {config.checkpoint.every_steps} (or checkpoint.mean=False).'
    )
  if step >= config.num_steps:
    raise UserError(
      f'branch at step {step} is not before num_steps={config.num_steps}; set '
      '--config.num_steps, which counts from the start of the parent.'
    )
  parent = log.read_config(ref.run)
  old, new = parent['optimizer']['name'], config.optimizer.name
  if old != new and not config.branch_state:
    raise UserError(
      f'{ref.run} used {old}; to go on with {new}, say what becomes of the '
      "optimizer state: --config.branch_state='discard', 'keep' or 'carry_mu' "
      '(lm/opt_state.py).'
    )
  for field in ('batch_size', 'seq_len'):
    if config.branch_data == 'continue' and parent[field] != config[field]:
      raise UserError(
        f'branch_data=continue needs the {field} of {ref.run}, '
        f'{parent[field]}, not {config[field]}; or use branch_data=restart.'
      )
  for name in averages.gammas(config):
    if not address.item(ref.run, step, name).is_dir():
      raise UserError(
        f'{ref.run}@{step} has no {name}, an average since step 0; branch with '
        "--config.checkpoint.ema=''."
      )
  if not config.branch.endswith(f'@{step}'):
    config.branch += f'@{step}'
  if config.data.order and (offset := data_offset(config, run)):
    raise UserError(
      f"data.order='{config.data.order}' counts the steps of the run, but its "
      f'data begin at step {offset}; legal: data that no run '
      "began again (branch_data=continue), or data.order=''."
    )
  return step


def _check(config):
  if config.branch and config.init:
    raise UserError(
      f"branch='{config.branch}' and init='{config.init}' exclude each other."
    )
  if config.branch_data not in ('continue', 'restart'):
    raise UserError(
      f"branch_data='{config.branch_data}' does not exist. "
      'Legal: continue, restart.'
    )
  if config.branch_state not in opt_state.POLICIES:
    raise UserError(
      f"branch_state='{config.branch_state}' does not exist."
      + did_you_mean(config.branch_state, opt_state.POLICIES)
    )
  if config.branch_state and not config.branch:
    raise UserError(
      f"branch_state='{config.branch_state}' needs a branch, as "
      '--config.branch=RUN@STEP.'
    )


def first_step(config: Mapping[str, Any]) -> int:
  """Returns the step at which a run that has begun began."""
  return int(config['branch'].rpartition('@')[2] or 0)


def parent(config: Mapping[str, Any]) -> pathlib.Path | None:
  """Returns the run that this one branched from, while it is there."""
  run, at, _ = config['branch'].rpartition('@')
  there = at and (pathlib.Path(run) / 'config.json').is_file()
  return pathlib.Path(run) if there else None


def _place(text):
  """(RUN, 'STEP') or (RUN,), however the path is written."""
  path, _, step = text.rpartition('@')
  if not step.isdecimal():
    return (pathlib.Path(text).resolve(),)
  return pathlib.Path(path).resolve(), step


def tokens(config: Mapping[str, Any], step: int) -> int:
  """Returns how many tokens the parameters of a step were trained on.

  Those of a branch until it began are its parent's, while that is there.
  """
  first, before = 0, 0
  if run := parent(config):
    first = min(first_step(config), step)
    before = tokens(log.read_config(run), first)
  return before + (step - first) * config['batch_size'] * config['seq_len']


def data_offset(
  config: Mapping[str, Any], run: pathlib.Path | None = None
) -> int:
  """Returns the step at which the order of the data begins.

  That of the run itself with branch_data='restart', else that of its parent.

  Args:
    config: of a run whose branch, if any, has a step.
    run: its directory; once it has a checkpoint, meta.json knows.
  """
  restarts = config['branch_data'] == 'restart'
  own = first_step(config) if restarts else 0
  if run and address.steps(run) and (run / 'meta.json').is_file():
    return log.read_meta(run).get('data_offset', own)  # older runs have none
  if restarts or not (before := parent(config)):
    return own
  return data_offset(log.read_config(before), before)
