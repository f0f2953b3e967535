"""Chunks that are not compressed are read from their files, in parts."""

import json
import pathlib

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from merging.engine import chunks, files, items, stream
from tests import merging_items as made

BF16 = ts.bfloat16.numpy_dtype
PLAIN = {'use_compression': False}


@pytest.fixture
def reads(monkeypatch):
  """The bytes of all reads from files."""
  seen, real = [], files.fill

  def fill(view, file, start):
    seen.append(len(view))
    real(view, file, start)

  monkeypatch.setattr(files, 'fill', fill)
  return seen


def _tree(seed, dtype):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
  return {'w': draw(50, 60), 'deep': {'x': draw(3, 17, 11)}, 'v': draw(700)}


def _plain(stored):
  found = chunks.layout(stored, 'w')
  return found and found.plain()


@pytest.mark.parametrize('dtype', [np.float32, BF16, np.float16, np.float64])
@pytest.mark.parametrize('chunk_bytes', [None, 3000])
def test_the_bits_of_compressed_ones(
  tmp_path, reads, monkeypatch, dtype, chunk_bytes
):
  """Of whole leaves and of a grid of chunks, in any parts and blocks."""
  trees = [_tree(i, dtype) for i in range(3)]
  save = lambda name, i, **more: (
    made.save(tmp_path / name / str(i), trees[i], chunk_bytes, **more),
    [0.2, 0.3, 0.5][i],
  )
  want = stream.combine([save('packed', i) for i in range(3)])
  assert not reads
  plain = [save('plain', i, **PLAIN) for i in range(3)]
  made.assert_same_bits(stream.combine([(plain[1][0], 1.0)]), trees[1])
  small = 16_000 if chunk_bytes else 100_000  # one chunk
  for part, max_bytes in ((1 << 17, 1 << 30), (16, 1 << 30), (16, small)):
    monkeypatch.setattr(stream, '_PART', part)
    reads.clear()
    got = stream.combine(plain, max_bytes=max_bytes)
    made.assert_same_bits(got, want)
    assert max(reads, default=0) <= part * np.dtype(dtype).itemsize
    if not chunk_bytes or max_bytes == small:
      assert len(reads) >= 3 * 3  # else TensorStore reads several chunks
  stream.merge(plain, tmp_path / 'out', max_bytes=small)
  made.assert_same_bits(made.restore(tmp_path / 'out'), want)
  reads.clear()  # a merge can be merged
  again = stream.combine([(tmp_path / 'out', 1.0)], max_bytes=small)
  made.assert_same_bits(again, want)
  assert reads


def test_shards(tmp_path, reads):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  want = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
  sharded = jax.device_put(want, NamedSharding(mesh, P('a', 'b')))
  path = made.save(tmp_path / 'many', {'w': sharded}, **PLAIN)
  got = stream.combine([(path, 1.0)], max_bytes=10_000)
  made.assert_same_bits(got, {'w': want})
  assert reads == [16 * 24 * 4] * 8


@pytest.mark.parametrize('ocdbt', [True, False])
def test_the_rest_of_a_chunk_at_the_edge(tmp_path, ocdbt):
  """The chunk is stored whole: 60 rows for 50, 66 columns for 60."""
  want = np.arange(3000, dtype=np.float32).reshape(50, 60)
  if ocdbt:
    about = {'shape': [50, 60], 'chunks': [12, 22], 'compressor': None}
    store = items._store(tmp_path, 'w', True)
    spec = {'driver': 'zarr', 'kvstore': store, 'metadata': about}
    array = ts.open(spec, create=True, dtype=ts.float32).result()
    array.write(want).result()
    stored = chunks.values(tmp_path)
  else:
    writer = items.Writer(None, tmp_path, (0, 1))
    writer.create('w', (50, 60), 'float32', (12, 22))
    for rows in (slice(0, 24), slice(24, 50)):
      writer.write('w', (rows, slice(0, 60)), want[rows])
    stored = chunks.of_files(tmp_path)
  read = items.open_leaf(tmp_path, {'use_ocdbt': ocdbt}, 'w', items.context())
  np.testing.assert_array_equal(read.read().result(), want)
  where = _plain(stored).place
  legal = [(0, 12, 22, 44), (48, 50, 0, 22), (49, 50, 50, 57)]
  for a, b, c, d in legal:
    place = where((slice(a, b), slice(c, d)))
    got = files.read(*place, (b - a, d - c), np.dtype('float32'))
    np.testing.assert_array_equal(got, want[a:b, c:d])
  # No range of a chunk, and several chunks.
  for a, b, c, d in [(0, 2, 0, 21), (48, 50, 44, 60), (0, 24, 0, 22)]:
    assert where((slice(a, b), slice(c, d))) is None


def test_places_of_a_deep_tree_of_keys(tmp_path):
  """The bytes at every place are what TensorStore reads under the key."""
  base = {'driver': 'file', 'path': f'{tmp_path}/'}
  config = {'max_decoded_node_bytes': 300, 'max_inline_value_bytes': 8}
  spec = {'driver': 'ocdbt', 'base': base, 'config': config}
  store = ts.KvStore.open(spec).result()
  rng = np.random.default_rng(0)
  for i in range(60):
    size = 4 if i % 10 == 0 else 50 + i
    store[f'layer_{i % 7}/w:{i}%'] = rng.bytes(size)
  manifest = ts.ocdbt.dump(ts.KvStore.open(base).result()).result()
  assert manifest['versions'][-1]['root_height'] > 0, 'one node has all keys'
  found = chunks.values(tmp_path)
  assert len(found) == 60
  assert sum(isinstance(x, bytes) for x in found.values()) == 6
  for key, value in found.items():
    if isinstance(value, chunks.Place):
      path, start, size = value
      value = path.read_bytes()[start : start + size]
    assert value == store[key]


