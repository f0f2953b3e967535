"""Speed of optimizer steps against the memory, Optax and matrix products.

  python -m benchmarks.optimizers --size=small     (14M parameters)
  python -m benchmarks.optimizers --size=124m --together=4      (24 GiB)

One process, one table of ratios. All programs take turns `--repeats` times;
reported are the median and, as the spread, the quartiles. Element-wise methods
are compared with the time in which this machine moves the bytes that they
cannot avoid (4 per parameter for each read of gradient, parameter and moments
and each write of parameter and moments; one more read for a global norm), at
the rate of x <- x + a y over arrays of the same shapes. Muon is compared with
optax.contrib.muon on the same matrices; its GFLOP/s count the products of the
direct form, also for the Gram form, which needs fewer. On Linux, fresh memory
costs less with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.
"""

import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from configs import base
from lm import model, spec
from optimizers.parts import roles

_SIZE = flags.DEFINE_string('size', 'small', 'a size of configs/sizes.py')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'turns of each program')
_TOGETHER = flags.DEFINE_integer(
  'together', 18, 'programs that take turns, and are in memory', 1
)
_ONLY = flags.DEFINE_list('only', [], 'names of rows; empty = all')
_CLOCK = flags.DEFINE_enum(
  'clock', 'wall', ['wall', 'cpu'], 'cpu: CPU seconds, if others work here too'
)

# name -> reads and writes of arrays of the parameters' size, without clipping
_PASSES = {'adamw': 7, 'lion': 5, 'signum': 5}


def programs(axes):
  """Returns name -> (transformation, unavoidable passes or None)."""
  found = {}
  for name, passes in _PASSES.items():
    for mode in ('decoupled', 'cautious'):
      make = spec.get('optimizers', name)
      tx = functools.partial(make, axes=axes, decay=mode)
      label = name if mode == 'decoupled' else f'{name} {mode}'
      found[label] = (tx, passes)
      found[f'clip + {label}'] = (_clipped(tx), passes + 1)
  found['optax adamw'] = (optax.adamw, 7)
  found['optax lion'] = (optax.lion, 5)
  found['clip + optax adamw'] = (_optax_clipped(optax.adamw), 8)
  found['clip + optax lion'] = (_optax_clipped(optax.lion), 6)
  return found


def muons(axes):
  """Ours and Optax's; both get the matrices only, by their dimensions."""
  numbers = jax.tree.map(
    lambda a: optax.contrib.MuonDimensionNumbers(a.inputs, a.outputs), axes
  )
  ours = functools.partial(spec.get('optimizers', 'muon'), axes=axes)
  theirs = functools.partial(
    optax.contrib.muon, muon_weight_dimension_numbers=numbers
  )
  gram = functools.partial(ours, ns_form='gram')
  return {'muon': ours, 'muon gram': gram, 'optax muon': theirs}


def _clipped(make):
  """Scales by a number, as lm/step.py does: XLA fuses it into the moments.

  optax.clip_by_global_norm divides, so XLA writes the clipped gradient.
  """

  def make_clipped(lr):
    tx = make(lr)

    def update(grads, state, params):
      scale = jnp.minimum(1.0, 1.0 / (optax.tree.norm(grads) + 1e-6))
      return tx.update(jax.tree.map(lambda g: scale * g, grads), state, params)

    return optax.GradientTransformation(tx.init, update)

  return make_clipped


def _optax_clipped(make):
  return lambda lr: optax.chain(optax.clip_by_global_norm(1.0), make(lr))


class Program:
  """A compiled step with its own buffers, updated in place."""

  def __init__(self, make, params):
    def step(params, state, grads, lr):
      updates, state = make(lr).update(grads, state, params)
      return optax.apply_updates(params, updates), state

    self.params = jax.tree.map(jnp.copy, params)
    self.state = make(1e-3).init(self.params)
    self.step = jax.jit(step, donate_argnums=(0, 1))

  def __call__(self, grads):
    clock = time.process_time if _CLOCK.value == 'cpu' else time.perf_counter
    start = clock()
    self.params, self.state = self.step(self.params, self.state, grads, 1e-3)
    jax.block_until_ready(self.params)
    return clock() - start


def _triad(_):
  """x <- x + a y: three passes, what the memory can do."""
  return optax.scale(1e-3)


def measure(makes, params, grads, repeats):
  """Returns name -> seconds of each turn; the programs take turns."""
  seconds = {name: [] for name in makes}
  running = {name: Program(make, params) for name, make in makes.items()}
  for i in range(repeats + 2):  # two turns to compile and to warm up
    for name, program in running.items():
      elapsed = program(grads)
      if i >= 2:
        seconds[name].append(elapsed)
  return seconds


def _row(name, seconds, limit):
  low, median, high = statistics.quantiles(seconds, n=4)
  return (
    f'| {name} | {1e3 * median:.1f} | {1e3 * low:.1f} - {1e3 * high:.1f} '
    f'| {median / limit:.2f} |'
  )


def main(argv):
  del argv
  built = model.build(base.get_config(f'size={_SIZE.value}').model)
  abstract = jax.eval_shape(built.init, jax.random.key(0))
  grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), abstract)
  params = jax.tree.map(lambda x: jnp.ones(x.shape), abstract)
  count = sum(x.size for x in jax.tree.leaves(params))
  print(f'{count:,} parameters, {jax.default_backend()}, jax {jax.__version__}')
  print('GLIBC_TUNABLES=' + os.environ.get('GLIBC_TUNABLES', ''), '\n')
  wanted = lambda name: not _ONLY.value or name in _ONLY.value

  rows = {k: v for k, v in programs(built.axes).items() if wanted(k)}
  print('| step | ms | quartiles | times its memory limit |')
  print('| --- | --- | --- | --- |')
  for i in range(0, len(rows), _TOGETHER.value):
    names = list(rows)[i : i + _TOGETHER.value]
    makes = {'triad': _triad, **{k: rows[k][0] for k in names}}
    seconds = measure(makes, params, grads, _REPEATS.value)
    triad = statistics.median(seconds['triad'])
    print(_row('triad', seconds['triad'], triad))
    for name in names:
      print(_row(name, seconds[name], triad * rows[name][1] / 3), flush=True)

  flat = zip(jax.tree.leaves(grads), jax.tree.leaves(built.axes), strict=True)
  matrices = [(g, a) for g, a in flat if a.role == 'matrix']
  grads = [jnp.sin(jnp.arange(g.size)).reshape(g.shape) for g, _ in matrices]
  axes = [a for _, a in matrices]
  makes = {k: v for k, v in muons(axes).items() if wanted(k)}
  if not makes:
    return
  seconds = measure(makes, grads, grads, max(3, _REPEATS.value // 2))
  print('\n| step on the matrices | ms | quartiles | GFLOP/s |')
  print('| --- | --- | --- | --- |')
  flops = sum(_newton_schulz_flops(g.shape, a) for g, a in matrices)
  for name, s in seconds.items():
    rate = flops / statistics.median(s) / 1e9
    print(_row(name, s, statistics.median(s) / rate))


def _newton_schulz_flops(shape, axes):
  x = jax.eval_shape(
    lambda x: roles.to_matrices(x, axes), jax.ShapeDtypeStruct(shape, 'float32')
  )
  b, m, n = x.shape[0], min(x.shape[1:]), max(x.shape[1:])
  return 5 * b * (4 * m * m * n + 2 * m**3)


if __name__ == '__main__':
  app.run(main)
