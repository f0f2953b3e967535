"""Methods to compare, and their runs (not a command)."""

import contextlib
import io
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from launch.parts import given
from lm import branch, card, data, log, loop, origin, programs, restore
from lm.errors import UserError, of_code
from lm.run import Run

CHOICES = 'optimizer', 'schedule', 'size'  # behind the colon of --config
_MAY_CHANGE = 'mesh.', 'checkpoint.keep_', 'log_every_steps'
_LONGEST = 200  # name of a directory


class Method(NamedTuple):
  """Choices behind the colon of --config, and fields of it."""

  name: str
  choices: dict[str, str]
  fields: dict[str, Any]

  def config(self, **fields: Any) -> ConfigDict:
    """Returns the config of this method, with more fields of the config."""
    return given.changed(self.choices, {**self.fields, **fields})


def parse(text: str) -> Method:
  """Parses 'muon' or 'optimizer=adamw,optimizer.decay=cautious,schedule=wsd'.

  A word alone is an optimizer. KEY=VALUE is a choice behind the colon of
  --config, or a field of the config.
  """
  choices, fields = {}, {}
  for part in map(str.strip, text.split(',')):
    key, equals, value = part.partition('=')
    if not equals:
      key, value = 'optimizer', part
    if not value or key in choices or key in fields:
      raise UserError(
        f"--method={text}: '{part}' is empty or a second {key}; legal: an "
        'optimizer, or KEY=VALUE, by commas.'
      )
    (choices if key in CHOICES else fields)[key] = value
  if 'seed' in fields:
    raise UserError(
      f'--method={text}: seeds are the same for all methods; --config.seed is '
      'that of the search.'
    )
  method = Method(text, choices, fields)
  if len(folder(method)) > _LONGEST:
    raise UserError(
      f'--method={text:.40}... has {len(folder(method))} characters; legal: at '
      f'most {_LONGEST}, as it names a directory.'
    )
  method.config()  # refuses what does not exist
  return method


def folder(method: Method) -> str:
  """Returns the name of the directory of a method's runs."""
  return re.sub(r'[^A-Za-z0-9_.=-]+', '+', method.name)


