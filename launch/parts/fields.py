"""A config has the fields of configs/base.py (not a command)."""

import importlib
from typing import Any

from ml_collections import ConfigDict

from lm.errors import UserError

_CHOICES = ('optimizer', 'schedule')


def check(config: Any, path: str) -> None:
  """Refuses what would train and then not be read again, as None for a text.

  Raises:
    UserError: `config`, of the file `path`, is no config, or a field is
      missing or of another type.
  """
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"'{path}': get_config() returns no ConfigDict, but {config!r:.40}."
    )
  names = {}
  for part in _CHOICES:
    section = config.get(part)
    name = section.get('name') if isinstance(section, ConfigDict) else None
    if not isinstance(name, str):
      raise _missing(path, f'{part}.name')
    names[part] = name
  choice = ','.join(f'{k}={v}' for k, v in names.items())
  base = importlib.import_module('configs.base').get_config(choice)
  _compare(config, base, '', path)


def _compare(config, base, place, path):
  for key in base:
    field, want = place + key, base[key]
    if key not in config and place.rstrip('.') in _CHOICES:
      continue  # the default of the method
    if key not in config:
      raise _missing(path, field)
    value = config[key]
    legal = (float, int) if isinstance(want, float) else type(want)
    switch = isinstance(value, bool) and not isinstance(want, bool)
    if switch or not isinstance(value, legal):
      raise UserError(
        f"'{path}': {field}={value!r:.40} must be of type "
        f'{type(want).__name__}, as in configs/base.py.'
      )
    if isinstance(want, ConfigDict):
      _compare(value, want, f'{field}.', path)


def _missing(path, field):
  return UserError(
    f"'{path}': the config has no field {field}; begin with "
    'configs.base.get_config().'
  )
