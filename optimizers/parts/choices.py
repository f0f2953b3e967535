"""One sentence for a knob whose value is not one of the legal ones."""

from collections.abc import Iterable


def check(knob: str, value: str, legal: Iterable[str]) -> None:
  """Raises ValueError with the legal values if `value` is none of them."""
  if value not in legal:
    names = ', '.join(f"'{name}'" for name in legal)
    raise ValueError(f"{knob}='{value}' does not exist; legal: {names}.")
