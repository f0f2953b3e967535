"""kill -9, SIGTERM and Ctrl-C: what they leave is a run that goes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lm import address
from lm import run as run_lib
from tests import helpers, merging_items
from tests.helpers import ROOT


def _wait_for_step(victim, run, least):
  while not any(s >= least for s in address.steps(run)):
    assert victim.poll() is None
    time.sleep(0.02)


def test_kill_9_then_the_same_command(tmp_path):
  """Killed as soon as a checkpoint beyond the first appears."""
  arguments = [
    '--config=configs/debug.py',
    '--config.num_steps=60',
    '--config.checkpoint.every_steps=4',
  ]
  helpers.command('launch.train', *arguments, f'--workdir={tmp_path}/a')
  command = [sys.executable, '-m', 'launch.train', *arguments]
  environment = {
    **os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=1'
  }  # fmt: skip
  victim = subprocess.Popen(
    [*command, f'--workdir={tmp_path}/b'],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
  )
  _wait_for_step(victim, tmp_path / 'b', 5)
  victim.send_signal(signal.SIGKILL)
  victim.wait()
  assert address.steps(tmp_path / 'b')[-1] < 60
  helpers.command('launch.train', *arguments, f'--workdir={tmp_path}/b')
  helpers.assert_same_run(tmp_path / 'a', tmp_path / 'b')


ENDED_MERGE = """
import os, runpy, signal, sys
from merging.engine import items
real, number = items.Writer.create, int(sys.argv.pop(1))
def create(*args, **kwargs):
  real(*args, **kwargs)
  os.kill(os.getpid(), number)
items.Writer.create = create
runpy.run_module('launch.merge', run_name='__main__')
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_merge_that_is_ended_leaves_nothing(tmp_path, number):
  for i in range(2):
    merging_items.save(tmp_path / 'in' / str(i), merging_items.params(i))
  flags = f'--inputs={tmp_path}/in', '--steps=0,1', f'--out={tmp_path}/out'
  ended = subprocess.run(
    [sys.executable, '-c', ENDED_MERGE, str(int(number)), *flags],
    cwd=ROOT,
    check=False,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 128 + number
  assert ended.stderr.startswith('interrupted; ')
  assert [p.name for p in tmp_path.iterdir()] == ['in']


def test_a_reader_that_has_enough_ends_a_command():
  for name in 'train', 'merge':
    reader, output = os.pipe()
    os.close(reader)  # as `| head` after its lines
    ended = subprocess.run(
      [sys.executable, '-m', f'launch.{name}', '--help'],
      cwd=ROOT,
      check=False,
      stdout=output,
      stderr=subprocess.PIPE,
    )
    os.close(output)
    assert (ended.returncode, ended.stderr) == (141, b'')


def test_sigterm_saves_and_exits(tmp_path):
  command = [
    sys.executable, '-m', 'launch.train', '--config=configs/debug.py',
    '--config.num_steps=100000', '--config.checkpoint.every_steps=50000',
    f'--workdir={tmp_path}/a',
  ]  # fmt: skip
  victim = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  metrics = pathlib.Path(tmp_path, 'a', 'metrics.jsonl')
  while not metrics.exists() or metrics.read_text().count('\n') < 5:
    assert victim.poll() is None
    time.sleep(0.02)
  victim.terminate()
  output, _ = victim.communicate(timeout=60)
  assert victim.returncode == 143
  assert 'preempted. Next: run the same command' in output
  meta = json.loads((tmp_path / 'a' / 'meta.json').read_text())
  assert meta['status'] == 'preempted'
  assert address.steps(tmp_path / 'a')[-1] == meta['step'] > 0


def test_a_second_ctrl_c_ends_at_once_and_leaves_a_run(tmp_path):
  """Mostly in the middle of the save that the first has begun."""
  arguments = [
    '-m', 'launch.train', '--config=configs/debug.py:schedule=constant',
    '--config.checkpoint.every_steps=20', f'--workdir={tmp_path}/a',
  ]  # fmt: skip
  victim = subprocess.Popen(
    [sys.executable, *arguments, '--config.num_steps=100000'],
    cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  _wait_for_step(victim, tmp_path / 'a', 21)
  victim.send_signal(signal.SIGINT)
  while 'stopping after this step' not in victim.stderr.readline():
    assert victim.poll() is None
  victim.send_signal(signal.SIGINT)
  _, error = victim.communicate(timeout=60)
  assert victim.returncode in (130, 143)  # interrupted, or saved before that
  assert ('interrupted; the same' in error) == (victim.returncode == 130)
  end = address.steps(tmp_path / 'a')[-1] + 2
  helpers.command(*arguments[1:], f'--config.num_steps={end}')
  assert run_lib.Run(tmp_path / 'a').meta['status'] == 'done'
