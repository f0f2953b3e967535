"""Which checkpoints of a run stay."""

from collections.abc import Collection
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies


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
