"""Writing a merge: closed on errors, atomic, bounded in memory, explained."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from merging.engine import artifact, coefficients, items, stream
from tests import merging_items as made

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """<run>/checkpoints/<step>/params of four steps."""
  root = tmp_path_factory.mktemp('run')
  for i in range(4):
    made.save(root / f'checkpoints/{100 * i}/params', made.params(i))
  return root


def _broken(run, tmp_path, change):
  tree = made.params(9)
  change(tree)
  return [
    (run / 'checkpoints/0/params', 0.5),
    (made.save(tmp_path / '900/params', tree), 0.5),
  ]


CHANGES = {
  'missing': (lambda t: t.pop('scale'), "leaf 'scale' is not in both"),
  'extra': (lambda t: t.update(z=np.ones(2)), "leaf 'z' is not in both"),
  'shape': (
    lambda t: t.update(block={'w': np.ones((3, 6), 'f4')}),
    r"leaf 'block.w' is float32\(16, 6\)",
  ),
  'dtype': (
    lambda t: t.update(scale=np.float64(1)),
    "leaf 'scale' is float32.* but float64",
  ),
  'not finite': (
    lambda t: t['block']['w'].__setitem__((15, 5), np.nan),
    "leaf 'block.w' of .*900/params' is not finite",
  ),
}


@pytest.mark.parametrize(
  ('change', 'message'), CHANGES.values(), ids=list(CHANGES)
)
def test_sources_that_do_not_fit(run, tmp_path, change, message):
  sources = _broken(run, tmp_path, change)
  with pytest.raises(ValueError, match=message):
    stream.merge(sources, tmp_path / 'merged' / 'out', max_bytes=made.SMALL)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['900']


def test_integer_leaves_are_refused(tmp_path):
  source = made.save(tmp_path / 'source', {'step': np.arange(3)})
  with pytest.raises(ValueError, match="leaf 'step' of .* is int64; only"):
    stream.merge([(source, 1.0)], tmp_path / 'out')


@pytest.mark.parametrize(
  ('c', 'options', 'message'),
  [
    ([0.5, 0.4], {}, 'sum to 0.9'),
    ([0.5, float('nan')], {}, 'sum to nan'),
    ([], {}, 'no sources'),
    ([1.0], {'accumulate': 'bfloat16'}, "accumulate='bfloat16'"),
    ([1.0], {'dtype': 'int8'}, "dtype='int8' is unknown; legal: float32"),
    ([1.0], {'max_bytes': 0}, 'max_bytes=0'),
    ([1.0], {'max_bytes': 9}, "leaf 'block.w' is stored in chunks of 0.0 MiB"),
    ([1.0], {'tree': 'x.y'}, "no leaf below 'x.y'; its tree begins with: blo"),
  ],
)
def test_bad_arguments(run, tmp_path, c, options, message):
  with pytest.raises(ValueError, match=message):
    stream.merge(made.sources(run, c), tmp_path / 'out', **options)
  assert not list(tmp_path.iterdir())


def test_bad_paths(run, tmp_path):
  source = run / 'checkpoints/0/params'
  with pytest.raises(ValueError, match='listed twice'):
    stream.combine([(source, 0.5), (f'{source.parent}/../0/params', 0.5)])
  with pytest.raises(ValueError, match='is not an Orbax item'):
    stream.combine([(tmp_path / 'nothing', 1.0)])
  (tmp_path / 'out').mkdir()
  with pytest.raises(ValueError, match='is never overwritten'):
    stream.merge([(source, 1.0)], tmp_path / 'out')


def test_overflow_of_the_result_is_refused(tmp_path):
  source = made.save(tmp_path / 'source', {'w': np.full(3, 1e6, np.float32)})
  with pytest.raises(ValueError, match="leaf 'w' of the result does not fit"):
    stream.merge([(source, 1.0)], tmp_path / 'out', dtype='float16')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('handler', made.FORMATS.values(), ids=made.FORMATS)
def test_a_chunk_that_is_gone_is_an_error_not_zeros(tmp_path, handler):
  source = made.save(
    tmp_path / 'source', {'w': np.ones((64, 64), 'f4')}, **handler
  )
  removed = 0
  for path in source.rglob('*'):
    if (
      path.is_file()
      and path.stat().st_size < 2**20
      and ({'d', 'c'} & {*path.parent.parts[-3:]} or path.name == '0.0')
    ):
      path.unlink()
      removed += 1
  assert removed
  with pytest.raises(ValueError, match="leaf 'w' of .* cannot be read"):
    stream.combine([(source, 1.0)])


@pytest.mark.parametrize('handler', made.FORMATS.values(), ids=made.FORMATS)
def test_a_damaged_compressed_chunk_is_an_error(tmp_path, handler):
  """A part of it is; of single bits fingerprints of our own runs can tell."""
  noise = np.random.default_rng(0).standard_normal((64, 64), np.float32)
  source = made.save(tmp_path / 'source', {'w': noise}, **handler)
  victim = max(source.rglob('*'), key=lambda p: p.is_file() * p.stat().st_size)
  content = bytearray(victim.read_bytes())
  content[len(content) // 3 : len(content) // 2] = bytes(
    len(content) // 2 - len(content) // 3
  )
  victim.write_bytes(content)
  with pytest.raises(ValueError, match="leaf 'w' of .* cannot be read"):
    stream.merge([(source, 1.0)], tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
  real, calls = items.Writer.create, []

  def full_disk(*args, **kwargs):
    calls.append(args)
    if len(calls) == 3:
      raise OSError(28, 'No space left on device')
    return real(*args, **kwargs)

  monkeypatch.setattr(items.Writer, 'create', full_disk)
  with pytest.raises(ValueError, match='cannot be written: .*No space'):
    artifact.write(
      tmp_path / 'run', 'x', sources=made.sources(run, [1.0]), provenance={}
    )
  assert len(calls) == 3 and not list(tmp_path.iterdir())


_FULL = """
import resource, signal, sys
from merging.engine import stream
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
stream.merge([(sys.argv[1], 1.0)], sys.argv[2])
"""


def test_a_file_that_cannot_grow_leaves_nothing(run, tmp_path):
  full = subprocess.run(
    [sys.executable, '-c', _FULL, run / 'checkpoints/0/params', tmp_path / 'x'],
    cwd=ROOT,
    check=False,
    capture_output=True,
    text=True,
  )
  assert full.returncode == 1
  last = full.stderr.strip().splitlines()[-1]
  assert last.startswith("ValueError: leaf '"), last
  assert 'cannot be written' in last and 'File too large' in last, last
  assert not list(tmp_path.iterdir())


_KILLED = """
import os, signal, sys
from merging.engine import items, stream
real, calls = items.Writer.create, []
def create(*args, **kwargs):
  calls.append(0)
  if len(calls) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
  return real(*args, **kwargs)
