r"""Where the time of a training step goes on a CPU, operation by operation.

  python -m benchmarks.step_profile [--size=tiny] [--steps=6] [--top=20]

Takes the step of launch.train under `jax.profiler` and sums the events of each
operation of the compiled program. Operations run beside each other, and a
matrix product uses several threads within one event, so the sums are not parts
of the step. `alone` is a product of the same shapes in a program of its own.
The sum of these, as often as the step has them, is about the least that a step
can take with the matrix products of this library.
"""

import collections
import functools
import pathlib
import re
import statistics
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import results
from configs import base
from launch import cli
from lm import loop, step

_SIZE = flags.DEFINE_string('size', 'tiny', 'of configs/sizes.py')
_STEPS = flags.DEFINE_integer('steps', 6, 'under the profiler', 1)
_TOP = flags.DEFINE_integer('top', 20, 'lines of the longer table', 1)


class Product(NamedTuple):
  """A dot of the program: shapes of its sides, dimension numbers."""

  left: tuple[int, ...]
  right: tuple[int, ...]
  contract: tuple[tuple[int, ...], tuple[int, ...]]
  batch: tuple[tuple[int, ...], tuple[int, ...]]

  def flops(self) -> float:
    """2 x elements of the left side x columns of the right side."""
    shared = {*self.contract[1], *self.batch[1]}
    free = [n for i, n in enumerate(self.right) if i not in shared]
    return 2.0 * np.prod(self.left) * np.prod(free)


def operations(text: str) -> dict[str, tuple[str, Product | None]]:
  """Name of each operation of a program -> what it is, its product if any."""
  bodies, found = {}, {}
  for block in re.split(r'\n\n+', text):
    head = re.match(r'\s*(?:ENTRY )?%?([\w.\-]+) \(', block)
    if head:
      bodies[head[1]] = block
  for block in bodies.values():
    for line in block.splitlines()[1:]:
      name = re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = ', line)
      if name:
        called = re.search(r'kind=\w+, calls=%?([\w.\-]+)', line)
        inner = bodies.get(called[1], '') if called else line
        around = inner if called else block
        found[name[1]] = _what(inner, name[1]), _product(inner, around)
  return found


def _what(text: str, name: str) -> str:
  if ' dot(' in text:
    return 'product'
  if re.search(r' reduce(-window)?\(', text):
    return 'sum over an axis'
  moved = re.search(r'copy|transpose|slice|concatenate|pad|bitcast', name)
  computed = re.search(r'add|multiply|divide|select|exponential|sub|log', name)
  return 'copy' if moved and not computed else 'element by element'


def _product(text: str, around: str) -> Product | None:
  line = next((x for x in text.splitlines() if ' dot(' in x), None)
  if line is None:
    return None
  sides = []
  for operand in re.search(r' dot\((.*?)\)', line)[1].split(', '):
    name = re.escape(operand.split('%')[-1])
    shape = re.search(rf'%?{name} = f32\[([\d,]*)\]', around)
    sides.append(_numbers(shape[1]) if shape else None)
  if None in sides:
    return None
  dims = lambda key: _numbers(
    (re.search(key + r'={([\d,]*)}', line) or '  ')[1]
  )
  pair = lambda key: (dims('lhs_' + key), dims('rhs_' + key))
  return Product(*sides, pair('contracting_dims'), pair('batch_dims'))


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(x) for x in text.split(',') if x.strip())


def alone(product: Product) -> float:
  """Seconds of the product in a program of its own: median of 20."""
  dims = product.contract, product.batch
  multiply = functools.partial(jax.lax.dot_general, dimension_numbers=dims)
  function = jax.jit(multiply)
  sides = jnp.ones(product.left), jnp.ones(product.right)
  times = []
  for _ in range(21):
    begin = time.perf_counter()
    function(*sides).block_until_ready()
    times.append(time.perf_counter() - begin)
  return statistics.median(times[1:])


def traced_steps(take, steps: int) -> tuple[float, dict[str, list[float]]]:
  """Returns seconds per step, and of each event's name its durations."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      begin = time.perf_counter()
      for _ in range(steps):
        take()
      wall = (time.perf_counter() - begin) / steps
    (file,) = pathlib.Path(folder).rglob('*.xplane.pb')
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = collections.defaultdict(list)
    for plane in planes:
      for line in plane.lines:
        for event in line.events:
          events[event.name].append(event.duration_ns / 1e9)
  return wall, events


@results.entry('operations of a training step')
def main() -> None:
  config = base.get_config(f'size={_SIZE.value}')
  built = loop.build(config)
  state, floats = built.init(), step.floats(config)
  tokens = built.data.train.batch(0)
  program = built.train_step.lower(state, tokens, floats).compile()

  def take():
    nonlocal state
    state, metrics = program(state, tokens, floats)
    metrics['train/loss'].block_until_ready()

  take()
  wall, events = traced_steps(take, _STEPS.value)
  known = operations(program.as_text())
  kinds = collections.defaultdict(list)
  products = collections.defaultdict(list)
  for name, durations in events.items():
    if name in known:
      kind, product = known[name]
      kinds[kind] += durations
      if product:
        products[product] += durations
  report(wall, kinds, products)


def report(wall, kinds, products) -> None:
  steps = _STEPS.value
  per_step = lambda durations: 1e3 * sum(durations) / steps
  print(f'{_SIZE.value}: {1e3 * wall:.0f} ms per step under the profiler\n')
  print('| operations | sum of times, ms | a step |\n| --- | --- | --- |')
  for kind in sorted(kinds, key=lambda k: -per_step(kinds[k])):
    count = len(kinds[kind]) / steps
    print(f'| {kind} | {per_step(kinds[kind]):.0f} | {count:.0f} |')
  rows = []
  for product, durations in products.items():
    count = len(durations) / steps
    rows.append((alone(product), count, product))
  rows.sort(key=lambda r: -r[0] * r[1])
  total = sum(t * n for t, n, _ in rows)
  flops = sum(n * p.flops() for _, n, p in rows)
  print(
    f'\n{len(rows)} shapes of products, {flops / 1e9:.1f} GFLOP: alone '
    f'{1e3 * total:.0f} ms, {total / wall:.2f} of the step\n'
  )
  print(
    '| left | right | a step | time in the step, ms | alone, ms | alone, '
    'GFLOP/s |\n| --- | --- | --- | --- | --- | --- |'
  )
  for seconds, count, product in rows[: _TOP.value]:
    print(
      f'| {_sides(product)} | {count:.0f} | {per_step(products[product]):.1f} '
      f'| {1e3 * seconds * count:.1f} | {product.flops() / seconds / 1e9:.0f} |'
    )


def _sides(product) -> str:
  """Both shapes; a contracted dimension has a star."""
  out = []
  pairs = zip(product[:2], product.contract, strict=True)
  for shape, contracted in pairs:
    marked = [
      f'{n}*' if i in contracted else f'{n}' for i, n in enumerate(shape)
    ]
    out.append(' x '.join(marked))
  return ' | '.join(out)


if __name__ == '__main__':
  cli.run(main)