def test_a_chunk_that_is_cut_off_is_an_error(tmp_path):
  tree = {'w': np.ones((64, 64), 'f4')}
  path = made.save(tmp_path / 'source', tree, **PLAIN)
  found = chunks.values(path)['w/0.0']
  with found.path.open('r+b') as f:
    f.truncate(found.start + found.size - 4)
  with pytest.raises(
    ValueError, match="leaf 'w' of .* cannot be read: .*early"
  ):
    stream.combine([(path, 1.0)])
  found.path.unlink()
  with pytest.raises(ValueError, match="leaf 'w' of .* cannot be read"):
    stream.combine([(path, 1.0)])


def test_ranges():
  assert files.first((4, 5), (slice(2, 4), slice(0, 5))) == 10
  assert files.first((4, 5), (slice(2, 3), slice(1, 4))) == 11
  assert files.first((4, 1, 5), (slice(0, 2), slice(0, 1), slice(0, 5))) == 0
  assert files.first((), ()) == 0
  assert files.first((4, 5), (slice(2, 4), slice(0, 4))) is None
  assert files.first((4, 5), (slice(2, 5), slice(0, 5))) is None


def test_other_kinds_of_arrays_are_left_to_tensorstore():
  good = {
    'shape': [4], 'chunks': [2], 'dtype': '<f4', 'order': 'C',
    'compressor': None, 'filters': None,
  }  # fmt: skip
  place = chunks.Place(pathlib.Path('x'), 8, 8)
  found = lambda **change: _plain(
    {'w/.zarray': json.dumps(good | change).encode(), 'w/1': place}
  )
  plain = found()
  assert plain[:3] == ((4,), ts.float32, (2,))
  assert plain.place((slice(3, 4),)) == (pathlib.Path('x'), 12)
  assert plain.place((slice(0, 2),)) is None  # a chunk that is not there
  assert found(chunks=[3]).place((slice(3, 4),)) is None  # of another size
  assert found(dtype='bfloat16', chunks=[4]).dtype == ts.bfloat16
  for change in (
    {'dtype': '>f4'}, {'dtype': '|O'}, {'dtype': [['a', '<f4']]},
    {'order': 'F'}, {'compressor': {'id': 'zstd'}}, {'filters': [{}]},
  ):  # fmt: skip
    assert found(**change) is None, change
  assert _plain({}) is None


def test_what_several_processes_write(tmp_path, reads):
  """Every other block each, in any order; together it is the whole."""
  trees = [{'w': np.full((40, 30), i, 'f4') + np.arange(30)} for i in (1, 2)]
  sources = [
    (made.save(tmp_path / str(i), tree, chunk_bytes=2400, **PLAIN), 0.5)
    for i, tree in enumerate(trees)
  ]
  out = tmp_path / 'out'
  out.mkdir()
  counts = []
  for i in (1, 0):
    finish = stream.write_part(sources, out, (i, 2), max_bytes=20_000)
    counts.append(len(list((out / 'w').glob('[0-9]*'))))
  finish()
  assert 0 < counts[0] < counts[1]
  reads.clear()
  got = stream.combine([(out, 1.0)], max_bytes=20_000)
  want = {
    'w': np.float32(0.5) * trees[0]['w'] + np.float32(0.5) * trees[1]['w']
  }
  assert reads
  made.assert_same_bits(got, want)


def test_leaf_names_are_places_in_the_result(tmp_path):
  """As Haiku's with slashes; none leads out of it."""
  x = np.arange(6, dtype=np.float32)
  tree = {'lm/~/linear': {'w': x}, 'lm/~': x[:2], 'with a space': x[:1]}
  source = made.save(tmp_path / 'legal', tree)
  stream.merge([(source, 1.0)], tmp_path / 'out')
  made.assert_same_bits(made.restore(tmp_path / 'out'), tree)
  for i, name in enumerate(('../../out', '/out')):
    source = made.save(tmp_path / str(i), {'w': x, name: x})
    with pytest.raises(ValueError, match='written: .* outside the result'):
      stream.merge([(source, 1.0)], tmp_path / 'in/there')
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    '0',
    '1',
    'legal',
    'out',
  ]


@pytest.mark.parametrize(
  ('chunk', 'most', 'want'),
  [
    ((12, 10), 120, (12, 10)),
    ((12, 10), 60, (6, 10)),
    ((12, 10), 59, (4, 10)),
    ((13, 10), 65, (6, 10)),  # a prime number of rows
    ((13, 10), 7, (1, 5)),
    ((13, 11), 7, (1, 7)),
    ((13, 11), 0, (1, 1)),
    ((), 5, ()),
  ],
)
def test_parts_of_a_chunk(chunk, most, want):
  assert chunks.split(chunk, most) == want


def test_primes_are_no_reason_for_many_files(tmp_path, monkeypatch):
  """Orbax stores a leaf of one device as one chunk, whatever its sides are."""
  monkeypatch.setattr(items, '_CHUNK', 4000)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  tree = {'v': draw(7919), 'w': draw(211, 113)}
  # Chunks of a prime number of rows, twice.
  small = made.save(tmp_path / 'small', {'x': draw(2 * 211, 10)}, 8440)
  for path, name in ((made.save(tmp_path / 'in', tree), 'w'), (small, 'x')):
    out = tmp_path / f'out-{name}'
    want = stream.combine([(path, 1.0)])
    stream.merge([(path, 1.0)], out)
    made.assert_same_bits(made.restore(out), want)
    files = [p for p in out.rglob('*') if p.is_file()]
    assert 4 < len(files) < 60
    assert max(p.stat().st_size for p in files) <= 2 * 4220
