r"""What averages in the train state cost: share of a step, and of its memory.

  python -m benchmarks.averages [--size=124m] [--batch_size=1] [--turns=5]

Each program is the training step of launch.train with one more average: none,
the interval mean, mean and moment, or these and two power EMAs. They take turns
on the same tokens. An average costs a few passes over the parameters whatever
the batch, so its share falls with the tokens of a step.
"""

import statistics
import time

import jax
import numpy as np
from absl import flags

from benchmarks import results
from configs import base
from launch import cli
from launch.parts import comparison
from lm import loop, step

_SIZE = flags.DEFINE_string('size', '124m', 'of configs/sizes.py')
_BATCH = flags.DEFINE_integer('batch_size', 1, 'sequences per step', 1)
_TURNS = flags.DEFINE_integer('turns', 5, 'steps of each program', 1)

FORMS = {
  'none': {'mean': False},
  'mean': {},
  'mean, moment': {'moment': True},
  'mean, moment, two EMAs': {'moment': True, 'ema': '0.05,0.1'},
}


class Program:
  """A training step that keeps its own state."""

  def __init__(self, averages: dict) -> None:
    config = base.get_config(f'size={_SIZE.value}')
    config.update({'batch_size': _BATCH.value, 'checkpoint': averages})
    config.model.dtype = 'float32'  # what a CPU computes in
    built = loop.build(config)
    shape = (config.batch_size, config.seq_len + 1)
    self._tokens = np.random.default_rng(0).integers(256, size=shape, dtype='i')
    self._step, self._traced = built.train_step, step.floats(config)
    self._state = built.init()
    self.bytes = sum(x.nbytes for x in jax.tree.leaves(self._state))

  def seconds(self) -> float:
    begin = time.perf_counter()
    self._state, metrics = self._step(self._state, self._tokens, self._traced)
    float(metrics['train/loss'])
    return time.perf_counter() - begin


@results.entry('what averages in the state cost')
def main() -> None:
  programs = {name: Program(knobs) for name, knobs in FORMS.items()}
  turns = [
    {name: p.seconds() for name, p in programs.items()}
    for _ in range(_TURNS.value + 1)
  ][1:]  # the first compiles
  first = programs['none']
  print(f'{_SIZE.value}, {jax.devices()[0].device_kind}, {len(turns)} turns')
  for name, p in programs.items():
    ratios = [t[name] / t['none'] - 1 for t in turns]
    mean = comparison.difference(ratios, np.zeros(len(turns)))
    print(
      f'{name:<24} step {statistics.median(ratios):+.1%} (95 % of the mean: '
      f'{mean.low:+.1%} .. {mean.high:+.1%}), state '
      f'{p.bytes / first.bytes:.2f} times'
    )


if __name__ == '__main__':
  cli.run(main)
