r"""Collectives and memory of a compiled step, per mesh; nothing is run.

  python -m benchmarks.scaling [--size=small] [--layers=4] [--optimizer=adamw]

Eight virtual CPU devices; unrolled layers, so that each collective stands in
the program text as often as it is executed. The least a step must move, in
bytes that each device receives or sends, of P parameters and activations A =
batch on the device x sequence x width, all float32:

  data    all-reduce of the gradients: P
  fsdp    gather the parameters twice, reduce-scatter the gradients: 3 P
  tensor  4 all-reduces of A per layer (Megatron-LM, 1909.08053), 2 for the head
  muon    (all with Newton-Schulz) 2 all-to-alls of the matrices on a device per
          sharded axis, one each way; over `data`, a gather of the results

Bytes are those of the results in the program. The CPU backend writes a
reduce-scatter as an all-reduce and a slice. Memory is the compiler's: the state
(parameters, optimizer, mean) and temporaries, beside what they must be.
"""

import collections
import math
import os
import re

from absl import flags
from rich import table
from rich.console import Console

from benchmarks import results
from launch import cli

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

_SIZE = flags.DEFINE_string('size', 'small', 'of configs/sizes.py')
_LAYERS = flags.DEFINE_integer('layers', 4, 'of the model')
_OPTIMIZER = flags.DEFINE_string('optimizer', 'adamw', 'of the step')
_BYTES = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4, 'pred': 1, 'f64': 8}
_KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
MESHES = {
  'data 8': {'data': 8},
  'fsdp 8': {'data': 1, 'fsdp': 8},
  'data 2, fsdp 4': {'data': 2, 'fsdp': 4},
  'tensor 2': {'data': 4, 'tensor': 2},
}


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Kind -> (operations, bytes of their results) in a program's text."""
  count, size = collections.Counter(), collections.Counter()
  pattern = rf'= (.*?) ({"|".join(_KINDS)})(?:-start)?\('
  for shapes, kind in re.findall(pattern, text):
    count[kind] += 1
    for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', shapes):
      numbers = [int(d) for d in dims.split(',') if d]
      size[kind] += _BYTES[dtype] * math.prod(numbers)
  return {kind: (count[kind], size[kind]) for kind in _KINDS if count[kind]}


def least(config, mesh: dict[str, int], parameters: int, matrices: int) -> int:
  """Bytes that the step must move over this mesh (see the top)."""
  shards, tensor = mesh.get('fsdp', 1), mesh.get('tensor', 1)
  local = 4 * parameters // tensor
  total = 0
  if shards > 1:
    total += 2 * local + local // shards  # gathered; results of the scatter
  if mesh.get('data', 1) > 1:
    total += local // shards
  if tensor > 1:
    rows = config.batch_size // (mesh.get('data', 1) * shards)
    activation = 4 * rows * config.seq_len * config.model.d_model
    total += (4 * config.model.num_layers + 2) * activation
  if 'ns_steps' in config.optimizer:
    split = (shards > 1) + (tensor > 1)
    total += 2 * split * 4 * matrices // math.prod(mesh.values())
    if mesh.get('data', 1) > 1:
      total += 4 * matrices // (shards * tensor)
  return total


def compile_step(mesh: dict[str, int]):
  """Returns config, program, counts of parameters and matrices, bytes held."""
  import jax

  from configs import base
  from lm import loop, programs
  from lm import mesh as mesh_lib

  config = base.get_config(f'size={_SIZE.value},optimizer={_OPTIMIZER.value}')
  config.update({'batch_size': 16, 'mesh': {'data': -1, **mesh}})
  config.model.update({'num_layers': _LAYERS.value, 'scan_layers': False})
  built = loop.build(config)
  parameters = jax.tree.leaves(built.abstract.params)
  roles = zip(parameters, jax.tree.leaves(built.model.axes), strict=True)
  matrices = sum(x.size for x, a in roles if a.role == 'matrix')
  total = sum(x.size for x in parameters)
  local = mesh_lib.device_bytes(built.abstract)
  step = programs.trace(config, built).lower().compile()
  return config, step, total, matrices, local


@results.entry('collectives and memory per mesh')
def main() -> None:
  moved = table.Table('mesh', 'collective', 'operations', 'MB', 'least, MB')
  held = table.Table('mesh', 'state, MB', 'must be, MB', 'temporary, MB')
  for name, mesh in MESHES.items():
    config, program, parameters, matrices, local = compile_step(mesh)
    found = collectives(program.as_text())
    for kind, (count, size) in found.items():
      moved.add_row(name, kind, str(count), f'{size / 1e6:.1f}')
    total = sum(size for _, size in found.values())
    needed = least(config, mesh, parameters, matrices)
    moved.add_row(
      name, 'all', '', f'{total / 1e6:.1f}', f'{needed / 1e6:.1f}',
      end_section=True,
    )  # fmt: skip
    memory = program.memory_analysis()
    held.add_row(
      name,
      f'{memory.argument_size_in_bytes / 1e6:.1f}',
      f'{local / 1e6:.1f}',
      f'{memory.temp_size_in_bytes / 1e6:.1f}',
    )
  Console().print(moved)
  Console().print(held)


if __name__ == '__main__':
  cli.run(main)
