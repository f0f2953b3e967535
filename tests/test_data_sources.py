"""Where tokens come from: files, globs, splits, shards and their errors."""

import hashlib
import pathlib
import sysconfig

import numpy as np
import pytest

from lm import data, sources, tokens
from lm.errors import UserError
from tests.test_data import config_of


def write(path, values, dtype='<u2', header=()):
  """Writes a shard: `header` int32 values (padded to 256), then the tokens."""
  head = np.zeros(256 if header else 0, '<i4')
  head[: len(header)] = header
  path.write_bytes(head.tobytes() + np.asarray(values, dtype).tobytes())
  return path


def documents(folder, number, size=40):
  """Text files that contain only their own number, as a byte."""
  for i in range(number):
    file = folder / f'{i % 3}' / f'{i}.txt'
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes([i + 1]) * size)
  return folder


def both_sides(config):
  """Returns the set of tokens of one epoch and that of the validation set."""
  found = data.build(config)
  n = len(found.train._windows)
  seen = {int(x) for i in range(n) for x in set(found.train.batch(i).flat)}
  return seen, set(found.eval_tokens_ES.flat)


# --- python_source


def test_python_source_is_the_standard_library_without_tests():
  c = config_of('python_source', eval__num_sequences=128, seq_len=256)
  found, corpus = data.build(c), sources.load(c)
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  streams = [bytes(s.read(0, len(s))) for s in corpus[:2]]
  # Which file is in which stream: by what the files themselves contain.
  train, evaluation = (s.split(b'\0') for s in streams)
  assert len(train) + len(evaluation) == corpus.num_files > 400
  names = ['ast.py', 'json/decoder.py', 'email/parser.py', 'shutil.py']
  for name in names:
    text = (root / name).read_bytes()
    assert (text in train) != (text in evaluation)
  for name in ('test/test_json/test_decode.py', 'unittest/test/support.py'):
    if (root / name).exists():
      assert (root / name).read_bytes() not in (*train, *evaluation)
  assert not set(train) & {d for d in evaluation if len(d) > 1000}
  windows = [bytes(r.astype(np.uint8)) for r in found.eval_tokens_ES]
  assert all(w in streams[1] for w in windows)
  assert sum(w in streams[0] for w in windows) <= 0.05 * len(windows)
  assert 0.01 < len(streams[1]) / len(streams[0]) < 0.15
  assert found.bytes_per_token == 1.0
  assert found.summary == (
    f'python_source: {corpus.num_files} files, {len(streams[0]) / 1e6:.1f} MB '
    f'train, {len(streams[1]) / 1e6:.1f} MB eval, sha256 {found.fingerprint}'
  )


def test_split_depends_on_the_name_alone():
  names = [f'{i}.py' for i in range(4000)]
  train, evaluation = sources.split_by_hash(names)
  assert sorted(train + evaluation) == list(range(4000))
  assert 150 < len(evaluation) < 250  # 200 +- 14
  digest = hashlib.sha256(names[evaluation[0]].encode()).digest()
  assert int.from_bytes(digest[:4], 'big') / 2**32 <= 0.05
  fewer = names[evaluation[0] :]
  kept = {fewer[i] for i in sources.split_by_hash(fewer)[1]}
  assert kept == {names[i] for i in evaluation}


@pytest.mark.parametrize('n', range(2, 12))
def test_split_of_few_files_leaves_neither_side_empty(n):
  train, evaluation = sources.split_by_hash([f'{i}.txt' for i in range(n)])
  assert train and evaluation


# --- text


def test_text_is_split_by_document(tmp_path):
  glob = documents(tmp_path, 100) / '**' / '*.txt'
  train, evaluation = both_sides(config_of('text', glob))
  assert evaluation - {0} and not (train & evaluation) - {0}
  assert (train | evaluation) - {0} <= set(range(1, 101))
  assert len(train) > 90


def test_text_split_is_the_same_wherever_the_folder_is(tmp_path, monkeypatch):
  marks = []
  for name in ('here', 'else/where'):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    documents(folder, 40)
    c = config_of('text', folder / '**' / '*.txt')
    marks.append(data.build(c).fingerprint)
  monkeypatch.chdir(tmp_path / 'here')
  marks.append(data.build(config_of('text', '**/*.txt')).fingerprint)
  assert len(set(marks)) == 1
  (tmp_path / 'here/0/0.txt').write_bytes(bytes([200]) * 40)
  assert data.build(config_of('text', '**/*.txt')).fingerprint != marks[0]


