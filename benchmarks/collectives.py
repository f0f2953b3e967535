"""What a compiled step sends between devices, and the formulas for it.

Bytes are those that a device sends (and receives) in a ring or an exchange of n
devices, which can be added over kinds, unlike sizes of results. Of an array
that has b bytes where it is whole:

  all-reduce           2 (n - 1) / n  b
  all-gather, reduce-scatter, all-to-all    (n - 1) / n  b
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_BYTES = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4, 'pred': 1, 'f64': 8}
KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all')


class Moved(NamedTuple):
  """Collectives of one kind among as many devices each."""

  operations: int
  bytes: float  # that a device sends


def collectives(text: str) -> dict[tuple[str, int], Moved]:
  """Returns {(kind, devices in a group): moved} of an optimized HLO text."""
  found: dict[tuple[str, int], Moved] = {}
  pattern = rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\((.*)'
  for shapes, kind, rest in re.findall(pattern, text):
    size = sum(map(_size, re.findall(r'\w+\[[\d,]*\]', shapes)))
    n = _group(rest)
    whole = size * n if kind == 'reduce-scatter' else size
    old = found.get((kind, n), Moved(0, 0))
    found[kind, n] = Moved(old.operations + 1, old.bytes + sent(kind, n, whole))
  return found


def sent(kind: str, n: int, whole: float) -> float:
  """Returns the bytes that a device sends (see the top)."""
  return (2 if kind == 'all-reduce' else 1) * (n - 1) / n * whole


def _size(array):
  dtype, dims = array.rstrip(']').split('[')
  return _BYTES[dtype] * math.prod(int(d) for d in dims.split(',') if d)


def _group(rest):
  """Devices of a group, of the three ways to write `replica_groups`."""
  text = rest.partition('replica_groups=')[2]
  if found := re.match(r'mesh\[(.*?)\].*?\{(.*?)\}', text):
    sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in found[2].split(','))
  if found := re.match(r'\[\d+,(\d+)\]', text):
    return int(found[1])
  if found := re.match(r'\{\{([\d,]+)\}', text):
    return found[1].count(',') + 1
  raise ValueError(f'no groups of devices in {rest[:100]!r}')


class Sizes(NamedTuple):
  """Of a run: elements of all parameters, and of the matrices among them."""

  parameters: int
  matrices: int
  layers: int
  activations: int  # batch of all devices x sequence x width


def formula(
  sizes: Sizes, mesh: Mapping[str, int], orthogonal: bool
) -> dict[str, float]:
  """Returns {what: bytes that a device sends} in float32.

  The parts are sums over gradients and parameters (`data`, `fsdp`), activations
  (`tensor`: 4 all-reduces a layer, Megatron-LM, 1909.08053, and 2 for the head)
  and Newton-Schulz of matrices whole on one device (muon: two exchanges over
  each axis that cuts them; over `data`, which shares the work, a gather). With
  `zero` 1 and 2 a scatter and a gather take the place of the sum over `data`.
  """
  d, f, t = (mesh.get(axis, 1) for axis in ('data', 'fsdp', 'tensor'))
  if mesh.get('zero') == 3:  # parameters are cut over both
    d, f = 1, d * f
  local, matrices = 4 * sizes.parameters / t, 4 * sizes.matrices
  batch = 4 * sizes.activations / (d * f)
  found = {
    'gather of parameters': sent('all-gather', f, local),
    'sum of gradients, fsdp': sent('reduce-scatter', f, local),
    'sum of gradients, data': sent('all-reduce', d, local / f),
    'activations': (4 * sizes.layers + 2) * sent('all-reduce', t, batch),
  }
  if orthogonal:
    ways = 2 * sum((n - 1) / n for n in (f, t))
    found['matrices'] = ways * matrices / (d * f * t)
    found['matrices'] += sent('all-gather', d, matrices / (f * t))
  return found
