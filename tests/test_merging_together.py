"""Two real processes merge together; a merge that is killed."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from benchmarks import kill_merge
from merging.engine import stream
from tests import helpers, test_interrupts
from tests import merging_items as made


def _pair(*arguments, program=('-m', 'launch.merge')):
  """Runs launch.merge in two processes that find each other."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  join = [f'--coordinator=localhost:{port}', '--num_processes=2']
  pair = [
    subprocess.Popen(
      [sys.executable, *program, *map(str, arguments), *join,
       f'--process_id={i}'],
      cwd=helpers.ROOT,
      env={**os.environ, 'XLA_FLAGS': ''},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    outputs = [p.communicate(timeout=120)[0] for p in pair]
  finally:
    for process in pair:
      process.kill()
      process.wait()
  return [p.returncode for p in pair], outputs


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  for i in (1, 2):
    made.save(root / f'{i}/params', made.params(i), chunk_bytes=64)
  return root


def test_two_processes_write_one_merge(inputs, tmp_path):
  out = tmp_path / 'out'
  codes, outputs = _pair(f'--inputs={inputs}', '--method=wma', f'--out={out}')
  assert codes == [0, 0], outputs
  sources = [(inputs / '1/params', 1 / 3), (inputs / '2/params', 2 / 3)]
  made.assert_same_bits(made.restore(out / 'params'), stream.combine(sources))
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  stream.merge([(out / 'params', 1.0)], tmp_path / 'again')


def test_sigterm_to_all_leaves_nothing(inputs, tmp_path):
  program = '-c', test_interrupts.ENDED_MERGE, str(int(signal.SIGTERM))
  arguments = f'--inputs={inputs}', f'--out={tmp_path}/out'
  codes, outputs = _pair(*arguments, program=program)
  assert codes == [143, 143], outputs
  assert not [*tmp_path.iterdir()]


def test_what_one_cannot_read_none_writes(inputs, tmp_path):
  sources = [tmp_path / '1', tmp_path / '2']
  for source in sources:
    made.save(source / 'params', made.params(int(source.name)), use_ocdbt=False)
  # A leaf of one block, so that one process alone reads it.
  for path in (sources[1] / 'params' / 'layers.norm').iterdir():
    if path.name != '.zarray':
      path.write_bytes(b'broken')
  codes, outputs = _pair(
    f'--inputs={sources[0]},{sources[1]}', f'--out={tmp_path}/out'
  )
  assert codes == [2, 2], outputs
  for output in outputs:
    assert "error: leaf 'layers.norm' of" in output, output
    assert 'cannot be read' in output and 'Traceback' not in output
  assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']


def test_killed_merges_leave_all_or_nothing(tmp_path):
  """A few moments; `python -m benchmarks.kill_merge` has many."""
  inputs = kill_merge.write_checkpoints(tmp_path / 'inputs', 16 << 20)
  before = kill_merge.digest(inputs)
  first, last = kill_merge.moments(inputs, tmp_path / 'whole')
  for fraction in (0.3, 0.8):
    after = first + fraction * (last - first)
    left = kill_merge.kill_once(inputs, tmp_path, after, tmp_path / 'whole')
    assert not left.startswith('FAIL'), left
    assert kill_merge.digest(inputs) == before
  assert (
    kill_merge.kill_once(inputs, tmp_path, 300, tmp_path / 'whole')
    == 'complete (had ended)'
  )
  assert {p.name for p in tmp_path.iterdir()} == {'inputs', 'whole'}
  about = json.loads(pathlib.Path(tmp_path, 'whole/merge.json').read_text())
  assert about['method']['name'] == 'wma'
