"""Where a run keeps its parameters: RUN, RUN@STEP and RUN/merged/NAME."""

import pathlib
from typing import NamedTuple

from lm.errors import UserError


class Ref(NamedTuple):
  """A place in a run: `item` is the directory that holds its parameters."""

  run: pathlib.Path
  step: int | None
  item: pathlib.Path

  @property
  def at(self) -> int | str:
    """What Run.params takes: a step, or the name of a merge."""
    if self.step is not None:
      return self.step
    return self.item.relative_to(self.run / 'merged').parts[0]


def locate(text: str) -> Ref:
  """Finds 'RUN@STEP', 'RUN' (its newest checkpoint) or 'RUN/merged/NAME'."""
  path, _, at = text.rpartition('@') if '@' in text else (text, '', '')
  whole = (pathlib.Path(text) / 'checkpoints').is_dir()  # '@' in its name
  if whole or not at.isdecimal():
    path, at = text, ''
  run = pathlib.Path(path)
  if (run / 'merge.json').is_file() or (
    run.parent.name == 'merged' and not (run / 'config.json').is_file()
  ):
    if (run / '_METADATA').is_file() and not at:  # a merge of bare items
      return Ref(run.parents[1], None, run)
    if at or not (run / 'params').is_dir():
      found = sorted(p.parent.name for p in run.parent.glob('*/params'))
      legal = ', '.join(found) or 'none'
      raise UserError(f"'{text}' is not a merge; merges of this run: {legal}.")
    return Ref(run.parents[1], None, run / 'params')
  saved = steps(run)
  if not run.exists():
    raise UserError(
      f"'{path}' does not exist; legal: RUN, RUN@STEP or RUN/merged/NAME."
    )
  if not saved:
    raise UserError(f"'{path}' has no checkpoints; legal: a run directory.")
  step = int(at) if at else saved[-1]
  if step not in saved:
    raise UserError(
      f"'{text}' does not exist; '{path}' has the steps {_short(saved)}."
    )
  return Ref(run, step, item(run, step, 'params'))


def in_run(text: str) -> Ref:
  """Does so where the run is needed, too, for its config and its data."""
  ref = locate(text)
  if ref.step is None and not (ref.run / 'config.json').is_file():
    raise UserError(
      f"'{text}' is a merge outside of a run, whose config and data are needed"
      '; with --out=RUN/merged/NAME a merge is one of RUN.'
    )
  return ref


def steps(run: str | pathlib.Path) -> list[int]:
  """Returns the steps of the finished checkpoints of a run, ascending."""
  found = pathlib.Path(run, 'checkpoints').glob('*')
  return sorted(
    int(p.name) for p in found if p.name.isdecimal() and (p / 'params').is_dir()
  )


def item(run: str | pathlib.Path, step: int, name: str) -> pathlib.Path:
  return pathlib.Path(run, 'checkpoints', str(step), name)


def _short(saved: list[int]) -> str:
  text = [str(s) for s in saved]
  return ', '.join(text if len(text) < 12 else [*text[:5], '...', *text[-5:]])
