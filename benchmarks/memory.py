r"""Peak memory of a training step beside what it must hold; nothing is run.

  python -m benchmarks.memory [--sizes=124m,350m,1b] [--batch_size=1]

Per device, from the compiled program: peak = arguments + results that reuse
none of them + temporaries. Beside it `state` (parameters, optimizer, interval
mean), `grads` (as large as the parameters) and `kept`, the least activations
with which the remat policy works, for L tokens, N layers, element size e:

  L N e x   none  4 D + 2 H K + 2 G K + 3 F   inputs of all products and norms
            dots  2 D + H K + 2 G K + 2 F     products that backward reads again
            full  D                           inputs of the blocks
  + 2 L D e + 4 V min(L, loss_chunk)          last norm; logits, float32

The least is state + max(kept, grads), as one shrinks while the other grows. It
lacks what `chunked` attention keeps on a CPU (its weights; cuDNN keeps none),
a layer computed again, and kernels in bfloat16.
"""

from absl import flags
from rich import table
from rich.console import Console

from benchmarks import results
from configs import base
from launch import cli

_SIZES = flags.DEFINE_list('sizes', ['124m', '350m', '1b'], 'configs/sizes.py')
_BATCH = flags.DEFINE_integer('batch_size', 1, 'sequences per device', 1)
_OPTIMIZER = flags.DEFINE_string('optimizer', 'adamw', 'of the step')


def activations(model, rows: int, time: int) -> int:
  """Returns the bytes that the policy keeps (see the top)."""
  c, tokens = model, rows * time
  queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  kept = {
    'none': 4 * c.d_model + 2 * queries + 2 * keys + 3 * c.d_ff,
    'dots': 2 * c.d_model + queries + 2 * keys + 2 * c.d_ff,
    'full': c.d_model,
  }[c.remat]
  element = 2 if c.dtype == 'bfloat16' else 4
  hidden = tokens * (c.num_layers * kept + 2 * c.d_model) * element
  return hidden + 4 * c.vocab_size * min(tokens, c.loss_chunk or tokens)


@results.entry('memory of a step')
def main() -> None:
  import jax  # late: --help answers at once

  from lm import loop, mesh, programs, sharding

  out = table.Table(
    'size, remat', 'state', 'grads', 'kept', 'peak, GB', 'over least',
    'over state + kept',
  )  # fmt: skip
  for size in _SIZES.value:
    config = base.get_config(f'size={size},optimizer={_OPTIMIZER.value}')
    config.batch_size = _BATCH.value * jax.device_count()
    built = loop.build(config)
    step = programs.trace(config, built).lower().compile()
    memory = step.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    state = mesh.device_bytes(built.abstract)
    gradients = mesh.device_bytes(built.abstract.params)
    with jax.set_mesh(built.mesh):
      slices = sharding.fitting_slices(config.batch_size, config.seq_len + 1)
    kept = activations(config.model, _BATCH.value // slices, config.seq_len)
    out.add_row(
      f'{size}, {config.model.remat}',
      *(f'{x / 1e9:.2f}' for x in (state, gradients, kept, peak)),
      f'{peak / (state + max(kept, gradients)):.2f}',
      f'{peak / (state + kept):.2f}',
    )
  print(f'{_BATCH.value} sequences per device, {_OPTIMIZER.value}')
  Console().print(out)


if __name__ == '__main__':
  cli.run(main)
