"""What a run would cost: sizes, FLOPs and memory; nothing is trained."""

import math
import pathlib

import jax
from ml_collections import ConfigDict
from rich import console, table

from lm import (
  address,
  branch,
  keep,
  loop,
  mesh,
  model,
  programs,
  restore,
  width,
)


def report(config: ConfigDict, workdir: str = '') -> None:
  """Prints the parameters by role, FLOPs per token, memory and disk space."""
  run = pathlib.Path(workdir) if workdir else None
  first = branch.begin(config, run)
  num_steps = config.num_steps - first
  built = loop.build(config)
  if not (run and address.steps(run)):
    restore.check_shapes(config, built.abstract)
  abstract = built.abstract
  step = programs.trace(config, built).lower().compile()
  memory = step.memory_analysis()
  flops = model.flops_per_token(config.model, config.seq_len)
  per_step = config.batch_size * config.seq_len
  rows = [
    ('mesh', ' x '.join(f'{k} {v}' for k, v in built.mesh.shape.items())),
    ('data', built.data.summary),
    ('parameters', f'{_count(abstract.params):,}'),
    *((f'  {k}', f'{v:,}') for k, v in _by_role(built).items()),
    ('width rule', width.describe(config)),
    ('tokens per step', f'{per_step:,}'),
    ('tokens in the run', f'{per_step * num_steps:,}'),
    ('training FLOPs per token', f'{flops:.3e}'),
    ('training FLOPs of the run', f'{flops * per_step * num_steps:.3e}'),
    ('memory per device: state', _size(memory.argument_size_in_bytes)),
    ('  parameters', _size(mesh.device_bytes(abstract.params))),
    ('  optimizer', _size(mesh.device_bytes(abstract.opt_state))),
    (
      '  averages',
      _size(mesh.device_bytes((abstract.mean, abstract.averages))),
    ),
    ('memory per device: temporary', _size(memory.temp_size_in_bytes)),
    ('one checkpoint', _size(_bytes(abstract))),
    ('checkpoints of the run', str(_num_checkpoints(config, first))),
  ]
  grid = table.Table(show_header=False)
  for row in rows:
    grid.add_row(*row)
  console.Console().print(grid)


def _by_role(built):
  roles = {}
  axes = jax.tree.leaves(built.model.axes)
  for a, x in zip(axes, jax.tree.leaves(built.abstract.params), strict=True):
    roles[a.role] = roles.get(a.role, 0) + x.size
  return roles


def _num_checkpoints(config, first):
  every = config.checkpoint.every_steps
  steps = range(first, config.num_steps)
  saved = {first, *(n for n in steps if n % every == 0), config.num_steps}
  return len(keep.steps_kept(saved, config.checkpoint))


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def _bytes(tree):
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _size(n):
  unit = min(int(math.log(max(n, 1), 1024)), 4)
  return f'{n / 1024**unit:.1f} {("B", "KiB", "MiB", "GiB", "TiB")[unit]}'
