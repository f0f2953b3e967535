r"""What the training loop costs beside its bare step, and how fast the step is.

  python -m benchmarks.loop [--sizes=nano,tiny] [--num_steps=40]
  python -m benchmarks.loop --sizes=124m,350m,1b --batch_size=32 \
      --seq_len=1024   (on a GPU)

`bare` are steps on one batch that the device has, waited for at the end. `loop`
is launch.train as it is: it reads every batch, writes every metric and saves at
the first step and every --save_every (asynchronously, all of the state); its
times are those of metrics.jsonl, from the first step to the last. Neither has
compilation, evaluation or the last save. They take turns; ratios are those of a
turn. FLOPs are 6 per parameter of the matrices and token and the attention
products (`lm.model.flops_per_token`), whatever is computed again. Their rate
is divided by the peak in bfloat16 of all devices (MFU) or, where that is not
known, as on a CPU, by the rate of a product of large matrices in the model's
dtype.
"""

import contextlib
import io
import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import results
from configs import base
from launch import cli
from lm import loop, mesh, model, step

_SIZES = flags.DEFINE_list('sizes', ['nano', 'tiny'], 'of configs/sizes.py')
_BATCH = flags.DEFINE_integer('batch_size', 0, "0 = the size's own", 0)
_SEQ_LEN = flags.DEFINE_integer('seq_len', 0, "0 = the size's own", 0)
_STEPS = flags.DEFINE_integer('num_steps', 40, 'of each turn', 4)
_SAVE = flags.DEFINE_integer('save_every', 20, 'steps between saves', 1)
_TURNS = flags.DEFINE_integer('turns', 5, 'of bare steps and loop', 1)
_SIDE = 4096  # of the matrices whose product stands for the peak


def get_config(size: str):
  config = base.get_config(f'size={size}')
  config.batch_size = _BATCH.value or config.batch_size
  config.seq_len = _SEQ_LEN.value or config.seq_len
  config.num_steps, config.eval.every_steps = _STEPS.value, 0
  config.checkpoint.every_steps = _SAVE.value
  return config


def bare(config, built) -> float:
  """Returns seconds per step."""
  with jax.set_mesh(built.mesh):
    state, traced, batch = built.init(), step.floats(config), built.batch(0)
    state, _ = jax.block_until_ready(built.train_step(state, batch, traced))
    begin = time.perf_counter()
    for _ in range(_STEPS.value):
      state, metrics = built.train_step(state, batch, traced)
    jax.block_until_ready((state, metrics))
  return (time.perf_counter() - begin) / _STEPS.value


def looped(config, earlier) -> float:
  """Returns seconds per step of a run, from its own log."""
  with tempfile.TemporaryDirectory() as folder:
    run = pathlib.Path(folder) / 'run'
    with contextlib.redirect_stdout(io.StringIO()):
      loop.train(config, str(run), earlier)
    text = (run / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  rates = [x.get('throughput/tokens_per_second') for x in lines]
  tokens = config.batch_size * config.seq_len
  return statistics.fmean(tokens / rate for rate in rates if rate)


def product_rate(dtype: str) -> float:
  """Returns FLOP/s of a product: the best of five."""
  x = jnp.ones((_SIDE, _SIDE), dtype)
  multiply = jax.jit(jnp.dot)
  seconds = []
  for _ in range(6):
    begin = time.perf_counter()
    jax.block_until_ready(multiply(x, x))
    seconds.append(time.perf_counter() - begin)
  return 2 * _SIDE**3 / min(seconds[1:])


@results.entry('training loop and utilization')
def main() -> None:
  peak = mesh.peak_flops()
  limit = 'MFU' if peak else 'FLOP/s over those of a product'
  print(
    f'{_TURNS.value} turns of {_STEPS.value} steps, saved every {_SAVE.value}\n'
    f'\n| size | tokens a step | bare step, ms | {limit} | loop / bare |\n'
    '| --- | --- | --- | --- | --- |'
  )
  for size in _SIZES.value:
    config, earlier = get_config(size), {}
    looped(config, earlier)  # compiles
    (built,) = earlier.values()
    pairs, used = [], []
    tokens = config.batch_size * config.seq_len
    flops = tokens * model.flops_per_token(config.model, config.seq_len)
    for _ in range(_TURNS.value):
      alone = bare(config, built)
      pairs.append((alone, looped(config, earlier)))
      used.append(flops / alone / (peak or product_rate(config.model.dtype)))
    print(
      f'| {size} | {tokens:,} | {results.spread([1e3 * a for a, _ in pairs])} '
      f'| {results.spread(used)} | {results.spread([b / a for a, b in pairs])} '
      '|',
      flush=True,
    )


if __name__ == '__main__':
  cli.run(main)
