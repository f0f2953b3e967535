r"""Collectives and memory of a compiled step, per mesh; nothing is run.

  python -m benchmarks.scaling [--size=small] [--layers=4] [--optimizers=adamw]

Eight virtual CPU devices; unrolled layers, so that each collective stands in
the program text as often as it is executed. Bytes are those that a device
sends, beside the formulas of `benchmarks/collectives.py`: parameters gathered
once and kept (twice, if they are freed between), gradients scattered as they
are summed, 4 sums of activations a layer. The CPU backend writes a
reduce-scatter as an all-reduce and a slice, which is twice as much, and does
not add before it sums over devices (of Q, K, V: three sums in place of one).
Memory is the compiler's: the state (parameters, optimizer, mean) and
temporaries, beside what they must be.
"""

import os

from absl import flags
from rich import table
from rich.console import Console

from benchmarks import collectives, results
from launch import cli

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

_SIZE = flags.DEFINE_string('size', 'small', 'of configs/sizes.py')
_LAYERS = flags.DEFINE_integer('layers', 4, 'of the model', 1)
_OPTIMIZERS = flags.DEFINE_list('optimizers', ['adamw', 'muon'], 'of the step')
MESHES = {
  'data 8': {'data': 8},
  'fsdp 8': {'data': 1, 'fsdp': 8},
  'data 2, fsdp 4': {'data': 2, 'fsdp': 4},
  'data 4, tensor 2': {'data': 4, 'tensor': 2},
  'data 2, fsdp 2, tensor 2': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'data 8, zero 3': {'data': 8, 'zero': 3},
}


def compile_step(optimizer: str, mesh: dict[str, int]):
  """Returns program, sizes, bytes held by a device."""
  import jax

  from configs import base
  from lm import loop, programs
  from lm import mesh as mesh_lib

  config = base.get_config(f'size={_SIZE.value},optimizer={optimizer}')
  config.update({'batch_size': 16, 'mesh': {'data': -1, **mesh}})
  config.model.update({'num_layers': _LAYERS.value, 'scan_layers': False})
  built = loop.build(config)
  parameters = jax.tree.leaves(built.abstract.params)
  roles = zip(parameters, jax.tree.leaves(built.model.axes), strict=True)
  sizes = collectives.Sizes(
    parameters=sum(x.size for x in parameters),
    matrices=sum(x.size for x, a in roles if a.role == 'matrix'),
    layers=config.model.num_layers,
    activations=config.batch_size * config.seq_len * config.model.d_model,
  )
  local = mesh_lib.device_bytes(built.abstract)
  return programs.trace(config, built).lower().compile(), sizes, local


@results.entry('collectives and memory per mesh')
def main() -> None:
  moved = table.Table('step', 'mesh', 'collective', 'among', 'operations', 'MB')
  held = table.Table(
    'step', 'mesh', 'state, MB', 'must be, MB', 'temporary, MB'
  )
  mega = lambda x: f'{x / 1e6:.1f}'
  for optimizer in _OPTIMIZERS.value:
    for name, mesh in MESHES.items():
      program, sizes, local = compile_step(optimizer, mesh)
      row = (optimizer, name)
      found = collectives.collectives(program.as_text())
      for (kind, n), x in sorted(found.items()):
        moved.add_row(*row, kind, str(n), str(x.operations), mega(x.bytes))
      needed = collectives.formula(sizes, mesh, optimizer == 'muon')
      for what, x in needed.items():
        if x:
          moved.add_row(*row, f'formula: {what}', '', '', mega(x))
      sums = [sum(x.bytes for x in found.values()), sum(needed.values())]
      moved.add_row(
        *row, 'all / formula', '', '', f'{sums[0] / sums[1]:.2f}',
        end_section=True,
      )  # fmt: skip
      memory = program.memory_analysis()
      sizes = memory.argument_size_in_bytes, local, memory.temp_size_in_bytes
      held.add_row(*row, *map(mega, sizes))
  Console(width=100).print(moved)
  Console(width=100).print(held)


if __name__ == '__main__':
  cli.run(main)
