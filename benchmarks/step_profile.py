r"""Where the time of a training step goes on a CPU, operation by operation.

  python -m benchmarks.step_profile --config=configs/base.py:size=tiny

Takes the step of launch.train under `jax.profiler` and sums the time of each
operation of the compiled program, without that of operations inside. All of it
on one core: on several a product's event ends when others have begun to work on
it. `covered` is what the sums are of the step, 1 if nothing is missed. `alone`
is a product of the same shapes in a program of its own, on the same core: all
of them, as often as the step has them, are about the least that a step can take
with the matrix products of this library. `alone / step` is in turns.
"""

import collections
import functools
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import results
from launch import cli
from lm import loop, step

_CONFIG = cli.define_config()
_STEPS = flags.DEFINE_integer('steps', 6, 'of each turn', 1)
_TURNS = flags.DEFINE_integer('turns', 5, 'steps, then products alone', 1)
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


def alone(product: Product) -> Callable[[], float]:
  """Returns a function: seconds of the product in a program of its own."""
  dims = product.contract, product.batch
  multiply = functools.partial(jax.lax.dot_general, dimension_numbers=dims)
  function = jax.jit(multiply)
  sides = jnp.ones(product.left), jnp.ones(product.right)
  function(*sides).block_until_ready()

  def seconds():
    times = []
    for _ in range(10):
      begin = time.perf_counter()
      function(*sides).block_until_ready()
      times.append(time.perf_counter() - begin)
    return statistics.median(times)

  return seconds


def traced_steps(take, steps: int) -> tuple[float, dict[str, list[float]]]:
  """Returns seconds per step, and of each event's name its times.

  Without those of events inside: a loop is not counted beside its body.
  """
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
        for name, nanoseconds in _own(line.events):
          events[name].append(nanoseconds / 1e9)
  return wall, events


def _own(events) -> Iterator[tuple[str, float]]:
  """Yields the name of each event of a thread, and its time of its own."""
  around = []  # [event, time of its own] of those that are not over
  for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
    while around and around[-1][0].end_ns <= event.start_ns:
      last, time_ns = around.pop()
      yield last.name, time_ns
    if around:
      around[-1][1] -= event.duration_ns
    around.append([event, event.duration_ns])
  for last, time_ns in around:
    yield last.name, time_ns


@results.entry('operations of a training step')
def main() -> None:
  if hasattr(os, 'sched_setaffinity'):  # before jax starts its threads
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
  else:
    print('This system keeps no program on one core: sums are not exact.')
  config = _CONFIG.value
  built = loop.build(config)
  state, floats = built.init(), step.floats(config)
  tokens = built.data.train.batch(0)
  program = built.train_step.lower(state, tokens, floats).compile()

  def take():
    nonlocal state
    state, metrics = program(state, tokens, floats)
    metrics['train/loss'].block_until_ready()

  take()
  known = operations(program.as_text())
  kinds = collections.defaultdict(list)
  products = collections.defaultdict(list)
  walls, lone, each = [], [], collections.defaultdict(list)
  for _ in range(_TURNS.value):
    wall, events = traced_steps(take, _STEPS.value)
    walls.append(wall)
    for name, durations in events.items():
      if name in known:
        kind, product = known[name]
        kinds[kind] += durations
        if product:
          products[product] += durations
    for product in products:
      each[product] = each[product] or [alone(product)]
      each[product].append(each[product][0]())
    counts = {
      p: len(d) / _STEPS.value / len(walls) for p, d in products.items()
    }
    lone.append(sum(each[p][-1] * n for p, n in counts.items()))
  report(walls, kinds, products, lone, {p: x[1:] for p, x in each.items()})


def report(walls, kinds, products, lone, each) -> None:
  """Prints both tables.

  Args:
    walls: seconds of a step, by turn.
    kinds, products: times of the operations of all steps.
    lone: seconds of the products of a step, alone, by turn.
    each: of each product the same of one, by turn.
  """
  steps = _STEPS.value * len(walls)
  per_step = lambda durations: 1e3 * sum(durations) / steps
  step_ms = 1e3 * statistics.mean(walls)
  covered = sum(map(per_step, kinds.values())) / step_ms
  print(f'{step_ms:.0f} ms a step under the profiler, {covered:.2f} covered\n')
  print('| operations | ms | of the step | a step |')
  print('| --- | --- | --- | --- |')
  for kind in sorted(kinds, key=lambda k: -per_step(kinds[k])):
    count, ms = len(kinds[kind]) / steps, per_step(kinds[kind])
    print(f'| {kind} | {ms:.1f} | {ms / step_ms:.2f} | {count:.0f} |')
  rows = [
    (statistics.median(each[p]), len(durations) / steps, p)
    for p, durations in products.items()
  ]
  rows.sort(key=lambda r: -r[0] * r[1])
  flops = sum(n * p.flops() for _, n, p in rows)
  ratio = results.spread([a / b for a, b in zip(lone, walls, strict=True)])
  print(
    f'\n{len(rows)} shapes of products, {flops / 1e9:.1f} GFLOP; '
    f'alone / step {ratio}\n'
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
  cli.run(main, 'configs/base.py:size=tiny')
