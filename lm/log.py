"""What a run writes beside checkpoints: JSON lines and TensorBoard."""

import json
import operator
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lm import progress
from lm.errors import UserError


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new, never a part."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.unlink(missing_ok=True)  # it might be a link
  temporary.write_text(json.dumps(value, indent=2) + '\n')
  temporary.replace(path)


def write_multipliers(run: pathlib.Path, values: np.ndarray) -> None:
  """Writes RUN/schedules/multiplier.npz, which schedule=table reads."""
  path = run / 'schedules' / 'multiplier.npz'
  path.parent.mkdir(exist_ok=True)
  temporary = path.with_name('temporary.npz')
  np.savez_compressed(temporary, multiplier=values.astype(np.float32))
  temporary.replace(path)


def read_multipliers(run: pathlib.Path) -> np.ndarray | None:
  """Returns what `write_multipliers` wrote, None if there is nothing."""
  path = run / 'schedules' / 'multiplier.npz'
  if not path.is_file():
    return None
  try:
    with np.load(path, allow_pickle=False) as stored:
      return stored['multiplier']
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise UserError(f"'{path}' has no readable multipliers: {e}.") from e


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; UserError if it is missing, cut or something else."""
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"'{path}' cannot be read as JSON: {e}.") from e
  if not isinstance(value, dict):
    raise UserError(f"'{path}' is not a JSON object.")
  return value


def read_typed(
  path: pathlib.Path, fields: Mapping[str, Any], newer: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads a JSON object whose `fields`, by dotted name, have these types.

  Raises:
    UserError: it is not readable, a field is missing or of another type; those
      of `newer` may be missing.
  """
  found = read_json(path)
  for field, kind in {**fields, **newer}.items():
    value = found
    for key in field.split('.'):
      value = value.get(key) if isinstance(value, dict) else None
    if value is None and field not in fields:
      continue
    wrong = isinstance(value, bool) and kind is not bool  # an int in Python
    if wrong or not isinstance(value, kind):
      what = 'is missing' if value is None else f'cannot be {value!r}'
      raise UserError(
        f"'{path}' is not the {path.name} of a run: {field} {what}."
      )
  return found


def _by_type(types: Mapping[Any, str]) -> dict[str, Any]:
  return {name: t for t, names in types.items() for name in names.split()}


# Fields of every stored config, of newer ones, and of meta.json (an imported
# run has no parent), by their type in JSON.
_FIELDS = _by_type({
  int: 'num_steps batch_size seq_len seed model.num_layers model.d_model '
  'model.num_heads model.num_kv_heads model.head_dim model.d_ff '
  'model.vocab_size model.loss_chunk eval.batch_size eval.num_sequences '
  'checkpoint.every_steps',
  (int, float): 'learning_rate model.rope_theta model.norm_eps model.init_std '
  'model.logit_softcap',
  str: 'optimizer.name schedule.name branch data.source data.train data.eval '
  'model.dtype model.remat model.attention branch_data',
  bool: 'checkpoint.mean model.qk_norm model.tie_embeddings model.scan_layers',
})  # fmt: skip
_NEWER = _by_type({
  int: 'data.order_begin data.order_end model.base_width model.base_head_dim',
  str: 'data.order data.score model.init model.activation', bool: 'model.gated',
})  # fmt: skip
# What runs have that are older than these knobs of the model.
_MODEL = {'base_width': 0, 'base_head_dim': 0, 'init': '',
          'activation': 'silu', 'gated': True}  # fmt: skip
_META = {'status': str, 'step': int}
_META_NEWER = _by_type({str: 'parent code config', int: 'starts data_offset',
                        dict: 'code_before'})  # fmt: skip


def read_config(run: pathlib.Path) -> dict[str, Any]:
  """Reads the config.json of a run of any age; errors as of `read_typed`."""
  found = read_typed(run / 'config.json', _FIELDS, _NEWER)
  found['model'] = {**_MODEL, **found['model']}
  return found


def read_meta(run: pathlib.Path) -> dict[str, Any]:
  """Reads the meta.json of a run; errors as of `read_typed`."""
  return read_typed(run / 'meta.json', _META, _META_NEWER)