def test_text_of_few_files_gives_its_last_twentieth(tmp_path):
  (tmp_path / 'a.txt').write_bytes(bytes(range(1, 101)) * 9)
  (tmp_path / 'b.txt').write_bytes(bytes(range(101, 200)))
  corpus = sources.load(config_of('text', tmp_path / '*.txt'))
  whole = bytes(range(1, 101)) * 9 + b'\0' + bytes(range(101, 200))
  assert bytes(corpus.train.read(0, 950)) == whole[:950]
  assert bytes(corpus.evaluation.read(0, 50)) == whole[950:]
  assert (len(corpus.train), len(corpus.evaluation)) == (950, 50)


def test_text_with_two_globs(tmp_path):
  documents(tmp_path, 9)
  c = config_of('text', tmp_path / '[01]' / '*', tmp_path / '2' / '*.txt')
  train, evaluation = both_sides(c)
  assert train == {0, 1, 4, 7, 2, 5, 8}
  assert evaluation - {0} <= {3, 6, 9}


_TEXT_ERRORS = [
  ('', '', 'needs files: set data.train'),
  ('*.tex', '', r"data.train='.*\*.tex' matches no file"),
  ('good.txt', '*.tex', r"data.eval='.*\*.tex' matches no file"),
  ('.', '', 'only directories.*/\\*\\*/\\*'),
  ('*y.txt', '', "1 of 1 files are empty, e.g. '.*empty.txt'"),
  ('good.txt', '*y.txt', "1 of 1 files are empty, e.g. '.*empty.txt'"),
  ('short.txt', 'good.txt', '8 tokens.*seq_len=8 needs 9'),
  ('*.md', '', "'.*lost.md' cannot be read: No such file"),
  ('*.txt', 'g*.txt', "share 1 files, e.g. '.*good.txt'"),
  ('good*', 'same.rst', "share 1 files, e.g. '.*same.rst'"),
  ('same.rst', 'good*', "share 1 files, e.g. '.*good.txt'"),
  ('g*.txt', 'short.txt', 'num_sequences=3.* has 0 sequences'),
]


@pytest.mark.parametrize(('train', 'evaluation', 'message'), _TEXT_ERRORS)
def test_text_errors_are_one_sentence(tmp_path, train, evaluation, message):
  (tmp_path / 'empty.txt').write_bytes(b'')
  (tmp_path / 'short.txt').write_bytes(b'12345678')
  (tmp_path / 'good.txt').write_bytes(b'x' * 2000)
  (tmp_path / 'lost.md').symlink_to(tmp_path / 'nowhere')
  (tmp_path / 'same.rst').symlink_to(tmp_path / 'good.txt')
  globs = [tmp_path / g if g else '' for g in (train, evaluation)]
  with pytest.raises(UserError, match=message) as error:
    data.build(config_of('text', *globs))
  assert '\n' not in str(error.value)


