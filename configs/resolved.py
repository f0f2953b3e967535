"""Reads the complete config.json of a run: the run again, word for word.

python -m launch.train --config=runs/a/config.json --workdir=runs/again
"""

import json
import pathlib

from ml_collections import ConfigDict

from configs import base
from lm.errors import UserError


def get_config(path: str) -> ConfigDict:
  if not pathlib.Path(path).is_file():
    raise UserError(f"'{path}' does not exist.")
  try:
    stored = json.loads(pathlib.Path(path).read_text())
    optimizer, schedule = stored['optimizer'], stored['schedule']
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"'{path}' is not the config.json of a run.") from e
  c = base.get_config(
    f'optimizer={optimizer["name"]},schedule={schedule["name"]}'
  )
  try:
    c.update(ConfigDict(stored))
  except (KeyError, TypeError) as e:
    raise UserError(
      f"'{path}' does not fit this version of the code: {e.args[0]}"
    ) from e
  return c