def parse_lines(
  path: pathlib.Path, check: Callable[[Any], Any] = lambda row: None
) -> list[Any]:
  """Reads JSON lines; the cut last line of a killed run is left out.

  Raises:
    UserError: another line is not JSON, or `check` of it fails.
  """
  *lines, last = path.read_bytes().split(b'\n')
  found = []
  for number, line in enumerate([*lines, last], 1):
    try:
      if line.strip():
        row = json.loads(line.decode('utf-8-sig'))
        check(row)
        found.append(row)
    except (ValueError, KeyError, TypeError) as e:
      if number <= len(lines):
        raise UserError(f"line {number} of '{path}' is damaged: {e}.") from e
  return found


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads metrics.jsonl, as `parse_lines`; every line has a step."""
  if not path.exists():
    return []
  return parse_lines(path, lambda row: operator.index(row['step']))


class Metrics:
  """Writes metrics.jsonl and TensorBoard events of the steps from `start` on.

  Lines of a killed run at or after `start` are dropped, since they are written
  again: the file of a resumed run is that of an uninterrupted one.
  """

  def __init__(self, run: pathlib.Path, start: int) -> None:
    path = run / 'metrics.jsonl'
    kept = [x for x in read_lines(path) if x['step'] < start]
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(''.join(json.dumps(x) + '\n' for x in kept))
    temporary.replace(path)
    self._lines = path.open('a')
    self._events = EventFileWriter(str(run / 'tb'), flush_secs=5)
    # TensorBoard hides the points of earlier sessions from this step on.
    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._event(step=start, session_log=log)

  def write(self, step: int, values: dict[str, float]) -> None:
    self._lines.write(json.dumps({'step': step, **values}) + '\n')
    self._lines.flush()
    scalar = summary_pb2.Summary.Value
    summary = [
      scalar(tag=k, simple_value=v) for k, v in values.items() if k != 'tokens'
    ]
    self._event(step=step, summary=summary_pb2.Summary(value=summary))

  def _event(self, **fields: Any) -> None:
    self._events.add_event(event_pb2.Event(wall_time=time.time(), **fields))

  def flush(self) -> None:
    """Puts everything on disk: called before a checkpoint is started."""
    os.fsync(self._lines.fileno())
    self._events.flush()

  def close(self) -> None:
    self._lines.close()
    self._events.close()


class Writer:
  """Everything that is written about a step, and how fast the steps go."""

  def __init__(
    self,
    run: pathlib.Path,
    start: int,
    total: int,
    *,
    tokens: tuple[int, int],  # at `start`, and of a step
    flops_per_token: float,
    peak_flops: float | None,
  ) -> None:
    self._metrics = Metrics(run, start)
    self._progress = progress.Progress(start, total)
    (at_start, self._tokens), self._flops = tokens, flops_per_token
    self._before = at_start - start * self._tokens  # of a branch: its parent's
    self._peak = peak_flops
    self._shown: dict[str, str] = {}
    self._clock = self._first = None  # (step, time)

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes the metrics of the state at `step`, which has been computed."""
    values = {'tokens': self._before + step * self._tokens, **values}
    if 'train/loss' in values:
      values.update(self._throughput(step))
    self._metrics.write(step, {k: float(v) for k, v in values.items()})
    self._shown.pop('train/loss', None)  # the last line of a run has none
    if 'train/loss' in values:
      self._shown['train/loss'] = f'train/loss {values["train/loss"]:.4f}'
    if 'eval/loss' in values:  # of step `step`, and shown until the next one
      loss = values['eval/loss']
      self._shown['eval/loss'] = f'eval/loss@{step} {loss:.4f}'
    order = ('train/loss', 'eval/loss', 'speed')
    shown = [self._shown[k] for k in order if k in self._shown]
    self._progress.update(step, '  '.join(shown))

  def _throughput(self, step: int) -> dict[str, float]:
    """Tokens per second since the line before, with evaluation and saving."""
    now, before = time.perf_counter(), self._clock
    self._clock = (step, now)
    if before is None or step == before[0]:
      return {}
    speed = (step - before[0]) * self._tokens / (now - before[1])
    # Shown: the mean since the start, without the first step's compilation.
    self._first = self._first or before
    mean = (step - self._first[0]) * self._tokens / (now - self._first[1])
    self._shown['speed'] = f'{mean:,.0f} tokens/s'
    found = {'throughput/tokens_per_second': speed}
    if self._peak:
      found['throughput/mfu'] = speed * self._flops / self._peak
    return found

  def flush(self) -> None:
    self._metrics.flush()

  def close(self) -> None:
    self._progress.close()
    self._metrics.close()
