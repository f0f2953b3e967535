"""Logs of anybody's runs as series by tag: ours, CSV, JSON, TensorBoard.

  RUN/ or FILE.jsonl    one object per line, with a step
  FILE.csv              one column per tag, one of them the step
  FILE.json             lists beside a list of steps, or a list of records
  FOLDER/ or tfevents   TensorBoard scalars

`PARENT+STAGE` joins a stage that starts mid-run to what came before it; a
branch of ours finds its parent by itself. Imports no jax.
"""

import csv
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lm import csv_rows, log
from lm.errors import UserError, did_you_mean


class Series(NamedTuple):
  """One metric: step (n,) int64, increasing, and value (n,) float64."""

  step: np.ndarray
  value: np.ndarray


class Log(NamedTuple):
  """A run as its log shows it.

  config and meta are those of a run directory of ours, else empty.
  """

  name: str
  tags: dict[str, Series]
  config: Mapping[str, Any]
  meta: Mapping[str, Any]


# The first that a log has; names of ours, EPFL, nanoGPT, Hugging Face, Keras.
ALIASES = {
  'loss': (
    'eval/loss', 'val/loss', 'val_loss', 'eval_loss', 'valid/loss',
    'valid_loss', 'validation/loss', 'validation_loss', 'test/loss',
    'epoch_loss', 'loss/val', 'train/loss', 'train_loss', 'loss/train', 'loss',
  ),
  'lr': (
    'optim/lr', 'optim/learning_rate', 'train/lr', 'train_lr',
    'train/learning_rate', 'learning_rate', 'learning-rate', 'lr',
    'epoch_learning_rate', 'lr-adamw',
  ),
  'l1': ('grad/l1', 'grad_l1', 'grad_norm_l1', 'train/grad_norm_l1'),
  'nuclear': ('grad/nuclear', 'grad_norm_nuclear'),
  'l2': (
    'grad/l2', 'grad_norm', 'train/grad_norm', 'gradient_norm', 'grad_l2',
    'grad/norm', 'grad_norm_l2', 'gradient-norm', 'global_grad_norm',
    'optim/total_grad_norm',
  ),
}  # fmt: skip
_STEPS = (
  'step', 'steps', 'iter', 'iters', 'iteration', 'iterations', 'global_step',
  '_step', 'trainer/global_step', 'num_updates', 'epoch',
)  # fmt: skip


def read(text: str) -> Log:
  """Reads 'PATH' or 'PARENT+STAGE'.

  Raises:
    UserError: nothing there, not readable, or no numbers in it.
  """
  parts = [text] if pathlib.Path(text).exists() else text.split('+')
  whole = _read_one(parts[0])
  for part in parts[1:]:
    stage = _read_one(part)
    if stage.config.get('branch'):
      raise UserError(
        f"'{text}': the branch {part} finds its parent itself; legal: {part}."
      )
    whole = join(whole, stage)
  return whole


def find(found: Log, kind: str, tag: str = '') -> Series:
  """Returns the series of an alias ('loss', 'lr', 'l1', ...), or of `tag`."""
  return found.tags[tag_of(found, kind, tag)]


def tag_of(found: Log, kind: str, tag: str = '', flag: str = '--tag') -> str:
  """Returns the tag that `find` takes; `flag` is where the user names it.

  Raises:
    UserError: the log has no such tag; the sentence lists those it has.
  """
  if tag:
    if tag not in found.tags:
      raise UserError(
        f"{flag}='{tag}': {found.name} has no such tag.{_legal(found, tag)}"
      )
    return tag
  lower = {t.lower(): t for t in found.tags}
  for alias in ALIASES[kind]:
    ends = [t for t in lower if t == alias or t.endswith(f'/{alias}')]
    if ends:
      return lower[min(ends, key=len)]
  raise UserError(
    f"{found.name} has no tag for '{kind}' (known names: "
    f'{", ".join(ALIASES[kind][:4])}, ...); name it by {flag}.'
    f'{_legal(found, "")}'
  )


