"""How a batch and its activations are laid out over a mesh, if there is one."""

import math

import jax
from jax.sharding import PartitionSpec as P

from lm import axes


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Shards the dimensions of `x` by their logical names, None = not at all.

  Mesh axes that do not exist here, or that a surrounding `shard_map` has
  taken, are left out: one model runs in a notebook, on a pod, in a sweep.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = (_mesh_axes(n) or None for n in names)
  return jax.lax.with_sharding_constraint(x, P(*spec))


def num_shards(name: str) -> int:
  """Returns into how many parts the mesh cuts a logical dimension."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[a] for a in _mesh_axes(name))


def fitting_slices(rows: int, columns: int) -> int:
  """Returns into how many slices to cut a batch where grad_accum_steps is 0.

  On a CPU, slices of at most 1024 tokens per device, whose activations stay in
  the caches: 1.5 times the tokens/s in sizes `nano` and `tiny`
  (`benchmarks/step_cpu.py`). Elsewhere 1.
  """
  if jax.default_backend() != 'cpu':
    return 1
  rows //= num_shards('batch')
  fits = lambda n: rows % n == 0 and rows // n * (columns - 1) <= 1024
  return next((n for n in range(1, rows) if fits(n)), rows)


def _mesh_axes(name) -> tuple[str, ...]:
  rule = axes.RULES[name] if name else None
  rule = (rule,) if isinstance(rule, str) else rule or ()
  mesh = jax.sharding.get_abstract_mesh()
  free = set(mesh.axis_names) - set(mesh.manual_axes)
  return tuple(a for a in rule if a in free)
