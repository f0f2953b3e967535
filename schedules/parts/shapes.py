"""Shapes of a decay: x in [0, 1] elapsed -> multiplier, 1 at 0 and 0 at 1.

The formulas are written so that a compiler cannot change their rounding (see
phases.py), and so that both ends are exact.
"""

import difflib
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

Shape = Callable[[Any], Any]

_RATE = math.log(10.0)  # 'exponential' falls to a tenth, then is shifted to 0


def _xp(x):
  return np if isinstance(x, np.ndarray | np.generic | float | int) else jnp


def _linear(x):
  return 1.0 - x


def _cosine(x):
  return 0.5 * (1.0 + _xp(x).cos(math.pi * x))


def _one_minus_sqrt(x):
  return 1.0 - _xp(x).sqrt(x)


def _square(x):
  return (1.0 - x) * (1.0 + x)


def _mirror_cosine(x):
  return 2.0 * (1.0 - x) - _cosine(x)


def _exponential(x):
  # 0.1^x - 0.1 = 0.1 (10^(1-x) - 1); the minimum makes the end at 0 exact.
  xp = _xp(x)
  return xp.minimum(xp.expm1(_RATE * (1.0 - x)), 9.0) * (1.0 / 9.0)


_SHAPES = {
  'linear': _linear,  # 1 - x
  'cosine': _cosine,  # (1 + cos(pi x)) / 2
  '1-sqrt': _one_minus_sqrt,  # 1 - sqrt(x): drops early
  'square': _square,  # 1 - x^2: drops late
  'mirror-cosine': _mirror_cosine,  # 2 (1 - x) - (1 + cos(pi x)) / 2
  'exponential': _exponential,  # (0.1^x - 0.1) / 0.9
}


def names() -> list[str]:
  """Returns the legal names."""
  return sorted(_SHAPES)


def shape(name: str) -> Shape:
  """Returns the shape of that name, for numpy and JAX arrays alike.

  Raises:
    ValueError: an unknown name.
  """
  if name not in _SHAPES:
    near = difflib.get_close_matches(name, _SHAPES, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ''
    raise ValueError(
      f"'{name}' is not a shape of decay.{hint} Legal: {', '.join(names())}."
    )
  return _SHAPES[name]
