"""Reads the complete config.json of a run: the run again, word for word.

python -m launch.train --config=runs/a/config.json --workdir=runs/again

Behind a colon stands what it shall have instead, with default knobs:
--config=runs/a/config.json:schedule=table (or optimizer=...).
"""

import json
import pathlib

from ml_collections import ConfigDict

from configs import base
from lm import spec
from lm.errors import UserError


def get_config(arg: str) -> ConfigDict:
  path, _, chosen = arg.partition('.json:')
  path = f'{path}.json' if chosen else arg
  if not pathlib.Path(path).is_file():
    raise UserError(f"'{path}' does not exist.")
  try:
    text = pathlib.Path(path).read_text()
    stored = json.loads(text, object_pairs_hook=_object)
    names = {k: stored[k]['name'] for k in ('optimizer', 'schedule')}
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"'{path}' is not the config.json of a run: {e}.") from e
  choice = spec.parse(chosen, **names)
  c = base.get_config(**choice)
  for part, name in choice.items():
    if name != names[part]:
      del stored[part]
  try:
    c.update(ConfigDict(stored))
  except (KeyError, TypeError, AttributeError, ValueError) as e:
    raise UserError(
      f"'{path}' does not fit this version of the code: {e}"
    ) from e
  return c


def _object(pairs):
  """A field that is null would fit every type."""
  for key, value in pairs:
    if value is None:
      raise ValueError(f'{key} is null')
  return dict(pairs)
