"""Greedy soup: which models to average, chosen by their held-out loss."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Tried(NamedTuple):
  """One candidate: its number, the loss of the soup with it, if it stayed."""

  candidate: int
  loss: float
  kept: bool


def greedy(
  losses: Sequence[float], loss_of_mean: Callable[[list[int]], float]
) -> list[Tried]:
  """Model soups (arXiv 2203.05482, recipe 1, greedy).

  Candidates are tried from the lowest loss to the highest; each stays if the
  uniform mean with it is no worse than without. Choose on other data than those
  whose loss is reported.

  Args:
    losses: held-out loss of each candidate.
    loss_of_mean: held-out loss of the mean of some candidates.

  Returns:
    The candidates in the order tried; those kept have equal coefficients.

  Raises:
    ValueError: no candidates, a loss that is not finite.
  """
  values = np.asarray(losses, np.float64)
  if not values.size or not np.isfinite(values).all():
    raise ValueError(f'losses={values.tolist()} must be finite numbers.')
  first, *rest = (int(i) for i in np.argsort(values, kind='stable'))
  tried = [Tried(first, float(values[first]), True)]
  chosen, best = [first], values[first]
  for i in rest:
    loss = loss_of_mean([*chosen, i])
    kept = bool(loss <= best)
    tried.append(Tried(i, float(loss), kept))
    if kept:
      chosen, best = [*chosen, i], loss
  return tried
