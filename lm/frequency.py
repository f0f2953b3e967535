"""Groups of tokens or classes by how often they occur in the training data."""

import numpy as np
from numpy.typing import ArrayLike


def groups(counts: ArrayLike, num: int) -> np.ndarray:
  """Returns the group of each class, 0 the most frequent, of equal mass.

  Classes are sorted by falling count; group k ends with the class at which the
  cumulative count reaches (k + 1) / num of the total (2402.19449). Groups may
  be empty: a class can be more frequent than a group. In integers, since sums
  of floats put a class on the wrong side of a boundary.

  Args:
    counts: integers >= 0, one per class.
    num: of groups.

  Raises:
    ValueError: counts that are not integers, negative or all 0; num < 1.
  """
  counts = np.asarray(counts)
  if counts.ndim != 1 or counts.dtype.kind not in 'iu':
    raise ValueError(
      f'counts must be a list of integers, not {counts.dtype} {counts.shape}.'
    )
  if num < 1:
    raise ValueError(f'num={num} must be at least 1.')
  if not counts.any() or counts.min() < 0:
    raise ValueError('counts must be >= 0, and one of them positive.')
  order = np.argsort(-counts.astype(np.int64), kind='stable')
  before = np.cumsum(counts[order].astype(np.int64)) - counts[order]
  found = np.empty(counts.size, np.int64)
  # A class belongs to group k if what comes before it reaches k / num.
  found[order] = np.minimum(before * num // counts.sum(dtype=np.int64), num - 1)
  return found


def means(values: ArrayLike, counts: ArrayLike, num: int) -> np.ndarray:
  """Returns the mean of one value per class in each group, by count (num,).

  NaN for an empty group.
  """
  found = groups(counts, num)
  mass = np.bincount(found, counts, num)
  total = np.bincount(found, np.asarray(counts) * np.asarray(values), num)
  return np.where(mass > 0, total / np.where(mass > 0, mass, 1), np.nan)
