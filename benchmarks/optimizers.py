"""Speed of optimizer steps against the memory, Optax and matrix products.

  python -m benchmarks.optimizers --size=small     (14M parameters)
  python -m benchmarks.optimizers --size=124m --together=4      (24 GiB)

One process. All programs of a group take `--repeats` turns, in another order
each; ratios are those of a turn, with their range. Element-wise methods are
compared with the time in which this machine moves the bytes that they cannot
avoid (4 per parameter for each read of gradient, parameter and moments and each
write of parameter and moments; one more read for a global norm; one more of
gradient and momentum where C-AdamW and C-Lion count what agrees), at the rate
of x <- x + a y, over arrays of the same shapes or one array, the faster of both
in that turn. Optax's AdamW is in every group: groups with other numbers for it
cannot be compared. Muon is compared with optax.contrib.muon on the same
matrices and with the full products of Newton-Schulz alone, one matrix after the
other or batched, whichever is faster: both forms of ours leave products out.
GFLOP/s count those full products. On Linux, fresh memory costs less with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1.
"""

import collections
import functools
import os
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
from lm import model, spec
from lm.errors import UserError, did_you_mean
from optimizers.parts import roles

_SIZE = flags.DEFINE_string('size', 'small', 'a size of configs/sizes.py')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'turns of each program', 1)
_TOGETHER = flags.DEFINE_integer(
  'together', 18, 'programs that take turns, and are in memory', 1
)
_SCAN = flags.DEFINE_bool('scan', False, 'all layers in one array')
_ONLY = flags.DEFINE_list('only', [], 'names of rows; empty = all')
_CLOCK = flags.DEFINE_enum(
  'clock', 'wall', ['wall', 'cpu'], 'cpu: CPU seconds, if others work here too'
)

# name -> reads and writes of arrays of the parameters' size, without clipping
# ('NAME' or 'NAME DECAY'; C-AdamW and C-Lion count what agrees)
_PASSES = {
  **dict.fromkeys(('adamw', 'adamw cautious'), 7),
  **dict.fromkeys(('lion', 'lion cautious', 'signum', 'signum cautious'), 5),
  'cautious_adamw': 9,
  'cautious_lion': 7,
}
_CONTROL = 'optax adamw'


def programs(axes):
  """Returns name -> (transformation, unavoidable passes or None)."""
  found = {}
  for label, passes in _PASSES.items():
    name, _, mode = label.partition(' ')
    make = spec.get('optimizers', name)
    tx = functools.partial(make, axes=axes, decay=mode or 'decoupled')
    found[label] = (tx, passes)
    found[f'clip + {label}'] = (_clipped(tx), passes + 1)
  found[_CONTROL] = (optax.adamw, 7)
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
    start = _now()
    self.params, self.state = self.step(self.params, self.state, grads, 1e-3)
    jax.block_until_ready(self.params)
    return _now() - start


class Products:
  """The products of Newton-Schulz alone, on stacks shaped as Muon's."""

  def __init__(self, stacks, in_turn):
    def chain(x):
      for _ in range(5):
        gram = x @ x.mT
        x = gram @ gram @ x
      return x

    one = functools.partial(jax.lax.map, chain) if in_turn else chain
    self.stacks = stacks
    self.step = jax.jit(lambda xs: [one(x) for x in xs], donate_argnums=0)

  def __call__(self, _):
    stacks = jax.block_until_ready([jnp.copy(x) for x in self.stacks])
    start = _now()
    jax.block_until_ready(self.step(stacks))
    return _now() - start


def _now():
  return time.process_time() if _CLOCK.value == 'cpu' else time.perf_counter()


def orthogonal_stacks(matrices):
  """Matrices of equal shape in a stack each; their products stay bounded."""
  count = collections.Counter()
  for g, axes in matrices:
    turn = functools.partial(roles.to_matrices, axes=axes)
    b, *sides = jax.eval_shape(turn, g).shape
    count[tuple(sorted(sides))] += b
  rng = np.random.default_rng(0)
  found = []
  for (m, n), b in count.items():
    x_NM, _ = np.linalg.qr(rng.standard_normal((n, m), np.float32))
    found.append(jnp.tile(x_NM.T, (b, 1, 1)))
  return found


def _triad(_):
  """x <- x + a y: three passes, what the memory can do."""
  return optax.scale(1e-3)


