"""How far a run is: a progress bar on a terminal, lines elsewhere."""

import sys
import time

from rich import console, progress, table


class Progress:
  """A progress bar on a terminal, a line every few seconds elsewhere."""

  def __init__(self, start: int, total: int, seconds: float = 10.0) -> None:
    self._bar = None
    self._total, self._seconds, self._last = total, seconds, 0.0
    self._first: tuple[int, float] | None = None
    if sys.stderr.isatty():
      terminal = console.Console(stderr=True)
      # On 80 columns the numbers matter more than a bar.
      width = max(terminal.width - 95, 0)
      self._bar = progress.Progress(
        progress.TextColumn('step'),
        progress.MofNCompleteColumn(),
        *([progress.BarColumn(min(width, 40))] if width else []),
        progress.TextColumn(
          '{task.fields[text]}', table_column=table.Column(ratio=1)
        ),
        progress.TimeElapsedColumn(),
        progress.TextColumn('eta'),
        progress.TimeRemainingColumn(),
        console=terminal,
      )
      self._task = self._bar.add_task(
        '', total=total, completed=start, text='compiling'
      )
      self._bar.start()

  def update(self, step: int, text: str) -> None:
    """`step` updates are done; `text` says how it goes."""
    if self._bar:
      self._bar.update(self._task, completed=step, text=text)
      return
    now = time.time()
    self._first = self._first or (step, now)  # compilation is behind us
    if now - self._last < self._seconds and step < self._total:
      return
    self._last = now
    done = step - self._first[0]
    if done:
      rest = (now - self._first[1]) / done * (self._total - step)
      text = f'{text}  eta {rest:.0f} s'
    print(f'step {step}/{self._total}  {text}', flush=True)

  def close(self) -> None:
    if self._bar:
      self._bar.stop()