class Trials:
  """Trains runs below a directory, each once; later calls read them.

  Args:
    workdir: the directory.
    stop: whether to stop after a run.
    total: how many runs there will be, if it is known.
    losses: {run: final validation loss} of all that were asked for.
    reused: how many of them had been trained before.
    older: how many of these with other code of lm/.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    stop: Callable[[], bool] = lambda: False,
    total: int = 0,
  ) -> None:
    self.workdir, self.stop, self.total = pathlib.Path(workdir), stop, total
    self.losses: dict[pathlib.Path, float] = {}
    self._seconds: list[float] = []  # of the runs trained here
    self.reused = self.older = 0
    self._checked: dict[str, loop.Built] = {}
    self._earlier: dict[str, loop.Built] = {}
    self._data: dict[tuple[Any, ...], str] = {}

  def check(
    self, name: str, config: ConfigDict, path: pathlib.Path | None = None
  ) -> None:
    """Refuses, before any training, what could not be trained.

    Args:
      name: of what is checked, for the sentence.
      config: of the run.
      path: its directory, where it is known; it may hold the run.
    """
    try:
      self._check(config, path)
    except UserError as e:
      raise UserError(f'{name}: {e}') from e

  def _check(self, config, path):
    if path and self._finished(path, config):
      return
    config = config.copy_and_resolve_references()  # branch.begin may write
    if path and path.exists() and not path.is_dir():
      raise UserError(f"'{path}' is no directory.")
    for field in ('branch', 'init'):
      text = config[field]
      merge = field == 'init' and '/merged/' in text
      if text and '@' not in text and not merge:
        raise UserError(
          f"{field}='{text}' must name the step, as RUN@1000, so that all runs "
          'begin alike.'
        )
    branch.begin(config, self.workdir)
    kind = programs.statics(config)
    known = self._checked.get(kind)
    built = self._checked[kind] = loop.build(config, known)
    restore.check_shapes(config, built.abstract)
    if not known:  # an optimizer of one's own may raise when it is traced
      with of_code(f'optimizers/{config.optimizer.name}.py'):
        programs.trace(config, built)

  def path(
    self, method: Method, fields: Mapping[str, float], seed: int
  ) -> pathlib.Path:
    """Returns the directory of a run."""
    name = '+'.join(
      f'{field.rpartition(".")[2]}={value:.8g}'
      for field, value in fields.items()
    )
    return self.workdir / folder(method) / f'{name or "as-given"}-seed{seed}'

  def loss(
    self, method: Method, fields: Mapping[str, float], seed: int
  ) -> float:
    """Returns the loss of a method with these fields and this seed."""
    config = method.config(**fields, seed=seed)
    return self.train(self.path(method, fields, seed), config)

  def train(self, path: pathlib.Path, config: ConfigDict) -> float:
    """Returns the final validation loss of a run in nats; inf if it diverged.

    Raises:
      UserError: the directory holds another run.
      Preempted: the run was told to stop.
    """
    begin, status = time.perf_counter(), self._finished(path, config)
    known = bool(status)
    if known:
      self.reused += path not in self.losses
      code = log.read_meta(path).get('code_of_lm')
      self.older += path not in self.losses and code != origin.library()
    else:
      status = self._train(config, path)
    if status == 'preempted' or self.stop():
      raise Preempted
    self._check_data(path, config)
    loss = float('inf')
    if status == 'done':
      found = Run(path).metrics.get('eval/loss')
      if found is None or found.step[-1] != config.num_steps:
        raise UserError(f'{path} is done, but its log has no final loss.')
      loss = float(found.value[-1])
      loss = loss if math.isfinite(loss) else float('inf')
    new = path not in self.losses
    self.losses[path] = loss
    if new:
      took = 'trained before'
      if not known:
        self._seconds.append(time.perf_counter() - begin)
        took = f'{self._seconds[-1]:.0f} s'
      print(f'{path}: {loss:.6g} nats ({took}{self._progress()})', flush=True)
    return loss

  def note(self) -> str:
    """Returns a sentence on what was not trained now; '' of nothing."""
    if not self.reused:
      return ''
    text = f'{self.reused} of {len(self.losses)} runs had been trained before'
    if self.older:
      text += f'; warning: {self.older} with other code of lm/'
    return f'{text}.'

  def _progress(self):
    left = self.total - len(self.losses)
    if left < 1 or not self._seconds:
      return ''
    rest = left * statistics.median(self._seconds)
    return f'; {left} of {self.total} left, eta {rest:.0f} s'

  def _train(self, config, path):
    """Trains a run; its own lines are shown only if it fails."""
    lines = io.StringIO()
    try:
      with contextlib.redirect_stdout(lines):
        return loop.train(config, path, self._earlier)
    except BaseException:
      print(lines.getvalue(), end='')
      raise

  def _finished(self, path, config):
    """Returns 'done' or 'diverged' of a run that needs no more training.

    Raises:
      UserError: another run, which would be no comparison.
    """
    if not (path / 'meta.json').is_file():
      return ''
    changed = card.diff(log.read_config(path), card.as_dict(config))
    for field, (old, new) in changed.items():
      if not field.startswith(_MAY_CHANGE):
        raise UserError(
          f'{path} was trained with {field}={old}, not {new}; use a new '
          '--workdir.'
        )
    meta = log.read_meta(path)
    other = meta.get('code') != origin.code(config)
    if other or meta.get('code_before'):
      raise UserError(
        f'{path} was trained with other code or tables of '
        f'{config.optimizer.name} or {config.schedule.name}; remove it, or use '
        'a new --workdir.'
      )
    return meta['status'] if meta['status'] in ('done', 'diverged') else ''

  def _check_data(self, path, config):
    """Refuses a run of other data, which would be no comparison."""
    key = config.data.to_json(), config.seq_len, config.model.vocab_size
    if config.data.order:  # its hash covers the order
      key += config.seed, config.batch_size
    if key not in self._data:
      self._data[key] = data.build(config).fingerprint
    if log.read_meta(path).get('data_fingerprint') != self._data[key]:
      raise UserError(f'{path} was trained on other data; use a new --workdir.')


class Preempted(Exception):
  """The process was told to stop; the same command goes on."""