def join(parent: Log, stage: Log) -> Log:
  """Puts the points of `parent` before the first of `stage` in front of it."""
  first = min(int(s.step[0]) for s in stage.tags.values())
  last = max(int(s.step[-1]) for s in parent.tags.values())
  if not 0 < first <= last + 1 + _gap(stage):
    raise UserError(
      f'{stage.name} starts at step {first}, which does not continue '
      f'{parent.name}, whose last step is {last}.'
    )
  tags = dict(stage.tags)
  for tag, before in parent.tags.items():
    kept = Series(*(x[before.step < first] for x in before))
    if tag in stage.tags:
      pairs = zip(kept, stage.tags[tag], strict=True)
      tags[tag] = Series(*(np.concatenate(pair) for pair in pairs))
    elif kept.step.size:
      tags[tag] = kept
  return stage._replace(tags=tags)


def learning_rates(
  found: Log, tag: str = '', flag: str = '--tag'
) -> np.ndarray:
  """Returns the rate of each update, float64 (num_steps,), interpolated."""
  series = found.tags[tag_of(found, 'lr', tag, flag)]
  # Ours say how long they are; a last rate of 0 follows the last update.
  logged = int(series.step[-1]) + (0 if series.value[-1] == 0 else 1)
  steps = np.arange(found.config['num_steps'] if found.config else logged)
  good = np.isfinite(series.value)
  if not good.any() or not steps.size:
    raise UserError(f'{found.name}: no learning rate of an update is finite.')
  return np.interp(steps, series.step[good], series.value[good])


def _gap(stage: Log) -> int:
  """Steps between two lines of a log."""
  steps = max((s.step for s in stage.tags.values()), key=len)
  return int(np.diff(steps).max(initial=0))


def _legal(found, tag):
  if tag:
    return did_you_mean(tag, found.tags)
  return f' Its tags: {", ".join(sorted(found.tags)) or "none"}.'


def _read_one(text: str) -> Log:
  path = pathlib.Path(text)
  if not path.exists():
    raise UserError(f"'{text}' does not exist; legal: a run or a log file.")
  runs = sorted(p.parent.name for p in path.glob('*/metrics.jsonl'))
  if runs and not (path / 'metrics.jsonl').exists():
    raise UserError(f"'{text}' is no run, but holds {', '.join(runs)}.")
  config, meta = {}, {}
  if (path / 'metrics.jsonl').is_file():  # others have a config.json, too
    if (path / 'config.json').is_file():
      config = log.read_config(path)
    if (path / 'meta.json').is_file():
      meta = log.read_meta(path)
  try:
    tags = _tags(path)
  except (OSError, ValueError, TypeError, KeyError, csv.Error) as e:
    if isinstance(e, UserError):
      raise
    raise UserError(f"'{text}' is not a readable log: {e}") from e
  if not tags:
    raise UserError(f"'{text}' holds no numbers by step.")
  found = Log(text, tags, config, meta)
  if config.get('branch'):
    parent, *at = config['branch'].rsplit('@', 1)
    if at == ['0']:  # nothing came before
      return found
    if not pathlib.Path(parent).exists():
      raise UserError(f"{text} is a branch of '{parent}', which is gone.")
    found = join(_read_one(parent), found)
  return found


def _tags(path: pathlib.Path) -> dict[str, Series]:
  if path.is_dir() and (path / 'metrics.jsonl').is_file():
    path = path / 'metrics.jsonl'
  if path.is_dir() or 'tfevents' in path.name:
    return _events(path)
  if path.suffix == '.jsonl':
    return _records(log.parse_lines(path))
  if path.suffix == '.csv':
    return _records(csv_rows.read(path))
  if path.suffix == '.json':
    return _json(json.loads(path.read_bytes()), '')
  raise UserError(
    f"'{path}' is not a log; legal: a run directory, .jsonl, .csv, .json, or "
    'TensorBoard events.'
  )


