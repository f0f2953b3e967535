"""Exponential mean of checkpoints."""

from collections.abc import Sequence

import numpy as np

from merging.engine import coefficients

_FORMS = ('renormalised', 'recursive')


def ema(
  steps: Sequence[int], *, alpha: float = 0.2, form: str = 'renormalised'
) -> np.ndarray:
  """PMA's EMA (arXiv 2505.12082), whose formula and recursion differ.

  - 'renormalised': c_j proportional to (1 - alpha)^(n - 1 - j).
  - 'recursive': m <- (1 - alpha) m + alpha theta_j, begun at the oldest, which
    keeps (1 - alpha)^(n - 1): with few checkpoints the largest of all.

  Args:
    steps: of the checkpoints, oldest first; only their number counts.
    alpha: weight of the newer checkpoint, in (0, 1).
    form: 'renormalised' or 'recursive'.

  Returns:
    float64 coefficients of sum 1.

  Raises:
    ValueError: steps that do not increase, alpha outside (0, 1), unknown form.
  """
  n = coefficients.check_steps(steps).size
  if not 0 < alpha < 1:
    raise ValueError(f'alpha={alpha} must lie between 0 and 1.')
  if form not in _FORMS:
    raise ValueError(f"form='{form}' is unknown; legal: {', '.join(_FORMS)}.")
  c = alpha * (1 - alpha) ** np.arange(n - 1, -1, -1.0)
  if form == 'recursive':
    c[0] /= alpha
  return c / c.sum()
