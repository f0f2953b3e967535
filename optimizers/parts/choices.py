"""One sentence for a knob whose value is not a legal one."""

from collections.abc import Iterable


def check(knob: str, value: str, legal: Iterable[str]) -> None:
  """Raises ValueError with the legal values if `value` is none of them."""
  if value not in legal:
    names = ', '.join(f"'{name}'" for name in legal)
    raise ValueError(f"{knob}='{value}' does not exist; legal: {names}.")


def at_least(least: int, **knobs: int) -> None:
  """Raises ValueError for a knob below `least`."""
  for knob, value in knobs.items():
    if value < least:
      raise ValueError(f'{knob}={value} must be at least {least}.')
