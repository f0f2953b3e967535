"""The run card: config.json and meta.json, and what may change at a resume."""

import fcntl
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import address, keep, log, origin, processes, spec
from lm import step as step_lib
from lm.branch import data_offset
from lm.errors import UserError

# These fields may differ between two starts of one run: they do not change its
# parameters (a mesh changes their last bits).
MAY_CHANGE = (
  'log_every_steps', 'max_bad_steps', 'eval.', 'checkpoint.keep_latest',
  'checkpoint.keep_every_steps', 'mesh.',
)  # fmt: skip
LOCK = '.lock'  # in the run directory


def _lock(run: pathlib.Path) -> Any:
  """Takes the run directory for this process; released when it ends.

  Raises:
    UserError: another process trains in it.
  """
  try:
    run.mkdir(parents=True, exist_ok=True)
    # Never through a link, and never truncating what is there.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    handle = os.fdopen(os.open(run / LOCK, flags, 0o644), 'r+')
  except OSError as e:
    raise UserError(f"'{run}' cannot be used as --workdir: {e}.") from e
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    raise UserError(f'Another process is training in {run}.') from e
  return handle


def diff(
  old: dict[str, Any], new: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns the fields that differ: {'optimizer.b2': (0.95, 0.99)}."""
  old, new = _flat(old), _flat(new)
  return {
    k: (old.get(k), new.get(k))
    for k in sorted({*old, *new})
    # A knob that is newer than the run is off in it.
    if old.get(k) != new.get(k) and (k in old or new[k])
  }


# How a model is computed, or began; not which function of parameters it is.
HOW = ('dtype', 'scan_layers', 'remat', 'attention', 'loss_chunk', 'init',
        'init_std')  # fmt: skip


def of_model(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what of a config says which function of its parameters it is."""
  known = config['model'].items()
  return {f'model.{k}': v for k, v in known if k not in HOW}


def other_model(here: Any, there: Any) -> str:
  """Returns '' or what makes other functions of two configs' parameters."""
  changed = diff(*(of_model(as_dict(c)) for c in (there, here)))
  return ', '.join(f'{k}={old}' for k, (old, _) in changed.items())


def check_same_model(run: Any, other: Any) -> None:
  """Raises UserError unless the parameters of two `Run`s mean the same."""
  if changed := other_model(run.config, other.config):
    raise UserError(
      f'{other.path} has {changed}, unlike {run.path}: another model.'
    )


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  found = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      found.update(_flat(value, f'{prefix}{key}.'))
    else:
      found[prefix + key] = value
  return found


def as_dict(config: ConfigDict) -> dict[str, Any]:
  """Returns the config as JSON would give it back (tuples are lists)."""
  return json.loads(json.dumps(config.to_dict()))


def config_hash(fields: dict[str, Any]) -> str:
  """Returns 16 hex digits that are equal for equal configs, by `as_dict`."""
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_config(run: pathlib.Path, config: ConfigDict, at: int) -> None:
  """Compares a config with the one that the run was started with.

  Args:
    run: the run directory.
    config: the new config.
    at: the newest saved step; a longer run is the same run if its schedule
      gives every update before this step the learning rate that it had, and
      the optimizer the floats.

  Raises:
    UserError: a field differs that would make it another run.
  """
  path = run / 'config.json'
  if not path.exists():
    return
  old, new = log.read_config(run), as_dict(config)
  changed = diff(old, new)
  for field in set(changed) - set(_flat(old)):
    if _is_default(new, field):
      del changed[field]
  for field, (before, after) in changed.items():
    print(f'{field}: {before} -> {after}')
  # A section that is newer than the run does nothing without a knob elsewhere.
  refused = [
    k
    for k in changed
    if not k.startswith(MAY_CHANGE)
    and ('.' not in k or k.partition('.')[0] in old)
  ]
  same = _same_past(run, config, at)
  longer = refused == ['num_steps'] and config.num_steps >= at
  if longer and same and _same_floats(config, old['num_steps'], at):
    return
  if not refused and not same:
    raise UserError(
      f'The multipliers of the schedule before step {at} are not those that '
      f'{run} was trained with: a file that it reads has changed.'
    )
  if refused:
    no = " --config.init=''" if config.init else ''
    branch = f', or start from it with --config.branch={run}@{at}{no}'
    if any(k.startswith('model.') for k in refused):
      branch = ''  # its parameters may not fit
    raise UserError(
      f'{run} was started with another {", ".join(refused)}; use a new '
      f'--workdir{branch}. What may change: {", ".join(MAY_CHANGE)}, and '
      f'num_steps to {at} or more when the schedule before step {at} stays the '
      'same, and with it the floats of the optimizer (follow, normalize_decay).'
    )


def _is_default(config: dict[str, Any], field: str) -> bool:
  """Whether a knob of a component, newer than the run, changes nothing."""
  section, _, knob = field.rpartition('.')
  if section not in ('optimizer', 'schedule'):
    return False
  known = spec.knobs(f'{section}s', config[section]['name'])
  return knob in known and config[section][knob] == known[knob]


def _same_past(run: pathlib.Path, config: ConfigDict, at: int) -> bool:
  """Compares the multipliers of the updates that are done with the stored."""
  stored = log.read_multipliers(run)
  if stored is None or config.num_steps < at:
    return stored is None
  now = step_lib.multipliers(config).astype(stored.dtype)
  return np.array_equal(stored[:at], now[:at])


def _same_floats(config: ConfigDict, num_steps: int, at: int) -> bool:
  """Compares the optimizer's floats of the updates done with the old ones."""
  old = config.copy_and_resolve_references()
  old.num_steps = num_steps
  return not at or all(
    np.array_equal(x, y)
    for x, y in zip(_knobs(old, at), _knobs(config, at), strict=True)
  )


def _knobs(config, at):
  one = lambda s: step_lib.knobs(config, s, step_lib.floats(config))
  return jax.tree.leaves(jax.jit(jax.vmap(one))(np.arange(at, dtype=np.int32)))


def _settled(config):
  """Returns a hash of the fields that may not change in a run."""
  flat, free = _flat(config), (*MAY_CHANGE, 'num_steps')
  return config_hash({k: v for k, v in flat.items() if not k.startswith(free)})


def _check_edited(run, meta):
  """Warns if config.json is not the one that the run has gone by so far."""
  path, step = run / 'config.json', meta.get('step', 0)
  known = step and 'config' in meta and path.is_file()
  if known and _settled(log.read_json(path)) != meta['config']:
    print(
      f'warning: {path} was edited: the steps until {step} are of another '
      'config. Undo the change, or use a new --workdir.'
    )


def check_processes(config: ConfigDict, fingerprint: str) -> None:
  """Raises UserError unless all processes have the same run."""
  processes.check_fields('config', as_dict(config))
  processes.check_alike('The data', fingerprint)
  processes.check_alike('The code', origin.everything(config))


class Card:
  """Takes a run directory, until `with` ends; keeps config.json and meta.json.

  Raises:
    UserError: another process trains in it, or it holds another run.
  """

  def __init__(
    self, run: pathlib.Path, config: ConfigDict, fingerprint: str
  ) -> None:
    self._run, self._config = run, config
    self._path = run / 'meta.json'
    self._lock = _lock(run)
    try:
      self._meta = self._checked(fingerprint)
    except BaseException:
      self._lock.close()  # the exception keeps self alive
      raise

  def __enter__(self) -> 'Card':
    return self

  def __exit__(self, *_: object) -> None:
    self._lock.close()

  def _checked(self, fingerprint):
    run, config = self._run, self._config
    saved = address.steps(run)
    last = saved[-1] if saved else 0
    check_config(run, config, last)
    old = log.read_meta(run) if self._path.exists() else {}
    keep.check_lost(run, config.checkpoint.every_steps)
    _check_edited(run, old)
    known = old.get('data_fingerprint', fingerprint)
    if known != fingerprint:
      raise UserError(
        f'The data changed: {run} was started with fingerprint {known}, now it '
        f'is {fingerprint}; use a new --workdir.'
      )
    if config.branch and not saved:
      origin.check_parent(as_dict(config), fingerprint)
    return {
      'status': 'running',
      'step': last,
      'parent': config.branch or config.init,
      'started': old.get('started', _now()),
      'starts': old.get('starts', 0) + 1,
      'data_fingerprint': fingerprint,
      'data_offset': data_offset(config, run),
      'argv': sys.argv,
      'git_commit': origin.git_commit(),
      'code': origin.code(config),
      'code_of_lm': origin.library(),
      'code_before': origin.check({**old, 'step': last}, config),
      'versions': origin.versions(),
      'devices': {
        'kind': jax.devices()[0].device_kind,
        'count': jax.device_count(),
        'processes': jax.process_count(),
      },
    }

  def start(self) -> None:
    log.write_json(self._run / 'config.json', as_dict(self._config))
    self._meta['config'] = _settled(as_dict(self._config))
    self._write()

  def saved(self, step: int) -> None:
    """Notes that a checkpoint of `step` has been started."""
    self._meta['step'] = step
    self._write()

  def finish(self, status: str) -> None:
    self._meta['status'] = status
    self._write()

  def _write(self) -> None:
    log.write_json(self._path, {**self._meta, 'updated': _now()})


def _now() -> str:
  return time.strftime('%Y-%m-%dT%H:%M:%S%z')
