"""Which checkpoints of a run stay, and whether some are gone."""

import pathlib
from collections.abc import Collection
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from lm import log
from lm.errors import UserError


def steps_kept(steps: Collection[int], knobs: Any) -> set[int]:
  """Returns which checkpoints of a run stay, by its config.checkpoint.

  Those of a run that was stopped between two saves push no others out.
  """
  n, every = knobs.keep_latest, knobs.every_steps
  if not n or not steps:
    return {*steps}
  regular = sorted(s for s in steps if s % every == 0)[-n:]
  periodic = knobs.keep_every_steps
  longer = (s for s in steps if periodic and s % periodic == 0)
  return {max(steps), *regular, *longer}


class Policy(policies.PreservationPolicy):
  """`steps_kept` for Orbax."""

  def __init__(self, knobs):
    self._knobs = knobs

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [c.step for c in checkpoints]
    stay = steps_kept(steps, self._knobs)
    return [s in stay for s in steps]


def check_lost(run: pathlib.Path, every: int) -> None:
  """Refuses to begin anew where metrics tell of checkpoints that are gone.

  The second save waits for the first: a killed start has fewer lines.

  Raises:
    UserError: with the last step of the metrics.
  """
  kept = (p.name.isdecimal() for p in run.glob('checkpoints/*'))
  if any(kept) or (run / 'damaged').exists():
    return  # lm/checkpoint.py says what is the matter with those
  lines = log.read_lines(run / 'metrics.jsonl')
  if lines and lines[-1]['step'] - lines[0]['step'] > every:
    raise UserError(
      f'{run} has metrics up to step {lines[-1]["step"]} and no checkpoint: '
      'put its checkpoints back, or use a new --workdir.'
    )
