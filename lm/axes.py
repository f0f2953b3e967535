"""What each dimension of a parameter means: read by sharding and optimizers.

A parameter is annotated once, in `lm/model.py`, with one logical name per
dimension. Everything else is derived here: its role, which dimensions are
inputs, outputs, a batch of matrices or heads, and how it is sharded.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

# Logical name -> mesh axis (or axes). The only place that maps one to another.
RULES = {
  'batch': ('data', 'fsdp'),
  'seq': None,
  'vocab': 'tensor',
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'mlp': 'tensor',
  'norm': None,
  'layers': None,
}


@dataclasses.dataclass(frozen=True)
class Axes:
  """The meaning of one parameter's dimensions (a leaf, not a pytree).

  role: 'embedding' (vocab, embed), 'head' (embed, vocab), 'matrix' or 'vector'.
  inputs, outputs, batch, heads: indices of dimensions. `batch` are dimensions
  that stack independent matrices (layers); `heads` index attention heads and
  are also in `inputs` or `outputs`. All empty for a vector but `batch`.
  lr_scale, decay_scale: factors of its learning rate and weight decay, which
  width rules set (`lm/width.py`).
  """

  names: tuple[str, ...]
  role: str
  inputs: tuple[int, ...] = ()
  outputs: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  heads: tuple[int, ...] = ()
  lr_scale: float = 1.0
  decay_scale: float = 1.0


def from_names(names: tuple[str, ...]) -> Axes:
  """Derives roles from logical names, e.g. ('layers', 'embed', 'mlp').

  'embed' is one side of every matrix; the side that stands first is the input.
  """
  batch = tuple(i for i, n in enumerate(names) if n == 'layers')
  rest = tuple(i for i in range(len(names)) if i not in batch)
  if 'embed' not in names:
    return Axes(names, 'vector', batch=batch)
  e = names.index('embed')
  others = tuple(i for i in rest if i != e)
  inputs, outputs = ((e,), others) if e == rest[0] else (others, (e,))
  heads = tuple(i for i in others if names[i] in ('heads', 'kv_heads'))
  role = 'matrix'
  if 'vocab' in names:
    role = 'head' if e == rest[0] else 'embedding'
  return Axes(names, role, inputs, outputs, batch, heads)


def partition_specs(axes: Any) -> Any:
  """Maps a tree of `Axes` to a tree of PartitionSpec by RULES."""
  return jax.tree.map(lambda a: P(*(RULES[n] for n in a.names)), axes)


def like_params(
  tree: Any,
  params: Any,
  values: Any,
  default: Any,
  factor: Callable[[Any, Any], Any] | None = None,
) -> Any:
  """Gives each leaf of `tree` the value of the parameter it belongs to.

  A leaf belongs to a parameter when its key path holds the parameter's path:
  true for the state of every optimizer, also inside masks, chains and
  partitions.

  Args:
    tree: e.g. the abstract train state.
    params: the abstract parameters.
    values: one value per parameter, in the structure of `params`.
    default: for leaves that belong to none (counters, scalars).
    factor: (value, leaf) -> the value of a leaf of another shape than its
      parameter; None = the default.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  leaves = jax.tree.structure(params).flatten_up_to(values)
  known = {
    keys(path): (leaf.shape, value)
    for (path, leaf), value in zip(flat, leaves, strict=True)
  }
  sizes = sorted({len(path) for path in known}, reverse=True)

  def find(path, leaf):
    at = keys(path)
    for n in sizes:
      for i in range(len(at) - n, -1, -1):
        if at[i : i + n] in known:
          shape, value = known[at[i : i + n]]
          if shape == leaf.shape:
            return value
          return factor(value, leaf) if factor else default
    return default

  return jax.tree_util.tree_map_with_path(find, tree)


def keys(path: Any) -> tuple[str, ...]:
  """Returns a key path as names, the same for fields and dict keys."""
  return tuple(jax.tree_util.keystr((k,), simple=True) for k in path)
