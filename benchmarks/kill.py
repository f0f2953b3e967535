r"""Kills a run with SIGKILL at random moments; it must end as if never killed.

  python -m benchmarks.kill --kills=20

One run is trained without a kill. Another one, by the same command, is killed
again and again, a quarter of the times while it starts and otherwise while it
trains, and then left to end. Parameters, optimizer state, mean and metrics of
the two must be equal bit for bit. Exit code 0 = PASS, 1 = FAIL.
"""

import pathlib
import random
import subprocess
import sys
import tempfile
import time

from absl import flags

from launch import cli
from lm import address, log
from tests import helpers

_KILLS = flags.DEFINE_integer('kills', 20, 'number of kills', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 1000, 'length of the run', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'of the moments')
_ROW = '{:>4}  {:>9}  {:>9}  {:>10}  {}'


def main() -> int:
  with tempfile.TemporaryDirectory() as folder:
    whole, killed = (pathlib.Path(folder, x) for x in ('whole', 'killed'))
    _time(pathlib.Path(folder, 'compiles'))
    start, train = _time(whole)
    print(f'Without a kill: {start:.1f} s to start, {train:.1f} s to train.')
    kills = _kill_often(killed, start)
    _time(killed)
    try:
      helpers.assert_same_run(whole, killed)
    except AssertionError as e:
      print(f'FAIL: the runs differ after {kills} kills. {e}')
      return 1
  if kills < _KILLS.value:
    print(f'FAIL: the run ended after {kills} kills; give it more --steps.')
    return 1
  print(
    f'PASS: after {kills} kills parameters, optimizer state, mean and all '
    f'{_STEPS.value + 1} lines of metrics equal those of the run without.'
  )
  return 0


def _start(run: pathlib.Path) -> subprocess.Popen:
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'launch.train', f'--workdir={run}'),
      *('--config=configs/debug.py', f'--config.num_steps={_STEPS.value}'),
      '--config.checkpoint.every_steps=10',
    ],
    cwd=helpers.ROOT,
    stdout=subprocess.DEVNULL,
  )


def _time(run: pathlib.Path) -> tuple[float, float]:
  """Runs to the end; returns the seconds to its first line and from there."""
  begin = first = time.time()
  process = _start(run)
  while process.poll() is None:
    if first == begin and log.read_lines(run / 'metrics.jsonl'):
      first = time.time()
    time.sleep(0.1)
  if process.returncode:
    raise RuntimeError(f'The run ended with code {process.returncode}.')
  return first - begin, time.time() - first


def _kill_often(run: pathlib.Path, start: float) -> int:
  """Kills the run up to --kills times; returns how often it did."""
  rng = random.Random(_SEED.value)
  print(_ROW.format('kill', 'after', 'last line', 'checkpoint', 'moment'))
  for kill in range(_KILLS.value):
    process, begin = _start(run), time.time()
    if kill % 4:  # few enough steps for the run to outlast all kills
      seen = _last(run) + rng.uniform(0, 1.5 * _STEPS.value / _KILLS.value)
      while _last(run) < seen and process.poll() is None:
        time.sleep(rng.uniform(0, 0.05))
    else:
      time.sleep(rng.uniform(0, start))
    if process.poll() is not None:
      return kill
    process.kill()
    process.wait()
    after = time.time() - begin
    lines = log.read_lines(run / 'metrics.jsonl')
    saved = address.steps(run)
    print(
      _ROW.format(
        kill + 1,
        f'{after:.1f} s',
        lines[-1]['step'] if lines else '-',
        saved[-1] if saved else '-',
        _moment(run, kill),
      ),
      flush=True,
    )
  return _KILLS.value


def _last(run: pathlib.Path) -> int:
  lines = log.read_lines(run / 'metrics.jsonl')
  return lines[-1]['step'] if lines else 0


def _moment(run: pathlib.Path, kill: int) -> str:
  if kill % 4 == 0:
    return 'while starting'
  saving = any((run / 'checkpoints').glob('*.orbax-checkpoint-tmp'))
  return 'while saving' if saving else 'while training'


if __name__ == '__main__':
  cli.run(main)
