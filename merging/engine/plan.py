"""What a merge will read: checked before anything is written."""

import contextlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from merging.engine import files, items, plain, safetensors

# What TensorStore adds to its sentences, for its programmers.
_WHERE = re.compile(r" \[[a-z_]+(?: [a-z]+)?=['{].*", re.DOTALL)
_FULL = re.compile('No space left on device|Disk quota exceeded|File too large')

Path = str | pathlib.Path
Sources = Sequence[tuple[Path, float]]  # (item directory, coefficient)
# Called with (item or None for the result, leaf, slices, array) per part of it
# that is read or written, from any thread: slices of each axis, or one slice of
# the leaf in C order, and then the array has one axis, too.
Observer = Callable[[pathlib.Path | None, str, tuple[slice, ...], Any], None]


class Options(NamedTuple):
  """How to add: see `stream.merge`."""

  accumulate: str = 'float32'
  dtype: str | None = None
  max_bytes: int = 1 << 30
  observe: Observer | None = None
  tree: str = ''
  integers: bool = False
  ages: Sequence[int] | None = None


class Plan(NamedTuple):
  """Checked sources, oldest first."""

  paths: list[pathlib.Path]
  coefficients: list[float]
  items: list[items.Item | safetensors.Folder]
  options: Options
  limits: ts.Context


class Leaf(NamedTuple):
  """One array in all sources, and how to write their sum."""

  name: str
  shape: tuple[int, ...]
  dtype: str  # of the result
  sum_dtype: np.dtype
  chunk: tuple[int, ...]
  arrays: list[items.Array | plain.Plain]

  @property
  def averaged(self) -> bool:
    """Whether it is a sum; else it is that of the newest source."""
    return self.sum_dtype.kind == 'f'

  @property
  def bytes(self) -> tuple[int, int]:
    """Returns the bytes of memory per element, and those of a source."""
    source = self.arrays[0].dtype.numpy_dtype.itemsize
    most = max(source, ts.dtype(self.dtype).numpy_dtype.itemsize)
    chunk = tuple(slice(0, n) for n in self.chunk)
    # Of what is read or written, and what TensorStore decodes it from.
    copies = 3 if all(array.place(chunk) for array in self.arrays) else 5
    return self.sum_dtype.itemsize + copies * most, source

  def first(self, index: items.Index) -> int | None:
    """Returns the first element of a part; None if it is no range."""
    return files.first(self.shape, index)


def plan(sources: Sources, options: Options) -> Plan:
  """Sorts and checks the sources by their metadata alone.

  Raises:
    ValueError: see `stream.merge`.
  """
  check_options(options)
  if not sources:
    raise ValueError('there is nothing to merge: no sources.')
  pairs = _in_order(sources, options.ages)
  paths, coefficients = map(list, zip(*pairs, strict=True))
  real = [os.path.realpath(path) for path in paths]
  for i, path in enumerate(paths):
    if real[i] in real[:i]:
      raise ValueError(f"'{path}' is listed twice.")
  total = math.fsum(coefficients)
  if not abs(total - 1) <= 1e-9:
    raise ValueError(f'the coefficients sum to {total!r}, not to 1.')
  opened = [open_item(p, options.tree) for p in paths]
  _check_leaves(paths, opened)
  return Plan(paths, coefficients, opened, options, items.context())


def open_item(
  path: pathlib.Path, tree: str = ''
) -> items.Item | safetensors.Folder:
  """Opens a checkpoint of either format.

  Raises:
    ValueError: `path` is neither, or a `tree` in a format without one.
  """
  if not safetensors.found(path):
    return items.Item(path, tree)
  if tree:
    raise ValueError(f"'{path}' is safetensors, which has no tree '{tree}'.")
  return safetensors.Folder(path)


