"""Every optimizer on the same small byte-level model, as one table.

  python -m benchmarks.optimizer_table [--only=muon,lion] [--write]

Each file of optimizers/ trains at its default config and at each of --rates
(units differ from method to method: the best one is reported, too), on the same
batches. No method is tuned further, so the losses say that a method works, not
which one is best. Steps per second are measured in turns; the state is counted
at 124M parameters, where its fixed parts vanish. --write puts the table on top
of benchmarks/RESULTS.md.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np
from absl import flags

from benchmarks import results
from configs import base
from launch import cli
from lm import loop, model, spec, state, step

_ONLY = flags.DEFINE_list('only', [], 'names of optimizers; empty = all')
_SIZE = flags.DEFINE_string('size', 'nano', 'a byte-level size')
_BATCH = flags.DEFINE_integer('batch_size', 4, 'sequences per update', 1)
_STEPS = flags.DEFINE_integer('num_steps', 150, 'updates per run', 20)
_RATES = flags.DEFINE_list('rates', ['.001', '.01', '.1', '1'], 'peaks tried')
_TURNS = flags.DEFINE_integer('turns', 7, 'turns of 10 steps, for the speed', 1)

_LAST = 10  # the final loss is the mean over as many steps


@dataclasses.dataclass
class Row:
  name: str
  losses: dict[str, float]  # 'default' or a rate as written -> final loss
  bytes_per_parameter: float
  turns: list[float] = dataclasses.field(default_factory=list)

  @property
  def rate(self) -> str:
    return min(self.losses, key=lambda r: np.nan_to_num(self.losses[r], nan=99))


class Trainer:
  """A run without files: the training step and its batches."""

  def __init__(self, name: str) -> None:
    c = base.get_config(f'size={_SIZE.value},optimizer={name}')
    c.num_steps, c.batch_size = _STEPS.value, _BATCH.value
    c.checkpoint.mean = False
    self.config, self.built = c, loop.build(c)
    self.traced = step.floats(c)
    self.current = None

  def start(self, rate: float) -> None:
    self.current = self.built.init()
    self.traced = {**self.traced, 'learning_rate': rate}

  def step(self, n: int) -> jax.Array:
    self.current, metrics = self.built.train_step(
      self.current, self.built.batch(n), self.traced
    )
    return metrics['train/loss']


def unigram_entropy(trainer: Trainer) -> float:
  """Returns the entropy in nats of the bytes that a run of all steps sees."""
  seen = np.concatenate(
    [trainer.built.data.train.batch(n).ravel() for n in range(_STEPS.value)]
  )
  p = np.bincount(seen) / seen.size
  return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


def bytes_per_parameter(name: str) -> float:
  """Returns the size of the optimizer's state at 124M, unallocated."""
  c = base.get_config(f'size=124m,optimizer={name}')
  abstract = jax.eval_shape(
    lambda: state.init(c, model.build(c.model), jax.random.key(0))
  )
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  held = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.opt_state)
  )
  return held / size(abstract.params)


def _final_loss(trainer, rate):
  trainer.start(rate)
  losses = [trainer.step(n) for n in range(_STEPS.value)]
  return float(np.mean(jax.device_get(losses[-_LAST:])))


def _turn(trainer, n):
  begin = time.perf_counter()
  for i in range(n, n + 10):
    loss = trainer.step(i)
  jax.block_until_ready(loss)
  return 10 / (time.perf_counter() - begin)


def measure(names: list[str]) -> tuple[list[Row], float]:
  """Returns a row per optimizer, and the unigram entropy of the data."""
  rows, trainers = [], []
  for name in names:
    trainer = Trainer(name)
    with jax.set_mesh(trainer.built.mesh):
      rates = {'default': trainer.config.learning_rate}
      rates |= {rate: float(rate) for rate in _RATES.value}
      losses = {k: _final_loss(trainer, rate) for k, rate in rates.items()}
    row = Row(name, losses, bytes_per_parameter(name))
    print(f'{name}: {row.losses}', file=sys.stderr, flush=True)
    rows.append(row)
    trainers.append(trainer)
  for i in range(_TURNS.value):
    for row, trainer in zip(rows, trainers, strict=True):
      with jax.set_mesh(trainer.built.mesh):
        row.turns.append(_turn(trainer, 10 * i))
  return rows, unigram_entropy(trainers[0])


def table(rows: list[Row], entropy: float) -> str:
  """Formats the rows; ratios are to adamw, or to the first row without it."""
  first = next((r for r in rows if r.name == 'adamw'), rows[0])
  lines = [
    f'| optimizer | steps/s, times {first.name} | final loss, default rate '
    '| the best | at rate '
    '| state bytes per parameter |',
    '| --- | --- | --- | --- | --- | --- |',
  ]
  for r in rows:
    speed = statistics.median(
      a / b for a, b in zip(r.turns, first.turns, strict=True)
    )
    above = '' if r.losses['default'] < entropy else ' (above!)'
    lines.append(
      f'| {r.name} | {speed:.2f} | {r.losses["default"]:.3f}{above} '
      f'| {r.losses[r.rate]:.3f} | {r.rate} '
      f'| {r.bytes_per_parameter:.2f} |'
    )
  return '\n'.join(lines)


@results.entry('every optimizer')
def main() -> None:
  names = _ONLY.value or spec.names('optimizers')
  rows, entropy = measure(names)
  print(
    'Default configs, and the best of the rates '
    f'{", ".join(["default", *_RATES.value])}. The unigram entropy of the data '
    f'is {entropy:.3f} nats.\n\n' + table(rows, entropy)
  )


if __name__ == '__main__':
  cli.run(main)
