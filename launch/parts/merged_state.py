"""The optimizer states of merged checkpoints, averaged (not a command).

An experiment: first and second moments are sums of gradients and stay what
they are; a state that is no sum, as the bases of SOAP, does not.
"""

import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lm import checkpoint, verify
from lm.errors import UserError
from lm.run import Run
from merging.engine import group, sources, stream
from merging.engine import plan as engine_plan

if TYPE_CHECKING:
  from launch.parts import emulation

_TREE = 'opt_state'  # in the item 'train'


def add(plan: 'emulation.Plan') -> 'emulation.Plan':
  """Adds the optimizer states of the same checkpoints to a plan.

  Raises:
    UserError: a negative coefficient, a checkpoint without a state.
    ValueError: states of different trees.
  """
  found = []
  for path, c in plan.sources:
    if c < 0:
      raise UserError(
        f'--state refuses the coefficient {c:.6g} of {path.parent}: second '
        'moments could become negative.'
      )
    found.append((path.with_name('train'), c))
    if not found[-1][0].is_dir():
      raise UserError(f'{path.parent} has no optimizer state for --state.')
  engine_plan.plan(found, engine_plan.Options(tree=_TREE))
  return plan._replace(about={**plan.about, 'state': True}, state=found)


def provenance(run: Run, state: sources.Sources) -> dict[str, Any]:
  """Returns what merge.json says of the state."""
  items = [engine_plan.open_item(path, _TREE) for path, _ in state]
  return {
    'optimizer': run.config.optimizer.name,
    'item': 'train',
    'tree': _TREE,
    'integers': f'of step {max(int(p.parent.name) for p, _ in state)}',
    'sha256': [item.digest() for item in items],
  }


def shapes(state: sources.Sources) -> dict[str, tuple[int, ...]]:
  """Returns {leaf: shape} of the states; empty without any."""
  if not state:
    return {}
  return verify.shapes(checkpoint.abstract_item(state[0][0]))


def write_part(
  state: sources.Sources,
  folder: pathlib.Path,
  together: group.Group,
  **options: Any,
) -> Callable[[], None]:
  """Writes this process's part of <folder>/state; returns what completes it."""
  out = folder / 'state'
  out.mkdir(exist_ok=True)
  options |= {'tree': _TREE, 'integers': True, 'dtype': None}  # as stored
  return stream.write_part(
    state, out, (together.index, together.count), **options
  )
