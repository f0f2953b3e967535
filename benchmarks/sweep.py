r"""Many settings in one program, in turn and vmapped, against one process each.

  python -m benchmarks.sweep [--settings=16] [--num_steps=50] [--size=nano]

The settings are learning rates. `train_step` takes its floats as arguments, so
one compilation serves them all. `processes` are launch.train's, as many at a
time as there are cores; `in turn` is launch.sweep, with the same logs,
checkpoints and evaluations; `vmapped` runs all at once, on the same batches,
and writes nothing. Seconds from the first import to the end, with a warm
compilation cache. Of short runs that is mostly starts of processes, which one
program does once; of long ones their steps, and processes with a core each may
then be as fast as one that uses all: a ratio is of its number of steps.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from benchmarks import results
from configs import base
from launch import cli

_SIZE = flags.DEFINE_string('size', 'nano', 'of configs/sizes.py')
_SETTINGS = flags.DEFINE_integer('settings', 16, 'learning rates', 2)
_STEPS = flags.DEFINE_integer('num_steps', 50, 'updates of each', 2)
_TURNS = flags.DEFINE_integer('turns', 5, 'of each form', 1)
_FORM = flags.DEFINE_enum('form', '', ['', 'vmapped'], 'internal: one form')

_ROOT = pathlib.Path(__file__).parents[1]


def rates() -> np.ndarray:
  return np.geomspace(3e-4, 3e-3, _SETTINGS.value)


def vmapped() -> np.ndarray:
  """Trains all settings; returns their last losses."""
  import jax

  from lm import loop, step

  config = base.get_config(f'size={_SIZE.value}')
  config.num_steps = _STEPS.value
  built = loop.build(config)
  batches = [built.data.train.batch(n) for n in range(_STEPS.value)]
  traced = step.floats(config)
  one = step.build_train(config, built.model)
  floats = {**traced, 'learning_rate': rates().astype(np.float32)}
  which = {**jax.tree.map(lambda _: None, traced), 'learning_rate': 0}
  many = jax.jit(jax.vmap(one, in_axes=(0, None, which)), donate_argnums=0)
  copies = lambda x: np.broadcast_to(x, (_SETTINGS.value, *x.shape))
  state = jax.tree.map(copies, jax.device_get(built.init()))
  for tokens in batches:
    state, metrics = many(state, tokens, floats)
  return np.asarray(metrics['train/loss'])


def in_processes(folder: str) -> None:
  """Trains all settings with launch.train, one per core at a time."""
  waiting, running = list(enumerate(rates())), []
  while waiting or running:
    while waiting and len(running) < os.cpu_count():
      i, rate = waiting.pop()
      command = [
        'launch.train', f'--config=configs/base.py:size={_SIZE.value}',
        f'--workdir={folder}/{i}', f'--config.learning_rate={rate}', *_fields(),
      ]  # fmt: skip
      running.append(_start(command))
    while all(process.poll() is None for process in running):
      time.sleep(0.02)
    if any(process.returncode for process in running):
      raise RuntimeError('launch.train failed')
    running = [p for p in running if p.returncode is None]


def in_turn(folder: str) -> np.ndarray:
  """Trains all settings with launch.sweep; returns their last losses."""
  config = pathlib.Path(folder, 'settings.py')
  settings = {
    str(i): {'learning_rate': float(r)} for i, r in enumerate(rates())
  }
  config.write_text(
    'from configs import base\n'
    f'get_config = lambda: base.get_config("size={_SIZE.value}")\n'
    f'sweep = lambda: {settings}\n'
  )
  workdir = pathlib.Path(folder, 'runs')
  command = ['launch.sweep', f'--config={config}', f'--workdir={workdir}']
  if _start([*command, *_fields()]).wait():
    raise RuntimeError('launch.sweep failed')
  logs = [workdir / str(i) / 'metrics.jsonl' for i in range(_SETTINGS.value)]
  last = [json.loads(x.read_text().splitlines()[-2]) for x in logs]
  return np.array([x['train/loss'] for x in last])


def _fields():
  return [
    f'--config.num_steps={_STEPS.value}',
    '--config.eval.every_steps=0',
    '--config.eval.num_sequences=32',
    f'--config.checkpoint.every_steps={_STEPS.value}',
  ]


def _start(command):
  return subprocess.Popen(
    [sys.executable, '-m', *command],
    cwd=_ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def _seconds(form: str) -> float:
  begin = time.perf_counter()
  if form == 'vmapped':
    knobs = [f'--{k}={flags.FLAGS[k].value}'
             for k in ('size', 'settings', 'num_steps')]  # fmt: skip
    if _start(['benchmarks.sweep', f'--form={form}', *knobs]).wait():
      raise RuntimeError(f'{form} failed')
  else:
    with tempfile.TemporaryDirectory() as folder:
      {'processes': in_processes, 'in turn': in_turn}[form](folder)
  return time.perf_counter() - begin


@results.entry('many settings in one program')
def main() -> None:
  if _FORM.value:
    print(vmapped())
    return
  base.get_config(f'size={_SIZE.value}')  # refuses an unknown one
  with tempfile.TemporaryDirectory() as folder:
    np.testing.assert_allclose(in_turn(folder), vmapped(), rtol=1e-3)
  forms = ('processes', 'in turn', 'vmapped')
  turns = [{f: _seconds(f) for f in forms} for _ in range(_TURNS.value + 1)]
  del turns[0]  # fills the compilation cache
  print(f'{_SETTINGS.value} settings, {_STEPS.value} steps, {_SIZE.value}')
  for form in forms:
    ratio = results.spread([t['processes'] / t[form] for t in turns])
    low, high = (f(t[form] for t in turns) for f in (min, max))
    print(f'{form:<10} {low:.1f} .. {high:.1f} s, {ratio} times as fast')


if __name__ == '__main__':
  cli.run(main)
