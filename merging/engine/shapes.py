"""Shapes of an emulated decay in float64: x in [0, 1] elapsed -> multiplier.

The same curves as schedules/parts/shapes.py under the same names (a test says
so), with their integrals from 0 to x for block means, and 'ema': the profile
of an exponential average, which opens at 0.9 and not at 1. 'power-P' is
1 - x^P for any number P > 0: power-1 is linear, power-0.5 is 1-sqrt, power-2
is square, and the profile of a power-function average of exponent P - 1
(arXiv 2312.02696).
"""

import difflib
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_RATE = math.log(10.0)
_Curve = Callable[[np.ndarray], np.ndarray]


class Shape(NamedTuple):
  """A multiplier and its integral from 0 to x (up to a constant)."""

  value: _Curve
  integral: _Curve


def _half_cosine(x):
  return 0.5 * (x + np.sin(np.pi * x) / np.pi)


_SHAPES = {
  'linear': Shape(lambda x: 1 - x, lambda x: x - x**2 / 2),
  'cosine': Shape(lambda x: (1 + np.cos(np.pi * x)) / 2, _half_cosine),
  '1-sqrt': Shape(lambda x: 1 - np.sqrt(x), lambda x: x - 2 / 3 * x**1.5),
  'square': Shape(lambda x: 1 - x**2, lambda x: x - x**3 / 3),
  'mirror-cosine': Shape(
    lambda x: 2 * (1 - x) - (1 + np.cos(np.pi * x)) / 2,
    lambda x: 2 * x - x**2 - _half_cosine(x),
  ),
  'exponential': Shape(
    lambda x: (0.1**x - 0.1) / 0.9,
    lambda x: (-(0.1**x) / _RATE - 0.1 * x) / 0.9,
  ),
  'ema': Shape(
    lambda x: 1 - 0.1 ** (1 - x),
    lambda x: x - 0.1 ** (1 - x) / _RATE,
  ),
}


def names() -> list[str]:
  """Returns the legal names, without those of 'power-P'."""
  return sorted(_SHAPES)


def shape(name: str) -> Shape:
  """Returns the shape of that name.

  Raises:
    ValueError: an unknown name.
  """
  if power := re.fullmatch(r'power-(\d+\.?\d*)', name):
    return _power(name, float(power[1]))
  if name not in _SHAPES:
    near = difflib.get_close_matches(name, _SHAPES, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ''
    raise ValueError(
      f"'{name}' is not a shape of decay.{hint} Legal: {', '.join(names())}, "
      'power-NUMBER.'
    )
  return _SHAPES[name]


def _power(name, p):
  if not 0 < p < math.inf:
    raise ValueError(f"'{name}' is not a shape of decay: NUMBER must be > 0.")
  return Shape(lambda x: 1 - x**p, lambda x: x - x ** (p + 1) / (p + 1))
