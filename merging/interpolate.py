"""Between a reference checkpoint and others, or beyond them."""

from collections.abc import Sequence

import numpy as np

from merging.engine import coefficients


def interpolate(
  steps: Sequence[int], *, weight: float = 0.5, signed: bool = False
) -> np.ndarray:
  """theta_0 + weight * (mean of the others - theta_0), theta_0 the oldest.

  weight 0 is the reference, 1 the mean of the others. Beyond 1 it extrapolates
  (Extra-Merge, arXiv 2605.26484, along two successive merges; task arithmetic,
  arXiv 2212.04089, along fine-tunings), below 0 it moves away from them: the
  coefficients are then signed, no averages, and add noise.

  Args:
    steps: of the checkpoints; the first is the reference.
    weight: of the others together.
    signed: permits a weight outside [0, 1].

  Returns:
    float64 coefficients of sum 1.

  Raises:
    ValueError: steps that do not increase, a weight that is not permitted.
  """
  n = coefficients.check_steps(steps).size
  if not (np.isfinite(weight) and (signed or 0 <= weight <= 1)):
    raise ValueError(
      f'weight={weight} is outside [0, 1], which needs signed=True.'
    )
  if n == 1:
    return np.ones(1)
  c = np.full(n, weight / (n - 1))
  c[0] = 1 - c[1:].sum()
  return c
