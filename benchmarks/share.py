r"""Each optimizer's update beside the gradient: what share of a step it takes.

  python -m benchmarks.share [--size=small] [--batch_size=4] [--only=muon]
  python -m benchmarks.share --size=124m --batch_size=32      (on a GPU)

`update` clips, runs the optimizer at its default config and adds the result, as
lm/step.py does; the mean of --updates in a row, as some methods do more in some
steps. `gradient` is the loss and its gradient; a run also logs norms and keeps
a mean. They take turns, optimizer by optimizer, so that one state is in memory;
medians and ranges. `over its bytes` is the update over the time in which x <- x
+ a y, in the same turn, moves what it cannot avoid: gradients twice (the norm),
parameters and state read and written; products are not in it, and it means
nothing where arrays fit into caches. A share is
update / (update + gradient): at the measured tokens and, computed from that, at
0.5M, where the gradient takes longer in proportion and the update does not. In
float32 on a CPU.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks import results
from configs import base
from launch import cli
from lm import model, spec, state, step

_SIZE = flags.DEFINE_string('size', 'small', 'of configs/sizes.py')
_BATCH = flags.DEFINE_integer('batch_size', 4, 'sequences per gradient', 1)
_TURNS = flags.DEFINE_integer('turns', 5, 'of gradient and updates', 2)
_UPDATES = flags.DEFINE_integer('updates', 10, 'of each turn', 1)
_ONLY = flags.DEFINE_list('only', [], 'names of optimizers; empty = all')
_LARGE = 500_000  # tokens of the step in the last column


def get_config(name: str):
  config = base.get_config(f'size={_SIZE.value},optimizer={name}')
  config.batch_size, config.checkpoint.mean = _BATCH.value, False
  if jax.default_backend() == 'cpu':
    config.model.dtype = 'float32'
  return config


def update(config, axes, held, grads, traced):
  """The part of lm/step.py behind the gradient."""
  params, opt_state = held
  hook = functools.partial(step._hook, config, traced)
  params = hook('train_params', opt_state, params)
  tx = state.optimizer(config, axes, traced['learning_rate'], traced)
  clipped = step._clipped(grads, optax.tree.norm(grads), traced)
  updates, opt_state = tx.update(clipped, opt_state, params)
  params = optax.apply_updates(params, updates)
  return hook('eval_params', opt_state, params), opt_state


def seconds(function) -> float:
  begin = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - begin


class Updates:
  """An optimizer with its own parameters and state, updated in place."""

  def __init__(self, name, net, params):
    config = get_config(name)
    init = jax.jit(functools.partial(state.init, config, net))
    start = init(jax.random.key(0), params)
    self._held = start.params, start.opt_state
    self._traced = step.floats(config)
    one = functools.partial(update, config, net.axes)
    self._update = jax.jit(one, donate_argnums=0)
    # Of gradient and parameters two passes each, of the state two.
    self.bytes = 2 * (_bytes(params) + _bytes(self._held))

  def __call__(self, grads):
    for _ in range(_UPDATES.value):
      self._held = self._update(self._held, grads, self._traced)
    return self._held


def turns_of(name, net, params, gradient):
  """Returns (seconds of an update, of a gradient, of bytes) of each turn."""
  updates = Updates(name, net, params)
  grads = gradient()
  add = lambda x, y: jax.tree.map(lambda x, y: x + 1e-3 * y, x, y)
  add, held = jax.jit(add, donate_argnums=0), jax.tree.map(jnp.copy, params)

  def triad():
    nonlocal held
    held = add(held, grads)
    return held

  passes, turns = updates.bytes / _bytes(params), []
  for _ in range(_TURNS.value + 1):
    taken = seconds(lambda: updates(grads)) / _UPDATES.value
    turns.append((taken, seconds(gradient), seconds(triad) * passes / 3))
  return turns[1:]  # the first compiles


def _bytes(tree) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@results.entry('share of the optimizer')
def main() -> None:
  config = get_config('adamw')
  net = model.build(config.model)
  params = jax.block_until_ready(net.init(jax.random.key(0)))
  shape = config.batch_size, config.seq_len + 1
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(config.model.vocab_size, size=shape))
  whole = functools.partial(step._gradient, config, net, None)
  take = jax.jit(lambda *args: whole(*args)[0])
  gradient = lambda: take(step.floats(config), tokens, params)
  count = config.batch_size * config.seq_len
  print(f'{_SIZE.value}, {count:,} tokens, {_TURNS.value} turns\n')
  print(
    '| optimizer | update, ms | over its bytes | gradient, ms '
    f'| share at {count:,} tokens | computed: at 0.5M |\n'
    '| --- | --- | --- | --- | --- | --- |'
  )
  for name in _ONLY.value or spec.names('optimizers'):
    turns = turns_of(name, net, params, gradient)
    columns = (
      [1e3 * u for u, _, _ in turns],
      [u / moved for u, _, moved in turns],
      [1e3 * g for _, g, _ in turns],
    )
    spread = ' | '.join(map(results.spread, columns))
    small, large = _share(turns, 1), _share(turns, _LARGE / count)
    print(f'| {name} | {spread} | {small:.1%} | {large:.2%} |', flush=True)


def _share(turns, tokens):
  return statistics.median(u / (u + tokens * g) for u, g, _ in turns)


if __name__ == '__main__':
  cli.run(main)
