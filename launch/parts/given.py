"""The config that was given on the command line, and others like it."""

import re
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import cli
from lm.errors import UserError


def flags_of(changes: Mapping[str, Any]) -> list[str]:
  """Returns --config and its fields as flags, as given but for `changes`."""
  flag = flags.FLAGS['config']
  file = config_flags.get_config_filename(flag)
  file = file.removeprefix(f'{cli.ROOT / "configs" / "resolved.py"}:')
  fields = {**config_flags.get_override_values(flag), **changes}
  return [f'--config={file}', *(f'--config.{k}={v}' for k, v in fields.items())]


def file() -> tuple[str, str]:
  """Returns the file of --config and what stands behind its colon."""
  text = flags_of({})[0].removeprefix('--config=')
  path, arg = re.fullmatch(r'(.*?\.(?:py|json))(?::(.*))?', text).groups()
  return path, arg or ''


def changed(
  choices: Mapping[str, str], fields: Mapping[str, Any]
) -> ConfigDict:
  """Returns --config again, with other choices behind the colon and fields.

  Args:
    choices: {'optimizer': 'muon'}; the others stay as given.
    fields: {'optimizer.b1': 0.9}, as values or as text.

  Raises:
    UserError: a choice or field that does not exist.
    flags.Error: a value of another type.
  """
  path, arg = file()
  _, *overrides = flags_of(fields)
  if choices:
    if not all('=' in part for part in filter(None, arg.split(','))):
      raise UserError(
        f"'{arg}' behind the colon of --config is no KEY=VALUE, so that "
        f'{[*choices][0]}={[*choices.values()][0]} cannot be joined to it.'
      )
    given = dict(x.split('=', 1) for x in filter(None, arg.split(',')))
    arg = ','.join(f'{k}={v}' for k, v in {**given, **choices}.items())
  text = cli.resolved(f'{path}:{arg}' if arg else path)
  argv = ['', f'--config={text}', *overrides]
  cli.check_overrides(argv)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config', flag_values=values, lock_config=True, sys_argv=argv
  )
  values(argv)
  return values.config
