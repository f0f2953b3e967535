"""Settings of a sweep, and what became of them (not a command)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from launch import cli
from launch.parts import given, ranking, trials
from lm import card
from lm.errors import UserError, of_code

_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}')


class Group(NamedTuple):
  """Settings that are alike but for the seed.

  values: {key: value} of the keys that are not the same in all groups.
  losses: {seed: final validation loss in nats}, inf of a run that diverged.
  measured: a name of the validation tokens.
  """

  values: dict[str, Any]
  losses: dict[int, float]
  measured: str = ''

  @property
  def mean(self) -> float:
    return float(np.mean([*self.losses.values()]))

  def cell(self) -> str:
    return ranking.mean(np.array([*self.losses.values()]))


def settings() -> dict[str, trials.Method]:
  """Returns the settings of the file of --config, by name.

  Its sweep() returns {name: {key: value}}; a key is a field of the config, or
  'optimizer', 'schedule' or 'size', a choice behind the colon. What stands
  behind the colon of --config is given to it as to get_config().

  Raises:
    UserError: no sweep(), or one that does not return this.
  """
  path, arg = given.file()
  if path.endswith('.json'):
    raise UserError(f"'{path}' is the config of one run, without a sweep().")
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
  settings = {name: _setting(path, name, x) for name, x in found.items()}
  own = {f'--config.{k}=' for m in settings.values() for k in m.fields}
  own |= {f'{k}=' for m in settings.values() for k in m.choices}
  words = [*given.flags_of({})[1:], *arg.split(',')]
  if twice := [x for x in words if x.startswith(tuple(own))]:
    raise UserError(
      f"'{twice[0]}' is given, and the sweep() of '{path}' gives it, too."
    )
  return settings


def configs(
  settings: Mapping[str, trials.Method],
) -> dict[str, ConfigDict]:
  """Returns the config of each setting.

  Raises:
    UserError: a field that does not exist, a value of another type, a setting
      that is the same as another one.
  """
  found, names = {}, {}
  for name, method in settings.items():
    try:
      found[name] = method.config()
    except (UserError, flags.Error) as e:
      raise UserError(f"The setting '{name}': {e}") from e
    other = names.setdefault(card.config_hash(card.as_dict(found[name])), name)
    if other != name:
      raise UserError(f"The settings '{other}' and '{name}' are the same run.")
  return found


def _setting(path, name, chosen):
  taken = name in ('sweep.json', 'sweep.png')
  if not isinstance(name, str) or taken or not _NAME.fullmatch(name):
    raise UserError(
      f"'{path}': sweep() names a setting {name!r:.60}; legal: at most 200 "
      'letters, digits and _.=+-, as it names a directory (sweep.json and '
      'sweep.png are files).'
    )
  if not isinstance(chosen, dict):
    raise UserError(
      f"'{path}': the setting '{name}' is no {{key: value}}, but "
      f'{chosen!r:.40}.'
    )
  chosen = {
    k: v.item() if isinstance(v, np.generic) else v for k, v in chosen.items()
  }
  choices = {k: v for k, v in chosen.items() if k in trials.CHOICES}
  for key, value in choices.items():
    if not re.fullmatch(r'\w+', str(value)):
      raise UserError(
        f"'{path}': the setting '{name}' has {key}={value!r}; legal: a name."
      )
  fields = {k: v for k, v in chosen.items() if k not in trials.CHOICES}
  return trials.Method(name, choices, fields)


def groups(
  found: Mapping[str, trials.Method],
  seeds: Sequence[int],
  losses: Sequence[float],
  measured: Sequence[str] = (),
) -> list[Group]:
  """Returns the settings without their seeds, in order.

  Of keys that all settings have and that change together the first stands for
  all.
  """
  rows = [{**m.choices, **m.fields} for m in found.values()]
  keys: dict[Any, str] = {}  # {where each value came first: key}
  for key in dict.fromkeys(k for r in rows for k in r if k != 'seed'):
    first: dict[str, int] = {}
    texts = [str(r.get(key)) for r in rows]
    pattern = tuple(first.setdefault(t, i) for i, t in enumerate(texts))
    if len(first) > 1:
      keys.setdefault(pattern if all(key in r for r in rows) else key, key)
  together: dict[str, Group] = {}
  on = measured or [''] * len(rows)
  for r, seed, loss, m in zip(rows, seeds, losses, on, strict=True):
    values = {k: r[k] for k in keys.values() if k in r}
    together.setdefault(str(values), Group(values, {}, m)).losses[seed] = loss
  return [*together.values()]


def table(found: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
  """Returns the header and the cells, a row per group; * marks the best."""
  keys = _keys(found)
  best = min(found, key=lambda g: g.mean)
  best = best if np.isfinite(best.mean) else None
  body = [
    [
      *(_text(g.values.get(k, '-')) for k in keys),
      str(len(g.losses)),
      g.cell() + (' *' if g is best else ''),
    ]
    for g in found
  ]
  return [*keys, 'seeds', 'loss'], body


def bests(
  found: Sequence[Group], key: str
) -> tuple[list[str], list[list[str]]]:
  """Returns the best value of `key` for all that is alike but for it.

  With where the best is an end of the values, and the difference from the
  first row, paired by seed, if they have the same seeds.
  """
  others = [k for k in _keys(found) if k != key]
  rows = [(points, min(points, key=lambda g: g.mean))
          for points in lines(found, key).values()]  # fmt: skip
  first = rows[0][1]
  body = []
  for points, best in rows:
    end = {0: ' or lower', len(points) - 1: ' or higher'}
    end = end.get(points.index(best), '') if len(points) > 1 else ''
    cells = [_text(best.values.get(k, '-')) for k in others]
    at = _text(best.values[key]) + end
    body.append([*cells, at, best.cell(), _minus(best, first)])
  minus = f'minus {_name(first, key) or "the first"}'
  return [*others, f'best {key}', 'loss', minus], body


def _minus(g, first):
  if g is first or {*g.losses} != {*first.losses}:
    return ''
  if g.measured != first.measured:
    return 'other tokens'
  baseline = [first.losses[seed] for seed in g.losses]
  return ranking.paired([*g.losses.values()], baseline)


def _keys(found):
  return list(dict.fromkeys(k for g in found for k in g.values))


def _text(value):
  return f'{value:.6g}' if isinstance(value, float) else str(value)


def axis(found: Sequence[Group]) -> str:
  """Returns the key that makes an axis: numbers, the most of them; or ''.

  Of equal numbers the learning rate, else the first.
  """
  counts = {}
  for key in _keys(found):
    values = [g.values.get(key) for g in found]
    if all(type(v) in (int, float) for v in values):
      counts[key] = len({*values})
  rank = lambda key: (counts[key], key == 'learning_rate')
  return max(counts, key=rank, default='')


def lines(found: Sequence[Group], key: str) -> dict[str, list[Group]]:
  """Returns {what else is the same: groups by their value of `key`}.

  The lines are in the order of the settings: the first is the baseline.
  """
  drawn: dict[str, list[Group]] = {}
  for g in found:
    name = _name(g, key) or 'no other field'  # legends leave '' out
    drawn.setdefault(name, []).append(g)
  value = lambda g: g.values[key]
  return {name: sorted(points, key=value) for name, points in drawn.items()}


def _name(g, key):
  """What a group is but for its `key`: 'adamw, optimizer.b1=0.5'."""
  return ', '.join(
    str(v) if k in trials.CHOICES else f'{k}={v}'
    for k, v in g.values.items()
    if k != key
  )
