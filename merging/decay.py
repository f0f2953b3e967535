"""Coefficients that emulate a decay of the learning rate from checkpoints."""

from collections.abc import Sequence

import numpy as np

from merging.engine import coefficients, shapes

_GRIDS = ('left', 'block')


def decay(
  steps: Sequence[int],
  *,
  shape: str = 'linear',
  floor: float = 0.0,
  grid: str = 'left',
) -> np.ndarray:
  """WSM: merging as learning-rate decay (arXiv 2507.17634, theorem 3.1).

  The multiplier w_i = floor + (1 - floor) s(x_i) of each block between two
  checkpoints, then c = (1 - w_1, w_1 - w_2, ..., w_k). Positions are steps,
  not indices, so the spacing may vary.

  - grid 'left', the paper's: w_i is sampled at the left edge of block i of a
    window that opens one mean interval before the first checkpoint.
  - grid 'block': w_i is the mean of the decay over block i, in a window from
    the first to the last checkpoint.

  Args:
    steps: of the checkpoints, oldest first.
    shape: a name of merging/engine/shapes.py; 'linear' = the uniform mean.
    floor: end of the decay as a fraction of the peak.
    grid: 'left' or 'block'.

  Returns:
    float64 coefficients, one per checkpoint, none negative, sum 1.

  Raises:
    ValueError: steps that do not increase, an unknown shape or grid.
  """
  s = coefficients.check_steps(steps)
  coefficients.check_floor(floor)
  if grid not in _GRIDS:
    raise ValueError(_grid_error(grid))
  curve = shapes.shape(shape)
  if s.size == 1:
    return np.ones(1)
  w = _left(s, curve) if grid == 'left' else _block(s, curve)
  # Rounding of nearly equal means must not look like a rising target.
  w = np.minimum.accumulate(np.clip(floor + (1 - floor) * w, 0, 1))
  return coefficients.inverse(w)


def _left(s, shape):
  start = s[0] - (s[-1] - s[0]) / (s.size - 1)
  return shape.value((s[:-1] - start) / (s[-1] - start))


def _block(s, shape):
  x = (s - s[0]) / (s[-1] - s[0])
  return np.diff(shape.integral(x)) / np.diff(x)


def _grid_error(grid):
  why = (
    ' The right edge would give the newest checkpoint the coefficient 0.'
    if grid == 'right'
    else ''
  )
  return f"grid='{grid}' does not exist.{why} Legal: {', '.join(_GRIDS)}."
