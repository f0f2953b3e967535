"""Several processes that write one merge together, or one alone."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar('T')


class Group(NamedTuple):
  """The processes of a merge; all see the same storage.

  index, count: of this process, and how many there are.
  share: returns the text of every process; waits for all of them.
  """

  index: int = 0
  count: int = 1
  share: Callable[[str], list[str]] = lambda text: [text]

  def together(self, action: Callable[[], T]) -> T:
    """Returns `action()`; what it raises on one is raised on all.

    Raises:
      ValueError: for any ValueError or OSError of a process; it is the
        original one where it happened.
    """
    result = mistake = None
    try:
      result = action()
    except (ValueError, OSError) as e:
      mistake = e
    except BaseException as e:
      self.share(f'a process of the merge stopped: {e!r}')
      raise
    found = [text for text in self.share(str(mistake or '')) if text]
    if found:
      raise mistake or ValueError(found[0])
    return result

  def first(self, action: Callable[[], str]) -> str:
    """Returns what `action` gives on process 0, on all."""
    mine = ''

    def on_first():
      nonlocal mine
      mine = action() if self.index == 0 else ''

    self.together(on_first)
    return self.share(mine)[0]
