"""Linearly weighted mean of checkpoints."""

from collections.abc import Sequence

import numpy as np

from merging.engine import coefficients


def wma(steps: Sequence[int]) -> np.ndarray:
  """PMA's WMA (arXiv 2505.12082): weights 1, 2, .., n from oldest to newest.

  At equal spacing it emulates the square decay, w_i = 1 - i (i + 1) /
  (n (n + 1)). Returns float64 coefficients of sum 1; refuses steps that do not
  increase.
  """
  n = coefficients.check_steps(steps).size
  return np.arange(1, n + 1) / (n * (n + 1) / 2)
