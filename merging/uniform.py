"""The plain mean of checkpoints."""

from collections.abc import Sequence

import numpy as np

from merging.engine import coefficients


def uniform(steps: Sequence[int]) -> np.ndarray:
  """LAWA (arXiv 2209.14981): every checkpoint counts the same.

  At equal spacing it emulates a linear decay to zero, w_i = 1 - i / n.
  Returns float64 coefficients of sum 1; refuses steps that do not increase.
  """
  n = coefficients.check_steps(steps).size
  return np.full(n, 1 / n)
