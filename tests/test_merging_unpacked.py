"""Chunks larger than the bound on memory are decoded into files, or read so."""

import json
import zlib

import numpy as np
import pytest
import tensorstore as ts

from merging.engine import chunks, plain, stream
from tests import merging_items as made

BF16 = ts.bfloat16.numpy_dtype
_SMALL = 20_000  # bytes; the chunks below have 24,000 and more


@pytest.fixture
def unpacked(monkeypatch):
  """The arrays that were decoded."""
  seen, real = [], plain.unpack

  def unpack(like, stored, folder):
    seen.append(like.shape)
    return real(like, stored, folder)

  monkeypatch.setattr(plain, 'unpack', unpack)
  return seen


def _tree(seed, dtype):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
  return {'w': draw(97, 130), 'deep': {'x': draw(3, 170, 31)}, 'v': draw(7)}


def _files(folder):
  return {
    p.relative_to(folder): p.read_bytes()
    for p in folder.rglob('*')
    if p.is_file()
  }


@pytest.mark.parametrize('handler', made.FORMATS.values(), ids=made.FORMATS)
@pytest.mark.parametrize('dtype', [np.float32, BF16])
def test_the_bits_of_a_merge_with_room(tmp_path, unpacked, handler, dtype):
  sources = [
    (made.save(tmp_path / str(i), _tree(i, dtype), **handler), c)
    for i, c in enumerate([0.2, 0.3, 0.5])
  ]
  before = [_files(path) for path, _ in sources]
  want = stream.combine(sources)
  assert not unpacked
  out = tmp_path / 'out'
  stream.merge(sources, out, max_bytes=_SMALL)
  assert unpacked == [(3, 170, 31)] * 3 + [(97, 130)] * 3
  made.assert_same_bits(made.restore(out), want)
  made.assert_same_bits(stream.combine(sources, max_bytes=_SMALL), want)
  assert [_files(path) for path, _ in sources] == before
  assert sorted(p.name for p in out.iterdir()) == [
    '_METADATA', 'deep.x', 'v', 'w',
  ]  # fmt: skip


@pytest.mark.parametrize('handler', made.FORMATS.values(), ids=made.FORMATS)
def test_several_large_chunks_and_one_array_that_is_not_encoded(
  tmp_path, unpacked, handler
):
  """The blocks of one array cut the chunks of the others."""
  x = [_tree(i, np.float32) for i in range(3)]
  save = lambda i, size, **more: made.save(
    tmp_path / str(i), x[i], size, **handler, **more
  )
  last = {} if handler.get('use_zarr3') else {'use_compression': False}
  paths = [save(0, 30_000), save(1, 40_000), save(2, None, **last)]
  sources = list(zip(paths, [0.25, 0.25, 0.5], strict=True))
  want = stream.combine(sources)
  assert not unpacked
  got = stream.combine(sources, max_bytes=_SMALL)
  made.assert_same_bits(got, want)
  assert len(unpacked) == (4 if last else 6)


def test_any_part_of_an_array_in_chunks(tmp_path):
  want = np.arange(13 * 10 * 11, dtype=np.float32).reshape(13, 10, 11)
  path = made.save(tmp_path / 'x', {'w': want}, 300)
  layout = chunks.layout(chunks.values(path), 'w')
  assert len(layout.stored) > 4 and layout.codec == 'zstd'
  assert layout.plain() is None
  array = plain.unpack(layout.array, layout.stored, tmp_path)
  rng = np.random.default_rng(0)
  for _ in range(50):
    pairs = (np.sort(rng.choice(n + 1, 2, replace=False)) for n in want.shape)
    index = tuple(slice(int(a), int(b)) for a, b in pairs)
    np.testing.assert_array_equal(array.read(index), want[index])


def test_one_large_chunk_that_is_not_encoded(tmp_path, unpacked):
  path = tmp_path / 'item'
  with_room = made.save(tmp_path / 'x', _tree(0, np.float32))
  stream.merge([(with_room, 1.0)], path)
  about = path / 'w' / '.zarray'
  assert json.loads(about.read_text())['chunks'] == [97, 130]
  got = stream.combine([(path, 1.0)], max_bytes=_SMALL)
  made.assert_same_bits(got, _tree(0, np.float32))
  assert not unpacked


def test_integers_of_the_newest(tmp_path, unpacked):
  tree = lambda i: {'n': np.arange(9000, dtype=np.int32) + i}
  sources = [(made.save(tmp_path / str(i), tree(i)), 0.5) for i in range(2)]
  got = stream.combine(sources, max_bytes=_SMALL, integers=True)
  np.testing.assert_array_equal(got['n'], tree(1)['n'])
  assert unpacked == [(9000,)]  # the older one is not read


