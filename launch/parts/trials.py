"""Methods to compare, and their runs (not a command)."""

import contextlib
import io
import math
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from launch import cli
from launch.parts import tuning
from lm import card, data, follow, log, loop, spec
from lm.errors import UserError, did_you_mean
from lm.run import Run

_MAY_CHANGE = 'mesh.', 'checkpoint.keep_', 'log_every_steps'


class Method(NamedTuple):
  """Choices behind the colon of --config, and fields of it, both as text."""

  name: str
  choices: dict[str, str]
  fields: dict[str, str]

  def config(self, **fields: Any) -> ConfigDict:
    """Returns the config of this method, with more fields of the config."""
    return cli.other_config(self.choices, {**self.fields, **fields})


class Tuned(NamedTuple):
  """The fields that were tuned, and how: {field: what was found}.

  count: different settings that were trained.
  """

  fields: dict[str, float]
  searches: dict[str, tuning.Found]
  count: int


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
        f"--method={text}: '{part}' is empty or repeated; legal: an optimizer, "
        'or KEY=VALUE, by commas.'
      )
    (choices if key in ('optimizer', 'schedule', 'size') else fields)[key] = (
      value
    )
  if 'seed' in fields:
    raise UserError(
      f'--method={text}: seeds are the same for all methods; --config.seed is '
      'that of the search.'
    )
  method = Method(text, choices, fields)
  method.config()  # refuses what does not exist
  return method


def folder(method: Method) -> str:
  """Returns the name of the directory of a method's runs."""
  return re.sub(r'[^A-Za-z0-9_.=-]+', '+', method.name)


class Trials:
  """Trains runs below a directory, each once; later calls read them.

  Args:
    workdir: the directory.
    losses: {run: final validation loss} of all that were asked for.
    reused: how many of them had been trained before.
  """

  def __init__(self, workdir: str | pathlib.Path) -> None:
    self.workdir = pathlib.Path(workdir)
    self.losses: dict[pathlib.Path, float] = {}
    self.reused = 0
    self._earlier: dict[str, loop.Built] = {}
    self._data: dict[tuple[Any, ...], str] = {}

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
    """Returns the final validation loss of a run in nats; inf if it diverged.

    Raises:
      UserError: the directory holds another run.
      Preempted: the run was told to stop.
    """
    path = self.path(method, fields, seed)
    config = method.config(**fields, seed=seed)
    begin, status = time.perf_counter(), self._finished(path, config)
    if status:
      self.reused += path not in self.losses
    else:
      status = self._train(config, path)
    if status == 'preempted':
      raise Preempted
    loss = float('inf')
    if status == 'done':
      loss = float(Run(path).metrics['eval/loss'].value[-1])
    if path not in self.losses:
      seconds = time.perf_counter() - begin
      print(f'{path}: {loss:.4f} nats ({seconds:.0f} s)', flush=True)
    self.losses[path] = loss
    return loss

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
      UserError: another run, or other data, which would be no comparison.
    """
    if not (path / 'config.json').is_file():
      return ''
    changed = card.diff(log.read_config(path), card.as_dict(config))
    for field, (old, new) in changed.items():
      if not field.startswith(_MAY_CHANGE):
        raise UserError(
          f'{path} was trained with {field}={old}, not {new}; use a new '
          '--workdir.'
        )
    meta = log.read_meta(path)
    if meta.get('code') != card.code(config):
      raise UserError(
        f'{path} was trained with other code of {config.optimizer.name} or '
        f'{config.schedule.name}; remove it, or use a new --workdir.'
      )
    if meta['status'] not in ('done', 'diverged'):
      return ''
    key = config.data.to_json(), config.seq_len, config.model.vocab_size
    if key not in self._data:
      self._data[key] = data.build(config).fingerprint
    if meta.get('data_fingerprint') != self._data[key]:
      raise UserError(f'{path} was trained on other data; use a new --workdir.')
    return meta['status']


class Preempted(Exception):
  """The process was told to stop; the same command goes on."""


def fields_of(method: Method, knobs: list[str]) -> dict[str, float]:
  """Returns {field: value} where the search of each knob begins.

  Args:
    method: what is tuned.
    knobs: 'learning_rate' or floats of its optimizer; those it has not are left
      out.

  Raises:
    UserError: a knob whose value is zero, which no factor changes.
  """
  config, found = method.config(), {}
  known = spec.floats('optimizers', config.optimizer)
  for knob in knobs:
    if knob != 'learning_rate' and knob not in known:
      continue
    field = knob if knob == 'learning_rate' else f'optimizer.{knob}'
    value = config.learning_rate if knob == 'learning_rate' else known[knob]
    if _away(knob, value) <= 0:
      raise UserError(
        f'--tune={knob}: {method.name} has {field}={value:g}, which no factor '
        'changes; give it a value to start from.'
      )
    found[field] = value
  return found


def check_knobs(methods: list[Method], knobs: list[str]) -> None:
  """Refuses a knob that is repeated, or that no method has."""
  legal = {'learning_rate'}
  for method in methods:
    legal |= {*spec.floats('optimizers', method.config().optimizer)}
  for knob in knobs:
    if knob not in legal or knobs.count(knob) > 1:
      raise UserError(
        f"--tune: '{knob}' is repeated or no float of these optimizers."
        + did_you_mean(knob, legal)
      )


def tune(
  trials: Trials,
  method: Method,
  knobs: list[str],
  *,
  seeds: Sequence[int],
  factor: float,
  most: int,
) -> Tuned:
  """Searches one knob after the other, each at the best of those before.

  A loss is the mean over the seeds. A float between 0 and 1, as b1, is searched
  by its distance from 1.
  """
  fields, searches, settings = fields_of(method, knobs), {}, set()
  for field, start in fields.items():
    knob = field.rpartition('.')[2]
    least, largest = follow.legal(knob)

    def measure(x, field=field, knob=knob):
      at = {**fields, field: _away(knob, x)}
      settings.add(tuple(at.values()))
      return sum(trials.loss(method, at, s) for s in seeds) / len(seeds)

    found = tuning.search(
      measure,
      _away(knob, start),
      factor=factor,
      most=most,
      legal=lambda x, k=knob, a=least, b=largest: a <= _away(k, x) <= b,
    )
    losses = {_away(knob, x): loss for x, loss in found.losses.items()}
    fields[field] = _away(knob, found.best)
    edge = found.edge
    if edge and _away(knob, 0.0):  # what is lower from 1 is higher
      edge = {'lower': 'higher', 'higher': 'lower'}[edge]
    searches[field] = tuning.Found(losses, fields[field], edge)
  return Tuned(fields, searches, len(settings))


def _away(knob, value):
  """Returns 1 - value of what lies between 0 and 1; its own inverse."""
  return 1 - value if math.isclose(follow.legal(knob)[1], 1.0) else value