def check_item(path: pathlib.Path) -> None:
  """Opens all arrays of an item, which reads their metadata only.

  Raises:
    ValueError: one of them cannot be opened.
  """
  item, limits = open_item(path), items.context()
  for name in item.leaves:
    with named(path, name):
      item.open(name, limits)
      if lost := item.lost(name):
        raise ValueError(f'{lost} is not there, or is cut')


def leaves(plan: Plan) -> Iterator[Leaf]:
  """Opens the leaves one after another in all sources.

  Raises:
    ValueError: shapes or dtypes that differ or cannot be averaged.
  """
  for name in plan.items[0].leaves:
    yield _open(plan, name)


@contextlib.contextmanager
def named(path: pathlib.Path, name: str, done: str = 'read') -> Iterator[None]:
  """Turns an error of TensorStore into a sentence that names the leaf."""
  try:
    yield
  except (ValueError, OSError) as e:
    raise mistake(e, path, name, done) from e


def mistake(
  error: Exception, path: pathlib.Path, name: str, done: str
) -> ValueError:
  """Returns the sentence of `named`."""
  reason = _WHERE.sub('', str(error))
  if full := _FULL.search(str(error)):
    reason = full[0]
  leaf = 'a leaf' if name == 'all' else f"leaf '{name}'"
  return ValueError(f"{leaf} of '{path}' cannot be {done}: {reason}")


def check_options(options: Options) -> None:
  """Raises ValueError for a value that no merge can have."""
  legal = {
    'accumulate': ('float32', 'float64'),
    'dtype': (None, *items.FLOATS),
  }
  for key, values in legal.items():
    value = getattr(options, key)
    if value not in values:
      text = ', '.join(filter(None, values))
      raise ValueError(f'{key}={value!r} is unknown; legal: {text}.')
  if options.max_bytes < 1:
    raise ValueError(f'max_bytes={options.max_bytes} must be positive.')


def _in_order(sources, ages):
  """Sorts by age, else by <step> of <step>/<item>, then by name."""
  pairs = [(_resolved(pathlib.Path(p)), float(c)) for p, c in sources]
  if ages is None:
    steps = [path.parent.name for path, _ in pairs]
    ages = [int(step) if step.isdecimal() else -1 for step in steps]
  both = zip(ages, pairs, strict=True)
  return [pair for _, pair in sorted(both, key=lambda x: (x[0], str(x[1][0])))]


def _resolved(path):
  # A file keeps its name: a link to it may be all that says what it is.
  if path.is_file():
    return path.parent.resolve() / path.name
  return path.resolve()


def _check_leaves(paths, opened):
  for path, item in zip(paths, opened, strict=True):
    if type(item) is not type(opened[0]):
      raise ValueError(f"'{paths[0]}' and '{path}' have different formats.")
    different = {*item.leaves} ^ {*opened[0].leaves}
    if different:
      name = sorted(different)[0]
      raise ValueError(
        f"leaf '{name}' is not in both '{paths[0]}' and '{path}'."
      )


def _open(plan, name):
  arrays = []
  for path, item in zip(plan.paths, plan.items, strict=True):
    with named(path, name):
      arrays.append(item.open(name, plan.limits))
    a, b = arrays[0], arrays[-1]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
      raise ValueError(
        f"leaf '{name}' is {a.dtype.name}{a.shape} in '{plan.paths[0]}' but "
        f"{b.dtype.name}{b.shape} in '{path}'."
      )
  kind = arrays[0].dtype
  floating = kind.name in items.FLOATS
  if not floating and not plan.options.integers:
    raise ValueError(
      f"leaf '{name}' of '{plan.paths[0]}' is {kind.name}; only "
      f'{", ".join(items.FLOATS)} can be averaged.'
    )
  sums = np.promote_types(plan.options.accumulate, kind.numpy_dtype)
  return Leaf(
    name,
    arrays[0].shape,
    (floating and plan.options.dtype) or kind.name,
    sums if floating else kind.numpy_dtype,
    # With the largest chunk as the block none is decoded more than once.
    max((a.chunk for a in arrays), key=math.prod),
    arrays,
  )