def _records(records: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
  """Series of rows, each with a step; what is no number is left out."""
  points: dict[str, list[tuple[float, float]]] = {}
  for row in records:
    keys = {str(k).lower(): k for k in row}
    key = next((keys[s] for s in _STEPS if s in keys), None)
    if key is None:
      one = len(row) == 1 and any(x in str(*row) for x in ';\t|')
      raise ValueError(
        f'no column is a step ({", ".join(_STEPS[:4])}, ...); there are: '
        f'{", ".join(map(str, row))}.'
        + ' Columns are separated by commas.'
        * one
      )
    step = csv_rows.number(row[key])
    for tag, x in row.items():
      value = csv_rows.number(x)
      if tag != key and step is not None and value is not None:
        points.setdefault(str(tag), []).append((step, value))
  return {tag: _series(*zip(*p, strict=True)) for tag, p in points.items()}


def _series(steps, values) -> Series:
  """Sorts by step; the last of equal steps counts, as after a restart."""
  step = np.asarray(steps, np.float64)
  for x in step[~(np.abs(step) < 2**53) | (step % 1 != 0)]:
    raise ValueError(f'step {x:g} is no whole number below 2^53.')
  step = step.astype(np.int64)
  found, last = np.unique(step[::-1], return_index=True)
  return Series(found, np.asarray(values, np.float64)[::-1][last])


def _json(node: Any, prefix: str) -> dict[str, Series]:
  """Lists beside a list of steps, and lists of records, at any depth."""
  is_rows = lambda x: isinstance(x, list) and x and isinstance(x[0], dict)
  if is_rows(node):
    return _records(node)
  if not isinstance(node, dict):
    return {}
  lists = {k: _records(x) for k, x in node.items() if is_rows(x)}
  names = [name for x in lists.values() for name in x]
  whole = prefix or len(set(names)) < len(names)
  found = {}
  for name, x in lists.items():
    found |= {f'{prefix}{name}/{k}' if whole else k: v for k, v in x.items()}
  key = next((k for k in _STEPS if k in node), None)
  steps = node[key] if key and isinstance(node[key], list) else None
  others = {k: x for k, x in node.items() if k not in (key, *lists)}
  for name, x in others.items():
    tag = f'{prefix}{name}'
    if _is_numbers(x):
      at = range(len(x)) if steps is None else steps
      if len(at) == len(x):
        found[tag] = _series(at, [math.nan if v is None else v for v in x])
    else:
      found.update(_json(x, f'{tag}/'))
  return found


def _is_numbers(x: Any) -> bool:
  number = lambda v: isinstance(v, int | float | None)
  return isinstance(x, list) and x != [] and all(map(number, x))


def _events(path: pathlib.Path) -> dict[str, Series]:
  """Scalars of TensorBoard; those of several folders get the folder's name."""
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  files = [path] if path.is_file() else sorted(path.rglob('*tfevents*'))
  folders = [path] if path.is_file() else sorted({p.parent for p in files})
  found = {}
  for folder in folders:
    prefix = '' if len(folders) == 1 else f'{folder.relative_to(path)}/'
    everything = {'scalars': 0, 'tensors': 0}
    events = event_accumulator.EventAccumulator(str(folder), everything)
    events.Reload()
    for tag in events.Tags()['scalars']:
      points = [(e.step, e.value) for e in events.Scalars(tag)]
      found[prefix + tag] = _series(*zip(*points, strict=True))
    for tag in events.Tags()['tensors']:
      values = [
        (e.step, tensor_util.make_ndarray(e.tensor_proto))
        for e in events.Tensors(tag)
      ]
      if all(v.size == 1 and v.dtype.kind in 'fiu' for _, v in values):
        numbers = [(s, float(v.item())) for s, v in values]
        found[prefix + tag] = _series(*zip(*numbers, strict=True))
  return found
