"""Merges whose sources are compared with what was saved (not a command)."""

import pathlib
from collections.abc import Collection
from typing import Any

from launch.parts import merged_state
from lm import checkpoint, log, verify
from merging.engine.group import Group
from merging.engine.plan import Sources


def hooks(
  sources: Sources,
  together: Group,
  state: Sources = (),
  *,
  unknown: Collection[pathlib.Path] = (),
  keep: bool = True,
) -> dict[str, Any]:
  """Returns what `artifact.write_at` needs to compare fingerprints.

  Args:
    sources: items of checkpoints, or merges, of this project.
    together: the processes that merge.
    state: as `sources`, of optimizer states.
    unknown: sources without fingerprints, which are not compared.
    keep: lay those of the result beside it.

  The hooks raise Damaged, before there is a result, for a source that is not
  what was saved.
  """
  first = checkpoint.abstract_item(
    next(path for path, _ in sources if path not in unknown)
  )
  shapes = verify.shapes(first) | merged_state.shapes(state)
  verifier = verify.Verifier(shapes, unknown)
  part = lambda folder, i: folder / f'.part-{i}.json'

  def before_commit(folder):
    for i in range(1, together.count):
      verifier.load(part(folder, i))
    for i in range(together.count):
      part(folder, i).unlink()
    verifier.check()
    if keep:
      log.write_json(folder / 'fingerprints.json', verifier.result())

  return {
    'observe': verifier,
    'after_part': lambda folder: verifier.save(part(folder, together.index)),
    'before_commit': before_commit,
  }


def of_inputs(sources: Sources, together: Group, keep: bool) -> dict[str, Any]:
  """Returns `hooks` for sources some of which may be of other programs."""
  unknown = [path for path, _ in sources if checkpoint.marks(path) is None]
  if len(unknown) == len(sources):
    return {}
  return hooks(sources, together, unknown=unknown, keep=keep)
