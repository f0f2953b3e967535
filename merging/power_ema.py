"""The power EMA of a relative width, from checkpoints."""

from collections.abc import Sequence

import numpy as np

from merging.engine import coefficients, posthoc


def power_ema(steps: Sequence[int], *, sigma: float = 0.1) -> np.ndarray:
  """Karras et al. (arXiv 2312.02696, eq. 121): weight ~ s^g of theta_s.

  Every checkpoint stands for the steps since the one before it, the oldest for
  all before: c_j = (s_j^(g+1) - s_{j-1}^(g+1)) / s_k^(g+1). The width `sigma`
  is the standard deviation of the profile as a fraction of the steps so far:
  the average emulates the multiplier 1 - (s/T)^(g+1) from step 0 on. Stored
  trackers (checkpoint.ema) give it without sampling: --stored=trackers.

  Returns:
    float64 coefficients of sum 1, none negative.

  Raises:
    ValueError: steps that do not increase; a width out of range.
  """
  s = coefficients.check_steps(steps)
  exponent = posthoc.gamma(sigma)
  if not s[-1]:
    return np.ones(1)
  return np.diff(posthoc.power(s, s[-1], exponent), prepend=0.0)
