r"""Compilation of a training step, optimizer by optimizer.

  python -m benchmarks.compile [--size=124m] [--only=muon] [--repetitions=5]

Nothing is run or allocated and no cache is used. CPU seconds of tracing,
lowering and compiling, which other work on the machine hardly lengthens; the
ratio is to the step of adamw that was compiled just before. Sizes of 12 layers
are not scanned; --scan_layers compiles one layer in their place.
"""

import statistics
import time

import jax
from absl import flags

from benchmarks import results
from configs import base
from launch import cli
from lm import loop, programs, spec

_SIZE = flags.DEFINE_string('size', '124m', 'of configs/sizes.py')
_LAYERS = flags.DEFINE_integer('layers', 12, 'of the model', 1)
_SCAN = flags.DEFINE_bool('scan_layers', False, 'of the model')
_ONLY = flags.DEFINE_list('only', [], 'names of optimizers; empty = all')
_TURNS = flags.DEFINE_integer('repetitions', 5, 'of each optimizer', 1)


def seconds(name: str) -> float:
  """Returns the CPU seconds of one compilation."""
  config = base.get_config(f'size={_SIZE.value},optimizer={name}')
  config.model.num_layers = _LAYERS.value
  config.model.scan_layers = _SCAN.value
  built = loop.build(config)
  jax.clear_caches()
  begin = time.process_time()
  programs.trace(config, built).lower().compile()
  return time.process_time() - begin


@results.entry('compilation of a training step')
def main() -> None:
  jax.config.update('jax_enable_compilation_cache', False)
  seconds('adamw')  # what a process does once
  form = 'scanned' if _SCAN.value else 'unrolled'
  print(
    f'{_SIZE.value}, {_LAYERS.value} layers, {form}, {_TURNS.value} turns\n\n'
    '| optimizer | CPU seconds | times adamw |\n| --- | --- | --- |'
  )
  for name in _ONLY.value or spec.names('optimizers'):
    pairs = [(seconds('adamw'), seconds(name)) for _ in range(_TURNS.value)]
    ratios = results.spread([b / a for a, b in pairs])
    middle = statistics.median(b for _, b in pairs)
    print(f'| {name} | {middle:.1f} | {ratios} |', flush=True)


if __name__ == '__main__':
  cli.run(main)
