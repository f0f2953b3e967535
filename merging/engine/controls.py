"""Controls that falsify a merge: its coefficients in a wrong order."""

from collections.abc import Sequence

import numpy as np


def control(
  coefficients: Sequence[float], name: str, seed: int = 0
) -> np.ndarray:
  """Returns the same coefficients in a wrong order, to falsify a method.

  If the order matters, 'reverse' (oldest for newest) and 'scramble' (random)
  must give a worse model; if they do not, the shape explains nothing.

  Raises:
    ValueError: an unknown name; coefficients that are the same in this order.
  """
  c = np.asarray(coefficients, np.float64)
  if name not in ('reverse', 'scramble'):
    raise ValueError(f"control='{name}' is unknown; legal: reverse, scramble.")
  same = lambda a, b: np.allclose(a, b, rtol=1e-9, atol=1e-12)
  if same(c, c[0]) or (name == 'reverse' and same(c, c[::-1])):
    raise ValueError(
      f"control='{name}' gives these coefficients again, so it controls "
      f'nothing: {c.round(6).tolist()}.'
    )
  if name == 'reverse':
    return c[::-1]
  rng = np.random.default_rng(seed)
  order = c
  while same(order, c):
    order = rng.permutation(c)
  return order