def measure(running, grads, repeats):
  """Returns name -> seconds of each turn; the programs take turns."""
  seconds = {name: [] for name in running}
  order = np.random.default_rng(0)
  for i in range(repeats + 2):  # two turns to compile and to warm up
    for name in order.permutation(list(running)).tolist():
      elapsed = running[name](grads)
      if i >= 2:
        seconds[name].append(elapsed)
  return seconds


def _row(name, seconds, *more):
  median = f'{1e3 * statistics.median(seconds):.1f}'
  return f'| {name} | {median} | {" | ".join(more)} |'


def _ratio(a, b):
  """Median and range of the ratios within a turn."""
  return results.spread([x / y for x, y in zip(a, b, strict=True)])


def elementwise(rows, params, grads):
  """Prints a row for each of name -> (transformation, passes)."""
  print('| step | ms | times its memory limit |')
  print('| --- | --- | --- |')
  mine = [name for name in rows if name != _CONTROL]
  one = [jnp.ones(sum(x.size for x in jax.tree.leaves(params)))]
  for i in range(0, len(mine), _TOGETHER.value):
    found = {k: rows[k] for k in mine[i : i + _TOGETHER.value]}
    found[_CONTROL] = (optax.adamw, 7)
    makes = {'triad': _triad, **{k: make for k, (make, _) in found.items()}}
    running = {k: Program(make, params) for k, make in makes.items()}
    whole = Program(_triad, one)
    running['triad, one array'] = lambda _, whole=whole: whole(one)
    seconds = measure(running, grads, _REPEATS.value)
    triads = {k: x for k, x in seconds.items() if 'triad' in k}
    best = [min(turn) for turn in zip(*triads.values(), strict=True)]
    for name, x in triads.items():
      print(_row(name, x, _ratio(x, best)))
    for name, (_, passes) in found.items():
      limit = [x * passes / 3 for x in best]
      print(_row(name, seconds[name], _ratio(seconds[name], limit)), flush=True)


def on_matrices(makes, matrices):
  """Prints the rows of Muon beside the products alone."""
  stacks = orthogonal_stacks(matrices)
  grads = [jnp.sin(jnp.arange(g.size)).reshape(g.shape) for g, _ in matrices]
  alone = {
    'products, in turn': Products(stacks, True),
    'products, batched': Products(stacks, False),
  }
  running = {**alone, **{k: Program(v, grads) for k, v in makes.items()}}
  seconds = measure(running, grads, max(5, _REPEATS.value // 2))
  best = min((seconds[name] for name in alone), key=statistics.median)
  shapes = [x.shape for x in stacks]
  flops = sum(5 * b * (4 * m * m * n + 2 * m**3) for b, m, n in shapes)
  print('\n| step on the matrices | ms | GFLOP/s', end=' ')
  print('| full products / it | optax muon / it |')
  print('| --- | --- | --- | --- | --- |')
  for name, s in seconds.items():
    rate = f'{flops / statistics.median(s) / 1e9:.1f}'
    theirs = seconds.get('optax muon') if name in makes else None
    ratio = _ratio(theirs, s) if theirs else ''
    print(_row(name, s, rate, _ratio(best, s), ratio))


@results.entry('optimizer steps')
def main() -> None:
  config = base.get_config(f'size={_SIZE.value}').model
  config.scan_layers |= _SCAN.value
  built = model.build(config)
  abstract = jax.eval_shape(built.init, jax.random.key(0))
  grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), abstract)
  params = jax.tree.map(lambda x: jnp.ones(x.shape), abstract)
  count = sum(x.size for x in jax.tree.leaves(params))
  print(f'{count:,} parameters, {jax.default_backend()}, jax {jax.__version__}')
  print('GLIBC_TUNABLES=' + os.environ.get('GLIBC_TUNABLES', ''), '\n')
  flat = zip(
    jax.tree.leaves(abstract), jax.tree.leaves(built.axes), strict=True
  )
  matrices = [(g, a) for g, a in flat if a.role == 'matrix']
  every = programs(built.axes), muons([a for _, a in matrices])
  for name in _ONLY.value:
    if not any(name in each for each in every):
      hint = did_you_mean(name, [*every[0], *every[1]])
      raise UserError(f"--only: '{name}' is not a row.{hint}")
  wanted = lambda name: not _ONLY.value or name in _ONLY.value
  rows, makes = ({k: v for k, v in e.items() if wanted(k)} for e in every)
  if rows:
    elementwise(rows, params, grads)
  del params, grads
  if makes:
    on_matrices(makes, matrices)


if __name__ == '__main__':
  cli.run(main)
