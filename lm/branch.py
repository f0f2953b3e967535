"""Where a branch starts, in steps and in the order of the data."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lm import address, averages, log, opt_state
from lm.errors import UserError, did_you_mean


def begin(config: ConfigDict, run: pathlib.Path | None = None) -> int:
  """Returns the step at which this run starts: 0 unless it is a branch.

  A branch without @STEP means the newest step when it begins: the step is
  written into the config, and at a resume the parent is not looked at again.
  So is branch_data of a branch that continues the data of another one which
  began them again at step 10: 'restart@10'.

  Raises:
    UserError: contradicting fields, or a step at which no branch can start.
  """
  if config.branch and config.init:
    raise UserError(
      f"branch='{config.branch}' and init='{config.init}' exclude each other."
    )
  if not re.fullmatch(r'continue|restart(@\d{1,15})?', config.branch_data):
    raise UserError(
      f"branch_data='{config.branch_data}' does not exist. "
      'Legal: continue, restart.'
    )
  if config.branch_state not in opt_state.POLICIES:
    raise UserError(
      f"branch_state='{config.branch_state}' does not exist."
      + did_you_mean(config.branch_state, opt_state.POLICIES)
    )
  if not config.branch:
    return 0
  stored = run and (run / 'config.json').is_file()
  begun = log.read_config(run)['branch'] if stored else ''
  if begun and _place(config.branch) in (_place(begun), _place(begun)[:1]):
    config.branch = begun
    if address.steps(run):
      data = log.read_config(run)['branch_data']
      if config.branch_data == 'continue' and '@' in data:
        config.branch_data = data
      return int(begun.rpartition('@')[2])
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
      f'branch at step {step} is not before num_steps={config.num_steps}.'
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
  if config.branch_data == 'continue' and data_offset(parent):
    config.branch_data = f'restart@{data_offset(parent)}'
  if not 0 <= data_offset(config) <= step:
    raise UserError(
      f"branch_data='{config.branch_data}' must not lie behind the branch's "
      f'start, step {step}.'
    )
  if config.data.order and data_offset(config):
    raise UserError(
      f"data.order='{config.data.order}' counts the steps of the run, but its "
      f'data begin at step {data_offset(config)}; legal: data of a run that '
      "never began them again (branch_data=continue), or data.order=''."
    )
  return step


def _place(text):
  """('RUN', 'STEP') or ('RUN',), however the path is written."""
  path, _, step = text.rpartition('@') if '@' in text else (text, '', '')
  return (pathlib.Path(path).resolve(), *filter(None, [step]))


def data_offset(config: Mapping[str, Any]) -> int:
  """Returns the step at which the order of the data begins: of 'restart'.

  Args:
    config: of a run that has begun, so that its branch has a step.
  """
  word, _, at = config['branch_data'].partition('@')
  if word == 'continue' or not config['branch']:
    return 0
  return int(at or config['branch'].rpartition('@')[2])
