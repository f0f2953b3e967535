"""Two real processes on this machine, two virtual devices each.

Each start costs seconds, so one long test follows one run through its life.
"""

import contextlib
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time

import numpy as np

from configs import debug
from lm import address, card, log, loop
from lm import run as run_lib
from tests import helpers

_DEVICES = '--xla_force_host_platform_device_count=2'
_DEBUG = f'--config={helpers.ROOT}/configs/debug.py:schedule=constant'


@contextlib.contextmanager
def _pair(*args, environments, folders=(helpers.ROOT, helpers.ROOT)):
  """Starts two processes of one command; none survives the test."""
  pair = []
  for i, environment in enumerate(environments):
    mine = [a.format(i=i) for a in map(str, args)]
    pair.append(
      subprocess.Popen(
        [sys.executable, '-m', 'launch.train', *mine],
        cwd=folders[i],
        env={
          **os.environ,
          'XLA_FLAGS': _DEVICES,
          'PYTHONPATH': str(helpers.ROOT),
          **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  try:
    yield pair
  finally:
    for process in pair:
      process.kill()
      process.wait()


def _explicit(*args):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  return _pair(
    *args,
    f'--coordinator=localhost:{port}',
    '--num_processes=2',
    '--process_id={i}',
    environments=({}, {}),
  )


def _outputs(pair, code):
  """Waits for the end of both; returns what they printed."""
  outputs = [p.communicate(timeout=300)[0] for p in pair]
  assert [p.returncode for p in pair] == [code, code], outputs
  return outputs


def _job_number():
  """A number from which jax computes a port, in its range, that is free."""
  while True:
    number = random.randrange(4096)
    with socket.socket() as s, contextlib.suppress(OSError):
      s.bind(('localhost', 61440 + number))
      return number


def test_two_processes_are_one_run(tmp_path):
  """Trained, preempted, damaged and continued by two; continued by one."""
  run = tmp_path / 'run'
  arguments = [
    _DEBUG,
    '--config.checkpoint.every_steps=5',
    '--config.eval.every_steps=5',
    '--config.model.num_layers=1',
    '--config.mesh.data=1',
    '--config.mesh.fsdp=4',  # each process holds a part of each matrix
  ]
  metrics = run / 'metrics.jsonl'
  with _explicit(
    *arguments, f'--workdir={run}', '--config.num_steps=100000'
  ) as pair:
    while not metrics.exists() or metrics.read_text().count('\n') < 12:
      assert {p.poll() for p in pair} == {None}, pair[0].communicate()
      time.sleep(0.05)
    pair[1].terminate()  # one is told, both must stop
    for output in _outputs(pair, 143):
      assert 'preempted. Next: run the same command' in output
  meta = run_lib.Run(run).meta
  last = meta['step']
  assert meta['status'] == 'preempted'
  assert meta['devices'] == {'kind': 'cpu', 'count': 4, 'processes': 2}
  assert address.steps(run)[-2:] == [(last - 1) // 5 * 5, last]
  assert len(list((run / 'tb').iterdir())) == 1  # process 0 alone writes

  # Only process 1 reads these files, but both have to fall back.
  saved = run / 'checkpoints' / str(last)
  shutil.rmtree(saved / 'params' / 'ocdbt.process_1' / 'd')
  with _explicit(
    *arguments, f'--workdir={run}', f'--config.num_steps={last + 2}'
  ) as pair:
    for output in _outputs(pair, 0):
      assert f'warning: Checkpoint {run}@{last} is unreadable' in output
  assert (run / 'damaged' / str(last)).is_dir()

  config = debug.get_config('schedule=constant')
  config.update_from_flattened_dict({
    'checkpoint.every_steps': 5, 'eval.every_steps': 5,
    'num_steps': last + 4, 'model.num_layers': 1, 'mesh.data': 1,
    'mesh.fsdp': 8,
  })  # fmt: skip
  for place in (run, tmp_path / 'single'):
    assert loop.train(config, place) == 'done'
  assert run_lib.Run(run).meta['devices']['processes'] == 1
  _assert_close(run, tmp_path / 'single', last + 4)


def _assert_close(run, single, last):
  """The order of sums between processes differs, nothing else."""
  for step in (5, last):
    for name in ('params', 'train', 'mean'):
      one, two = (helpers.leaves(r, step, name) for r in (single, run))
      assert one.keys() == two.keys()
      for key in one:
        np.testing.assert_allclose(two[key], one[key], 1e-3, 1e-5, err_msg=key)
  one, two = helpers.lines(single), helpers.lines(run)
  assert [x['step'] for x in two] == [x['step'] for x in one]
  for tag in ('train/loss', 'eval/loss', 'grad/l2'):
    a, b = ([x[tag] for x in lines if tag in x] for lines in (one, two))
    np.testing.assert_allclose(b, a, rtol=1e-5)


def test_a_refusal_by_process_0_stops_both(tmp_path):
  """Found by process 0 alone; the processes find each other as in SLURM."""
  run = tmp_path / 'run'
  run.mkdir()
  config = card.as_dict(debug.get_config('schedule=constant'))
  log.write_json(run / 'config.json', config)
  slurm = {
    'SLURM_JOB_ID': str(_job_number()),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
    'SLURM_LOCALID': '0',
  }
  with _pair(
    _DEBUG,
    f'--workdir={run}',
    '--config.seed=7',
    environments=[{**slurm, 'SLURM_PROCID': str(i)} for i in range(2)],
  ) as pair:
    for output in _outputs(pair, 2):
      assert output.count('error: ') == 1
      assert f'error: {run} was started with another seed;' in output
      assert 'Traceback' not in output
  assert {p.name for p in run.iterdir()} == {'config.json', '.lock'}


def test_other_data_on_one_machine_is_an_error_on_all(tmp_path):
  """A relative path that means different files; found as by Open MPI."""
  folders = [tmp_path / str(i) for i in range(2)]
  for folder in folders:
    folder.mkdir()
    (folder / 'train.txt').write_text(folder.name * 9999)
    (folder / 'eval.txt').write_text('x' * 9999)
  uri = f'{4096 * _job_number()}.0;tcp://127.0.0.1:1'
  mpi = {'OMPI_MCA_orte_hnp_uri': uri, 'OMPI_COMM_WORLD_SIZE': '2'}
  ranks = [
    {f'OMPI_COMM_WORLD_{k}RANK': str(i) for k in ('', 'LOCAL_')}
    for i in range(2)
  ]
  with _pair(
    _DEBUG,
    f'--workdir={tmp_path}/run',
    '--config.data.source=text',
    '--config.data.train=train.txt',
    '--config.data.eval=eval.txt',
    environments=[{**mpi, **rank} for rank in ranks],
    folders=folders,
  ) as pair:
    for output in _outputs(pair, 2):
      assert 'error: The data must be the same on all processes' in output
      assert 'Traceback' not in output
  assert not pathlib.Path(tmp_path, 'run').exists()