items.Writer.create = create
stream.merge([(sys.argv[1], 1.0)], sys.argv[2])
"""


def test_kill_in_the_middle_leaves_no_result_and_the_next_merge_cleans_up(
  run, tmp_path
):
  source, out = run / 'checkpoints/0/params', tmp_path / 'out'
  killed = subprocess.run(
    [sys.executable, '-c', _KILLED, source, out],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    check=False,
  )
  assert killed.returncode == -signal.SIGKILL
  assert not out.exists()
  (left,) = tmp_path.iterdir()
  assert left.name.startswith('.out.tmp-')
  stream.merge([(source, 1.0)], out)
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  made.assert_same_bits(made.restore(out), made.params(0))


_PEAK = """
import pathlib, sys
from merging.engine import memory, stream
memory.reuse()
def peak():  # of this process alone; getrusage begins with the parent's
  status = pathlib.Path('/proc/self/status').read_text()
  return int(status.split('VmHWM:')[1].split()[0]) << 10
stream._BLOCK = int(sys.argv[3]) or stream._BLOCK
sources = [(p, 1 / len(sys.argv[4:])) for p in sys.argv[4:]]
before = peak()
stream.merge(sources, sys.argv[1], max_bytes=int(sys.argv[2]))
print(peak() - before)
"""


def _peak(sources, out, max_bytes, block=0):
  run = subprocess.run(
    [sys.executable, '-c', _PEAK, out, str(max_bytes), str(block), *sources],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    check=True,
    capture_output=True,
    text=True,
  )
  return int(run.stdout)


@pytest.mark.parametrize('chunk_bytes', [1 << 19, None])
def test_memory_is_bounded_for_large_leaves_and_many_sources(
  tmp_path, chunk_bytes
):
  """In compressed chunks that fit, and as one that does not."""
  rng = np.random.default_rng(0)
  tree = {'w': rng.random((4096, 2048), np.float32)}  # 32 MiB
  path = made.save(tmp_path / 'source', tree, chunk_bytes)
  paths = []
  for i in range(5):
    # The same bytes under other names: links to the files of one item.
    (tmp_path / f'{i}').mkdir()
    for p in path.rglob('*'):
      link = tmp_path / f'{i}' / p.relative_to(path)
      if p.is_dir():
        link.mkdir()
      else:
        os.link(p, link)
    paths.append(tmp_path / f'{i}')
  overhead = 16 << 20  # the library's own: code, threads, tables
  few = _peak(paths[:2], tmp_path / 'few', 8 << 20)
  many = _peak(paths, tmp_path / 'many', 8 << 20)
  assert few < (8 << 20) + overhead
  assert many < (8 << 20) + overhead
  # The measurement can fail: a generous bound is used, if blocks are large.
  generous = _peak(paths[:2], tmp_path / 'generous', 1 << 30, 1 << 30)
  assert generous > 64 << 20


def test_memory_is_bounded_where_one_compressed_chunk_just_fits(tmp_path):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  columns = NamedSharding(mesh, PartitionSpec(None, 'x'))  # of 8 MiB
  w = np.random.default_rng(0).random((2048, 8192), np.float32)
  tree, paths = {'w': jax.device_put(w, columns)}, []
  for i in range(4):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / f'{i}', tree)
    paths.append(tmp_path / f'{i}')
  bound = 32 << 20
  peaks = [_peak(paths, tmp_path / f'out-{i}', bound) for i in range(3)]
  assert max(peaks) < bound


def test_artifact_and_its_provenance(run, tmp_path):
  c = coefficients.inverse([0.75, 0.5, 0.25])
  sources = made.sources(run, c)
  record = artifact.provenance(
    run,
    sources,
    method={'name': 'decay', 'shape': 'linear', 'floor': 0.0, 'grid': 'left'},
    learning_rates=[1e-3] * 4,
    dtype='float32',
  )
  out = artifact.write(
    run, 'linear', sources=sources, provenance=record, dtype='float32'
  )
  assert out == run / 'merged' / 'linear'
  assert sorted(p.name for p in out.iterdir()) == ['merge.json', 'params']
  made.assert_same_bits(made.restore(out / 'params'), stream.combine(sources))
  stored = json.loads((out / 'merge.json').read_text())
  named = [r.pop('sha256') for r in stored['sources']]
  assert stored == record and len(set(named)) == 4
  assert named == artifact.digests(sources)
  row = stored['sources'][2]
  assert row['path'] == 'checkpoints/200/params'
  assert (row['step'], row['item']) == (200, 'params')
  assert row['coefficient'] == 0.25 and row['multiplier'] == 0.5
  assert row['effective_learning_rate'] == 5e-4
  assert [r['multiplier'] for r in stored['sources']] == [1, 0.75, 0.5, 0.25]
  assert stored['effective_count'] == 4
  assert stored['method']['shape'] == 'linear'
  assert stored['accumulate'] == 'float32' and stored['dtype'] == 'float32'
  assert {'numpy', 'tensorstore', 'orbax-checkpoint'} <= {*stored['versions']}
  with pytest.raises(ValueError, match='never overwritten'):
    artifact.write(run, 'linear', sources=sources, provenance=record)
  for name in ('', '../x', '.hidden', 'a b'):
    with pytest.raises(ValueError, match='must be a plain file name'):
      artifact.write(run, name, sources=sources, provenance=record)
