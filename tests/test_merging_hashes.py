"""SHA-256 of the inputs in merge.json, and whether a merge is done."""

import hashlib
import json
import threading

import numpy as np
import pytest

from launch.parts import finished
from lm.errors import UserError
from merging.engine import artifact, hashing, safetensors
from tests import merging_items as made
from tests import tools


@pytest.fixture
def inputs(tmp_path):
  for i in (1, 2):
    made.save(tmp_path / f'in/{i}/params', made.params(i))
  return tmp_path / 'in'


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def test_every_file_of_every_input_is_recorded(
  inputs, tmp_path, monkeypatch, capsys
):
  out = tmp_path / 'out'
  flags = [f'--inputs={inputs}', f'--out={out}', '--hash_inputs']
  assert tools.call(monkeypatch, 'merge', *flags) == 0
  about = json.loads((out / 'merge.json').read_text())
  assert list(about['files']) == [row['path'] for row in about['sources']]
  for i in (1, 2):
    item = inputs / f'{i}/params'
    want = {
      str(p.relative_to(item)): hashlib.sha256(p.read_bytes()).hexdigest()
      for p in item.rglob('*')
      if p.is_file()
    }
    assert len(want) > 2 and about['files'][f'../in/{i}/params'] == want
  capsys.readouterr()
  assert tools.call(monkeypatch, 'merge', *flags) == 0
  assert 'is this very merge already' in capsys.readouterr().out
  # A byte that neither the tree nor the manifest has: only this flag sees it.
  victim = max(
    (inputs / '1/params').rglob('d/*'), key=lambda p: p.stat().st_size
  )
  _flip(victim)
  assert tools.call(monkeypatch, 'merge', *flags) == 2
  error = capsys.readouterr().err
  assert 'does not have the SHA-256' in error and victim.name in error
  assert tools.call(monkeypatch, 'merge', *flags[:2]) == 0


def test_a_flipped_byte_in_any_file_changes_it(inputs):
  both = hashing.listing({'a': inputs / '1', 'b': inputs / '2'})
  read = lambda: hashing.digests(both)
  before = read()
  files = [p for p in inputs.rglob('*') if p.is_file()]
  assert len(files) == sum(map(len, before.values())) > 6
  for path in files:
    _flip(path)
    after = read()
    changed = [
      (name, file)
      for name, each in after.items()
      for file in each
      if each[file] != before[name][file]
    ]
    name = {'1': 'a', '2': 'b'}[path.relative_to(inputs).parts[0]]
    place = path.relative_to(inputs / {'a': '1', 'b': '2'}[name])
    assert changed == [(name, str(place))]
    _flip(path)
  assert read() == before


def test_hashing_is_beside_the_merge_and_off_by_default(
  inputs, tmp_path, monkeypatch
):
  threads, hashed, real = set(), set(), hashing.sha256

  def digest(path):
    threads.add(threading.current_thread().name[:-1])
    hashed.add(path)
    return real(path)

  monkeypatch.setattr(hashing, 'sha256', digest)
  sources = [(inputs / f'{i}/params', 0.5) for i in (1, 2)]
  write = lambda name, **more: artifact.write(
    tmp_path, name, sources=sources, provenance={}, **more
  )
  plain = json.loads((write('plain') / 'merge.json').read_text())
  assert 'files' not in plain
  assert {p.name for p in hashed} == {'_METADATA', 'manifest.ocdbt'}
  write('hashed', hashed={'x': inputs})
  assert hashed == {p for p in inputs.rglob('*') if p.is_file()}
  assert threads == {'sha256_'}

  def unreadable(path):
    raise ValueError(f"'{path}' cannot be hashed")

  monkeypatch.setattr(hashing, 'sha256', unreadable)
  with pytest.raises(ValueError, match='cannot be hashed'):
    write('failed', hashed={'x': inputs})
  assert sorted(p.name for p in (tmp_path / 'merged').iterdir()) == [
    'hashed',
    'plain',
  ]
  monkeypatch.undo()
  with pytest.raises(ValueError, match="gone' cannot be hashed: No such file"):
    hashing.sha256(tmp_path / 'gone')


@pytest.mark.parametrize(
  'gone', ['block.w', '_METADATA', 'scale/.zarray', 'scale/0']
)
def test_a_merge_that_cannot_be_read_is_not_done(
  inputs, tmp_path, monkeypatch, capsys, gone
):
  out = tmp_path / 'out'
  flags = [f'--inputs={inputs}', f'--out={out}']
  assert tools.call(monkeypatch, 'merge', *flags) == 0
  assert tools.call(monkeypatch, 'merge', *flags) == 0
  (out / 'params' / gone).rename(tmp_path / 'gone')
  capsys.readouterr()
  assert tools.call(monkeypatch, 'merge', *flags) == 2
  error = capsys.readouterr().err
  assert 'is incomplete' in error and error.count('\n') == 1, error


def test_a_merge_of_a_merge_that_lost_a_chunk(
  inputs, tmp_path, monkeypatch, capsys
):
  """The source is another one, then: not what the merge was made of."""
  first, out = tmp_path / 'first-3', tmp_path / 'out'
  again = [f'--inputs={first},{inputs}/2', f'--out={out}']
  for flags in ([f'--inputs={inputs}', f'--out={first}'], again, again):
    assert tools.call(monkeypatch, 'merge', *flags) == 0
  (first / 'params/scale/0').unlink()
  capsys.readouterr()
  assert tools.call(monkeypatch, 'merge', *again) == 2
  printed = capsys.readouterr()
  assert 'this very merge' not in printed.out
  assert printed.err.count('\n') == 1, printed.err


def test_safetensors_without_their_tensors_are_not_done(tmp_path):
  about = {'method': {}, 'sources': [], 'accumulate': 'x', 'dtype': 'x'}
  (tmp_path / 'merge.json').write_text(json.dumps(about))
  header = {'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}
  text, size, _ = safetensors._layout(header, None)
  model = tmp_path / 'model.safetensors'
  model.write_bytes(text + np.ones(2, 'f4').tobytes())
  assert size == 8 and finished.is_done(tmp_path, about, ('',))
  model.write_bytes(text)
  with pytest.raises(UserError, match='64 bytes, but 72 .*; remove it'):
    finished.is_done(tmp_path, about, ('',))
  model.unlink()
  with pytest.raises(UserError, match='is incomplete'):
    finished.is_done(tmp_path, about, ('',))
