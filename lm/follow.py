"""Floats of the optimizer that follow a schedule, as the learning rate does.

`config.follow = 'weight_decay=0,b1=0.95'`: each named float has its configured
value where the run's multiplier is 1, and the value behind = where it is 0;
'b1=0.95:onecycle' follows another schedule (with its default knobs) and
'b1=0.95:FILE' a table. With schedule=onecycle, b1=0.85 and follow='b1=0.95' is
the inverse momentum cycle of 1708.07120.
"""

from typing import Any

from ml_collections import ConfigDict

from lm import spec
from lm.errors import UserError, did_you_mean

# The least and the largest legal value of the optimizers' floats.
_RANGES = {
  **dict.fromkeys(
    ('learning_rate', 'weight_decay', 'eps', 'epsilon'), (0.0, 1e30)
  ),
  **dict.fromkeys(('d0', 'clipping_threshold'), (1e-30, 1e30)),
  **dict.fromkeys(
    ('b1', 'b2', 'b3', 'momentum', 'neuron_b2', 'nu_b2', 'shampoo_b2'),
    (0.0, 1.0),
  ),
}


def legal(field: str) -> tuple[float, float]:
  """Returns the range of the rate or of a float; both ends are legal."""
  return _RANGES.get(field, (-1e30, 1e30))


def parse(config: ConfigDict) -> dict[str, tuple[float, ConfigDict]]:
  """Returns {float of the optimizer: (value at multiplier 0, schedule)}."""
  known, found = spec.floats('optimizers', config.optimizer), {}
  for part in filter(None, config.follow.split(',')):
    field, _, rest = part.partition('=')
    to, _, schedule = rest.partition(':')
    if field not in known:
      raise UserError(
        f"follow: optimizers/{config.optimizer.name}.py has no float '{field}'."
        + did_you_mean(field, known)
      )
    if field in found:
      raise UserError(f"follow='{config.follow}' names '{field}' twice.")
    try:
      found[field] = (float(to), _schedule(config, schedule))
    except ValueError as e:
      if isinstance(e, UserError):
        raise
      raise UserError(
        f"follow='{part}': '{to}' is not a number; legal: {field}=NUMBER or "
        f'{field}=NUMBER:SCHEDULE.'
      ) from e
    least, most = legal(field)
    if not least <= found[field][0] <= most:
      raise UserError(f"follow='{part}': {to} must be from {least} to {most}.")
  if found:  # the optimizer may refuse them
    ends = {field: value for field, (value, _) in found.items()}
    rate = config.learning_rate
    spec.build('optimizers', config.optimizer, rate, floats=ends)
  return found


def floats(
  config: ConfigDict, step: Any, traced: dict[str, Any]
) -> dict[str, Any]:
  """Returns the floats of `config.follow` for the update after `step`."""
  found = {}
  for field, (to, schedule) in parse(config).items():
    own = traced.get('schedule') if schedule is config.schedule else None
    build = spec.build('schedules', schedule, config.num_steps, floats=own)
    value = traced['optimizer'][field]
    found[field] = to + (value - to) * build(step)
  return found


def _schedule(config, text):
  if not text:
    return config.schedule
  if '.' in text:
    return spec.spec('schedules', 'table', path=text)
  return spec.spec('schedules', text)