def test_file_without_permission(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').write_bytes(b'x' * 2000)

  def refuse(self):
    raise PermissionError(13, 'Permission denied', str(self))

  monkeypatch.setattr(pathlib.Path, 'read_bytes', refuse)
  with pytest.raises(UserError, match="a.txt' cannot be read: Permission"):
    data.build(config_of('text', tmp_path / '*.txt'))


# --- bin


@pytest.mark.parametrize(
  ('dtype', 'header', 'sidecar'),
  [
    ('<u2', (), None),
    ('<u2', (20240520, 1, 300), None),
    ('<u4', (20240801, 7, 300), None),
    ('<u4', (), '{"dtype": "uint32", "more": [1]}'),
    ('<u1', (), '{"dtype": "uint8"}'),
    ('<u2', (20240520, 1, 300), '{"dtype": "uint16", "vocab_size": 256}'),
  ],
)
def test_shard_formats(tmp_path, dtype, header, sidecar):
  values = np.arange(300) % 256
  file = write(tmp_path / 'a.bin', values, dtype, header)
  if sidecar:
    (tmp_path / 'a.bin.json').write_text(sidecar)
  shard = tokens.open_shard(str(file))
  np.testing.assert_array_equal(shard.tokens, values)
  corpus = sources.load(config_of('bin', file))
  assert (len(corpus.train), len(corpus.evaluation)) == (285, 15)
  assert corpus.bytes_per_token is None


def test_shards_of_two_formats_and_bytes_per_token(tmp_path):
  write(tmp_path / 'a.bin', [1] * 100, '<u4', (20240801, 7, 100))
  for name, size in (('v1.bin', 50), ('v2.bin', 150)):
    write(tmp_path / name, [2] * size)
    (tmp_path / f'{name}.json').write_text(f'{{"bytes": {size * size}}}')
  c = config_of('bin', tmp_path / 'a.bin', tmp_path / 'v?.bin')
  found = data.build(c)
  assert found.bytes_per_token == (50**2 + 150**2) / 200
  assert found.summary.startswith('bin: 3 files, 0.0 M tokens train')
  c.data.train, c.data.eval = c.data.eval, c.data.train
  assert data.build(c).bytes_per_token is None


_LLMC = (20240520, 1, 100)
_ZEROS = np.zeros(100)
# tokens, header, sidecar, what the message says
_BIN_ERRORS = [
  ([], (), '', 'is empty'),
  (_ZEROS[:8], (), '', '8 tokens; one sequence of seq_len=8 needs 9'),
  ([*_ZEROS, 256], (), '', 'token 256, outside model.vocab_size=256; .* 255'),
  (_ZEROS[:99], _LLMC, '', '1222 bytes, but.*100 tokens, 1224 bytes'),
  ([*_ZEROS, 1], _LLMC, '', '1226 bytes, but.*truncated or damaged'),
  (_ZEROS, (20240520, 2, 100), '', 'version 2; legal for magic 20240520: 1'),
  (_ZEROS, _LLMC, '{"dtype": "uint32"}', "'uint32' contradicts.*'uint16'"),
  (_ZEROS, (), '{"vocab_size": 999}', 'vocabulary of 999.*=256 is smaller'),
  (_ZEROS, (), '{"dtype": "int16"}', "'int16' is not.*uint8, uint16, uint32"),
  (_ZEROS, (), '{"dtype": ["uint8"]}', 'is not a dtype'),
  ([*_ZEROS, 0], (), '{"dtype": "uint32"}', '202 bytes, no multiple of 4'),
  (_ZEROS, (), '{dtype', 'not a readable JSON object'),
  (_ZEROS, (), '[1]', 'not a readable JSON object'),
  (_ZEROS, (), '{"bytes": "many"}', "bytes='many' must be an integer"),
]


@pytest.mark.parametrize('knob', ['train', 'eval'])
@pytest.mark.parametrize(
  ('values', 'header', 'sidecar', 'message'), _BIN_ERRORS
)
def test_shard_errors(tmp_path, knob, values, header, sidecar, message):
  bad = write(tmp_path / 'bad.bin', values, '<u2', header)
  if sidecar:
    (tmp_path / 'bad.bin.json').write_text(sidecar)
  _expect(bad, knob, message)


@pytest.mark.parametrize('knob', ['train', 'eval'])
def test_shards_that_are_no_shards(tmp_path, knob):
  bad = tmp_path / 'bad.bin'
  bad.write_bytes(b'123' * 33)
  _expect(bad, knob, '99 bytes, no multiple of 2')
  bad.write_bytes(np.array(_LLMC, '<i4').tobytes())
  _expect(bad, knob, 'ends inside its llm.c header')
  bad.unlink()
  bad.symlink_to(tmp_path / 'nowhere')
  _expect(bad, knob, 'cannot be read: No such file')
  bad.unlink()
  bad.mkdir()
  _expect(bad, knob, 'matches only directories')


def _expect(bad, knob, message):
  good = write(bad.parent / 'good.bin', np.zeros(500))
  c = config_of('bin', good, good)
  c.data[knob] = str(bad)
  with pytest.raises(UserError, match=message) as error:
    data.build(c)
  assert '\n' not in str(error.value)