def _damaged(value, how):
  cut = {'cut': value[: len(value) // 2], 'empty': b'', 'other': b'x' * 99}
  return cut[how]


@pytest.mark.parametrize('how', ['cut', 'empty', 'other'])
def test_damage_is_a_sentence_and_leaves_nothing(tmp_path, unpacked, how):
  tree = {'w': np.ones((97, 130), np.float32)}
  path = made.save(tmp_path / 'in', tree, use_ocdbt=False)
  chunk = path / 'w' / '0.0'
  chunk.write_bytes(_damaged(chunk.read_bytes(), how))
  message = "leaf 'w' of .* cannot be unpacked: chunk .0, 0. is damaged"
  with pytest.raises(ValueError, match=message):
    stream.merge([(path, 1.0)], tmp_path / 'out', max_bytes=_SMALL)
  assert unpacked
  assert [p.name for p in tmp_path.iterdir()] == ['in']


def test_a_chunk_of_another_size(tmp_path, unpacked):
  """Its metadata says 97 rows; 96 and 98 are stored."""
  for rows in (96, 98):
    tree = {'w': np.ones((rows, 130), np.float32)}
    path = made.save(tmp_path / str(rows), tree, use_ocdbt=False)
    about = path / 'w' / '.zarray'
    text = about.read_text()
    assert text.count(str(rows)) == 2
    about.write_text(text.replace(str(rows), '97'))
    with pytest.raises(
      ValueError, match=f'says .* {rows * 520} bytes, not 50440'
    ):
      stream.combine([(path, 1.0)], max_bytes=_SMALL)
  assert len(unpacked) == 2


def test_no_space_for_it_is_a_sentence(tmp_path, monkeypatch):
  """It names the folder of the result, whose disk is full, not the source."""
  path = made.save(tmp_path / 'in', _tree(0, np.float32))
  real = plain.tempfile.TemporaryFile

  class Full:
    def __init__(self, **knobs):
      self._file = real(**knobs)
      self.fileno, self.tell = self._file.fileno, self._file.tell

    def write(self, _):
      raise OSError(28, 'No space left on device')

  monkeypatch.setattr(plain.tempfile, 'TemporaryFile', Full)
  message = r"'deep.x' of '.*/\.out\.tmp-.*' cannot be unpacked: No space left"
  with pytest.raises(ValueError, match=message):
    stream.merge([(path, 1.0)], tmp_path / 'out', max_bytes=_SMALL)
  assert [p.name for p in tmp_path.iterdir()] == ['in']


def test_other_codecs_must_fit(tmp_path, unpacked):
  want = np.ones((97, 130), np.float32)
  path = made.save(tmp_path / 'in', {'w': want}, use_ocdbt=False)
  about = json.loads((path / 'w' / '.zarray').read_text())
  about['compressor'] = {'id': 'zlib', 'level': 1}
  (path / 'w' / '.zarray').write_text(json.dumps(about))
  (path / 'w' / '0.0').write_bytes(zlib.compress(want.tobytes(), 1))
  made.assert_same_bits(stream.combine([(path, 1.0)]), {'w': want})
  with pytest.raises(ValueError, match="leaf 'w' is stored in chunks of"):
    stream.combine([(path, 1.0)], max_bytes=_SMALL)
  zstd = made.save(tmp_path / 'zstd', {'w': want}), 0.5
  with pytest.raises(ValueError, match="leaf 'w' is stored in chunks of"):
    stream.combine([zstd, (path, 0.5)], max_bytes=_SMALL)
  assert not unpacked


@pytest.mark.parametrize('dtype', ['u1', 'i1'])
def test_bytes(tmp_path, unpacked, dtype):
  tree = {'n': np.arange(50_000).astype(dtype)}
  source = made.save(tmp_path / 'in', tree), 1.0
  got = stream.combine([source], max_bytes=_SMALL, integers=True)
  made.assert_same_bits(got, tree)
  assert unpacked


_LITTLE = {'name': 'bytes', 'configuration': {'endian': 'little'}}
_BIG = {'name': 'bytes', 'configuration': {'endian': 'big'}}
_ZSTD = {'name': 'zstd'}


def _zarr3(name='sharding_indexed', key='default', **inside):
  inside = {'chunk_shape': [4], 'codecs': [_LITTLE, _ZSTD]} | inside
  meta = {
    'shape': [4],
    'data_type': 'float32',
    'chunk_grid': {'configuration': {'chunk_shape': [4]}},
    'chunk_key_encoding': {'name': key},
    'codecs': [{'name': name, 'configuration': inside}],
  }
  return chunks.layout({'w/zarr.json': json.dumps(meta), 'w/c/0': b'x'}, 'w')


def test_other_kinds_of_zarr3_are_left_to_tensorstore():
  good = _zarr3()
  assert good.codec == 'zstd' and good.stored == {(0,): b'x'}
  for change in (
    {'name': 'other'}, {'key': 'v2'}, {'chunk_shape': [2]},
    {'index_location': 'start'}, {'codecs': [_BIG, _ZSTD]},
    {'codecs': [_LITTLE]}, {'codecs': [_LITTLE, _ZSTD, {'name': 'crc32c'}]},
  ):  # fmt: skip
    assert _zarr3(**change) is None, change


def test_chunks_that_are_left_out_must_fit(tmp_path, unpacked):
  """Where Orbax says so they are zeros, else lost: TensorStore decides."""
  want = np.zeros((97, 130), np.float32)
  path = made.save(tmp_path / 'in', {'w': want}, use_ocdbt=False)
  (path / 'w' / '0.0').unlink()
  about = json.loads((path / '_METADATA').read_text())
  about['store_array_data_equal_to_fill_value'] = False
  (path / '_METADATA').write_text(json.dumps(about))
  made.assert_same_bits(stream.combine([(path, 1.0)]), {'w': want})
  with pytest.raises(ValueError, match="leaf 'w' is stored in chunks of"):
    stream.combine([(path, 1.0)], max_bytes=_SMALL)
  assert not unpacked
