"""Settings of a sweep, and what became of them (not a command)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch import cli
from launch.parts import ranking, trials
from lm.errors import UserError, of_code

_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}')


class Group(NamedTuple):
  """Settings that are alike but for the seed.

  values: {key: value} of the keys that are not the same in all groups.
  losses: final validation losses in nats, inf of a run that diverged.
  """

  values: dict[str, Any]
  losses: np.ndarray


def settings() -> dict[str, trials.Method]:
  """Returns the settings of the file of --config, by name.

  Its sweep() returns {name: {key: value}}; a key is a field of the config, or
  'optimizer', 'schedule' or 'size', a choice behind the colon. What stands
  behind the colon of --config is given to it as to get_config().

  Raises:
    UserError: no sweep(), or one that does not return this.
  """
  path, arg = cli.given_file()
  module = cli.load_module(path)
  if not hasattr(module, 'sweep'):
    raise UserError(f"'{path}' has no sweep(); for example configs/sweep.py.")
  with of_code(path):
    found = module.sweep(arg) if arg else module.sweep()
  if not isinstance(found, dict) or not found:
    raise UserError(
      f"'{path}': sweep() returns no {{name: {{key: value}}}}, but "
      f'{found!r:.40}.'
    )
  return {name: _setting(path, name, given) for name, given in found.items()}


def _setting(path, name, given):
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise UserError(
      f"'{path}': sweep() names a setting {name!r:.60}; legal: at most 200 "
      'letters, digits and _.=+-, as it names a directory.'
    )
  if not isinstance(given, dict):
    raise UserError(
      f"'{path}': the setting '{name}' is no {{key: value}}, but {given!r:.40}."
    )
  choices = {k: v for k, v in given.items() if k in trials.CHOICES}
  fields = {k: v for k, v in given.items() if k not in trials.CHOICES}
  return trials.Method(name, choices, fields)


def groups(
  found: Mapping[str, trials.Method], losses: Sequence[float]
) -> list[Group]:
  """Returns the settings without their seeds, in order."""
  rows = [{**m.choices, **m.fields} for m in found.values()]
  keys = [k for k in dict.fromkeys(k for r in rows for k in r) if k != 'seed']
  keys = [k for k in keys if len({str(r.get(k)) for r in rows}) > 1]
  together: dict[str, tuple[dict[str, Any], list[float]]] = {}
  for r, loss in zip(rows, losses, strict=True):
    values = {k: r[k] for k in keys if k in r}
    together.setdefault(str(values), (values, []))[1].append(loss)
  return [Group(v, np.array(found)) for v, found in together.values()]


def table(found: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
  """Returns the header and the cells, a row per group; * marks the best."""
  keys = list(dict.fromkeys(k for g in found for k in g.values))
  best = min(found, key=lambda g: g.losses.mean())
  body = [
    [
      *(_text(g.values.get(k, '-')) for k in keys),
      str(g.losses.size),
      ranking.mean(g.losses) + (' *' if g is best else ''),
    ]
    for g in found
  ]
  return [*keys, 'seeds', 'loss'], body


def _text(value):
  return f'{value:.6g}' if isinstance(value, float) else str(value)


def axis(found: Sequence[Group]) -> str:
  """Returns the key that makes an axis: numbers, the most of them; or ''."""
  counts = {}
  for key in dict.fromkeys(k for g in found for k in g.values):
    values = {g.values.get(key) for g in found}
    if all(type(v) in (int, float) for v in values):
      counts[key] = len(values)
  return max(counts, key=counts.get, default='')


def lines(
  found: Sequence[Group], key: str
) -> dict[str, list[tuple[float, np.ndarray]]]:
  """Returns {what else is the same: [(value of the key, losses)]}, sorted."""
  drawn: dict[str, list[tuple[float, np.ndarray]]] = {}
  for g in found:
    rest = ', '.join(_text(v) for k, v in g.values.items() if k != key)
    drawn.setdefault(rest, []).append((g.values[key], g.losses))
  return {k: sorted(v, key=lambda x: x[0]) for k, v in drawn.items()}
