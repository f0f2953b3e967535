"""Schedules by name, knob and number of steps, as curves (not a command)."""

import ast
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from launch import cli
from lm import spec
from lm.errors import UserError

_COMMA = r',(?![^(]*\))'  # none inside parentheses


class Curve(NamedTuple):
  """A schedule: `value` holds a multiplier for each step."""

  name: str
  value: np.ndarray


def split(text: str) -> list[str]:
  """Splits 'wsd:decay=0.2,shape=cosine,linear' into two schedules.

  A part without a name is one more knob of the schedule before it; commas
  inside parentheses belong to a tuple.
  """
  found: list[str] = []
  for part in filter(None, re.split(_COMMA, text)):
    if found and '=' in part.partition(':')[0]:
      found[-1] += f',{part}'
    else:
      found.append(part)
  return found


def parse(text: str, package: str = 'schedules') -> ConfigDict:
  """Parses 'wsd:decay=0.2,shape=cosine' into the config of a component.

  Raises:
    UserError: an unknown component or knob, one given twice, or a value of
      another type.
  """
  name, _, arg = text.partition(':')
  config = spec.spec(package, name)
  knobs = {}
  for part in filter(None, re.split(_COMMA, arg)):
    key, equals, value = part.partition('=')
    if not equals:
      raise UserError(f"'{text}': '{part}' is not KEY=VALUE.")
    if key in knobs:
      raise UserError(f"'{text}' gives {key} twice.")
    knobs[key] = _typed(text, key, value, config.get(key, ''))
  return spec.spec(package, name, **knobs)


def _typed(text: str, key: str, value: str, default: Any) -> Any:
  if isinstance(default, str):
    return value
  parser, legal = cli.PARSERS.get(type(default), (None, 'a tuple, as (1,2)'))
  try:
    return parser.parse(value) if parser else tuple(ast.literal_eval(value))
  except (ValueError, SyntaxError, TypeError) as e:
    raise UserError(f"'{text}': {key}='{value}' must be {legal}.") from e


def as_flags(text: str, file: Mapping[str, Any] | None = None) -> list[str]:
  """Returns what stands behind --config=FILE, and the flags for the knobs.

  `file` is the schedule's config in FILE, whose knobs stay if the name does.
  """
  config = parse(text)
  default = spec.spec('schedules', config.name)
  if file and file['name'] == config.name:
    default = {**default, **file}
  flags = [
    f'--config.schedule.{k}={v}' for k, v in config.items() if v != default[k]
  ]
  return [f':schedule={config.name}', *flags]


def curve(text: str, num_steps: int) -> Curve:
  """Returns the multipliers of a schedule, float64 (num_steps,)."""
  if num_steps < 2:
    raise UserError(f'--num_steps={num_steps} must be at least 2.')
  return Curve(text, values(parse(text), num_steps))


def values(config: Mapping[str, Any], num_steps: int) -> np.ndarray:
  """Returns the multipliers of a schedule's config, float64 (num_steps,)."""
  from lm import step

  with cli.user_errors():
    step.check_schedule(config, num_steps)
    schedule = spec.build('schedules', config, num_steps)
    return step.values(schedule, num_steps, config['name'])
