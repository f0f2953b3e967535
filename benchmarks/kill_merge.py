r"""Kills a merge with SIGKILL at random moments: it leaves all or nothing.

  python -m benchmarks.kill_merge --kills=20

Each time `launch.merge` is started on the same four checkpoints and killed,
mostly while it reads and writes. Then there must be either no result or a
complete one, equal to that of a merge that was not killed, and the checkpoints
must be the same bytes as before. The next merge removes what a killed one
left. Exit code 0 = PASS, 1 = FAIL.
"""

import hashlib
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from launch import cli
from tests import helpers

_KILLS = flags.DEFINE_integer('kills', 20, 'number of kills', lower_bound=1)
_MIB = flags.DEFINE_integer('mib', 64, 'of each checkpoint', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'of the moments')
_ROW = '{:>4}  {:>8}  {}'


def main() -> int:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    inputs = write_checkpoints(folder / 'inputs', _MIB.value << 20)
    before = digest(inputs)
    span = moments(inputs, folder / 'whole')
    print(f'Without a kill: writes from {span[0]:.1f} to {span[1]:.1f} s.')
    print(_ROW.format('kill', 'after', 'left'))
    rng = random.Random(_SEED.value)
    for kill in range(_KILLS.value):
      # A quarter anywhere, the others while it writes, or just after.
      first = span[0] if kill % 4 else 0
      after = rng.uniform(first, 1.05 * span[1])
      left = kill_once(inputs, folder, after, folder / 'whole')
      print(_ROW.format(kill + 1, f'{after:.2f} s', left), flush=True)
      if left.startswith('FAIL'):
        return 1
      if digest(inputs) != before:
        print('FAIL: the inputs changed.')
        return 1
    _merge(inputs, folder / 'out').wait()
    if not _same(folder / 'out', folder / 'whole') or _left(folder):
      print('FAIL: the last merge, without a kill, is not clean.')
      return 1
  print(f'PASS: {_KILLS.value} kills left no half result and no changed input.')
  return 0


def write_checkpoints(folder: pathlib.Path, num_bytes: int) -> pathlib.Path:
  """Writes folder/<step>/params of four checkpoints, by plain Orbax."""
  rng = np.random.default_rng(0)
  rows = max(num_bytes // (8 * 4096), 1)
  for step in (10, 20, 30, 40):
    tree = {
      f'layer_{i}': rng.standard_normal((rows, 1024)).astype(np.float32)
      for i in range(8)
    }
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / str(step) / 'params', tree)
  return folder


def digest(folder: pathlib.Path) -> str:
  """Returns a hash of the names and bytes of all files."""
  sha = hashlib.sha256()
  for path in sorted(p for p in folder.rglob('*') if p.is_file()):
    sha.update(str(path.relative_to(folder)).encode())
    sha.update(hashlib.sha256(path.read_bytes()).digest())
  return sha.hexdigest()


def kill_once(
  inputs: pathlib.Path, folder: pathlib.Path, after: float, whole: pathlib.Path
) -> str:
  """Kills a merge into folder/out; says what is left, or 'FAIL: ...'."""
  out = folder / 'out'
  process = _merge(inputs, out)
  try:
    process.wait(after)
    moment = 'had ended'
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
    moment = 'half a temporary' if _left(folder) else 'had not begun to write'
  if not out.exists():
    return moment if process.returncode else 'FAIL: no result of a full merge'
  if not _same(out, whole):
    return 'FAIL: a result that is not complete'
  shutil.rmtree(out)
  return f'complete ({moment})'


def _merge(inputs, out):
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'launch.merge', f'--inputs={inputs}'),
      *('--method=wma', f'--out={out}', '--max_mib=64'),
    ],
    cwd=helpers.ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def _left(folder):
  return list(folder.glob('.out.tmp-*'))


def moments(inputs: pathlib.Path, out: pathlib.Path) -> tuple[float, float]:
  """Merges undisturbed; returns when it began to write and when it ended."""
  begin, first = time.time(), 0.0
  process = _merge(inputs, out)
  while process.poll() is None:
    if not first and list(out.parent.glob(f'.{out.name}.tmp-*')):
      first = time.time() - begin
    time.sleep(0.01)
  if process.returncode:
    raise RuntimeError(f'The merge ended with code {process.returncode}.')
  return first, time.time() - begin


def _same(a, b):
  """Whether two results have the same arrays and the same provenance."""
  texts = [x / 'merge.json' for x in (a, b)]
  if not all(text.is_file() for text in texts):
    return False
  left, right = (json.loads(text.read_text()) for text in texts)
  if any(left[k] != right[k] for k in ('method', 'sources')):
    return False
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      left, right = (checkpointer.restore(x / 'params') for x in (a, b))
  except Exception as e:  # Orbax raises whatever broke
    print(f'{a} cannot be restored: {e}')
    return False
  return left.keys() == right.keys() and all(
    (left[k] == right[k]).all() for k in left
  )


if __name__ == '__main__':
  cli.run(main)
