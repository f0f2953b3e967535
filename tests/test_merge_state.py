"""launch.merge --state and --config.init_state: averaged optimizer states."""

import json
import shutil

import numpy as np
import pytest

from lm import address, checkpoint, fingerprint, loop
from lm.errors import UserError
from merging.engine import items
from tests import helpers, tools

STEPS = (4, 8, 12)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with the merges 'with' (--state) and 'without'."""
  path = tmp_path_factory.mktemp('run')
  loop.train(helpers.config('schedule=constant'), path)
  with pytest.MonkeyPatch.context() as patch:
    assert merge(patch, path, '--state', '--name=with') == 0
    assert merge(patch, path, '--name=without') == 0
  return path


def merge(patch, run, *arguments, steps=STEPS):
  if steps:
    arguments = f'--steps={",".join(map(str, steps))}', *arguments
  given = 'merge', f'--run={run}', '--method=wma', *arguments
  return tools.call(patch, *given)


def state(item):
  """{path without types: array} of an optimizer state."""
  tree = checkpoint.restore_tree(item, checkpoint.abstract_item(item))
  found = helpers.flat({'opt_state': tree['opt_state']})
  return {fingerprint.untyped(k): v for k, v in found.items()}


def of_step(run, step):
  return state(address.item(run, step, 'train'))


def test_the_state_is_the_weighted_sum_to_the_last_bit(run):
  rows = json.loads((run / 'merged/with/merge.json').read_text())
  c = np.array([r['coefficient'] for r in rows['sources']], np.float32)
  assert rows['state']['optimizer'] == 'adamw'
  parts = [of_step(run, s) for s in STEPS]
  got = state(run / 'merged/with/state')
  assert got.keys() == parts[0].keys()
  for key, x in got.items():
    want = parts[-1][key]  # a counter: of the newest
    if x.dtype.kind == 'f':
      want = c[0] * parts[0][key]
      for weight, part in zip(c[1:], parts[1:], strict=True):
        want = want + weight * part[key]
      assert (want != parts[-1][key]).any()  # the test can fail
    assert x.dtype == want.dtype
    np.testing.assert_array_equal(x, want, err_msg=key)
  kinds = {x.dtype.kind for x in got.values()}
  assert kinds == {'f', 'i'} and any('nu' in key for key in got)


def test_training_starts_with_it_and_without_it_as_ever(run, tmp_path):
  init = lambda name: {'init': f'{run}/merged/{name}', 'num_steps': 2}
  loop.train(helpers.config(**init('with'), init_state=True), tmp_path / 'a')
  got = of_step(tmp_path / 'a', 0)
  for key, want in state(run / 'merged/with/state').items():
    np.testing.assert_array_equal(got[key], want, err_msg=key)
  assert helpers.leaves(tmp_path / 'a', 0, 'train')["['step']"] == 0
  loop.train(helpers.config(**init('with')), tmp_path / 'b')
  loop.train(helpers.config(**init('without')), tmp_path / 'c')
  helpers.assert_same_run(tmp_path / 'b', tmp_path / 'c')
  fresh = of_step(tmp_path / 'b', 0)
  assert not any(x.any() for x in fresh.values())
  assert helpers.lines(tmp_path / 'a') != helpers.lines(tmp_path / 'b')


@pytest.mark.parametrize(
  ('arg', 'knobs', 'sentence'),
  [
    ('', {'init': '{}/merged/without'}, 'no optimizer state: merge with'),
    ('', {'init': '{}@12'}, "init='RUN/merged/NAME', not '.*@12'"),
    ('', {}, "init='RUN/merged/NAME', not ''"),
    ('optimizer=lion', {'init': '{}/merged/with'}, 'that of adamw and .* lion'),
    (
      '',
      {'init': '{}/merged/with', 'project': 'nap'},
      'does not fit this adam',
    ),
  ],
)
def test_a_state_that_does_not_fit(run, tmp_path, arg, knobs, sentence):
  knobs = {k: v.format(run) for k, v in knobs.items()}
  with pytest.raises(UserError, match=sentence):
    loop.train(helpers.config(arg, **knobs, init_state=True), tmp_path / 'x')
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
  ('flags', 'steps', 'sentence'),
  [
    (['--means'], (), '--means does not go with --state'),
    (['--stored=trackers'], STEPS, '--stored does not go with --state'),
    (['--inputs=x', '--run=', '--out=y'], STEPS, '--state needs --run'),
    (
      ['--method=interpolate:weight=1.5,signed=True'],
      (4, 12),
      'refuses the coefficient -0.5 of',
    ),
  ],
)
def test_merges_without_a_state(
  run, monkeypatch, capsys, flags, steps, sentence
):
  before = sorted(run.rglob('*'))
  flags = '--state', '--name=x', *flags
  assert merge(monkeypatch, run, *flags, steps=steps) == 2
  assert sentence in capsys.readouterr().err
  assert sorted(run.rglob('*')) == before


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_a_merge_of_less_precision_is_verified_and_trains(
  run, tmp_path, monkeypatch, dtype
):
  assert merge(monkeypatch, run, f'--dtype={dtype}', f'--name={dtype}') == 0
  item = run / 'merged' / dtype / 'params'
  config = helpers.config(init=str(item.parent), num_steps=1)
  assert loop.train(config, tmp_path) == 'done'
  key = "['block_0']['attn']['q']"
  stored = helpers.flat(
    checkpoint.restore_tree(item, checkpoint.abstract_item(item))
  )[key]
  first = helpers.leaves(tmp_path, 0, 'params')[key]
  assert (stored.dtype, first.dtype) == (dtype, 'float32')
  np.testing.assert_array_equal(stored.astype('float32'), first)


def test_a_run_cannot_read_float64(run, monkeypatch, capsys):
  assert merge(monkeypatch, run, '--dtype=float64', '--name=wide') == 2
  assert 'legal: float32, bfloat16, float16' in capsys.readouterr().err


@pytest.mark.parametrize('damage', ['number', 'byte', 'gone'])
def test_a_state_that_is_damaged_or_gone_leaves_no_merge(
  run, tmp_path, monkeypatch, capsys, damage
):
  path = tmp_path / 'a'
  shutil.copytree(run, path, ignore=shutil.ignore_patterns('merged'))
  train = address.item(path, 8, 'train')
  if damage == 'number':  # a legal store: only the fingerprint can tell
    name = next(n for n in items.leaves(items.metadata(train)) if '.mu' in n)
    leaf = items.open_leaf(train, items.metadata(train), name, items.context())
    leaf[...] = leaf.read().result() * np.float32(1.0001)
    sentence = 'Checkpoint'
  elif damage == 'byte':  # anywhere: tensorstore or the fingerprint tells
    for victim in train.rglob('d/*'):
      content = bytearray(victim.read_bytes())
      content[::97] = bytes(x ^ 1 for x in content[::97])
      victim.write_bytes(content)
    sentence = str(train)
  else:
    shutil.rmtree(train)
    sentence = 'has no optimizer state for --state'
  assert merge(monkeypatch, path, '--state') == 2
  error = capsys.readouterr().err
  assert sentence in error
  assert error.count('\n') == 1
  assert not (path / 'merged').exists()


@pytest.mark.parametrize('text', ['{"state": 3}', '{"method": {}}', '[]', '{'])
def test_an_edited_manifest_is_one_sentence(run, tmp_path, text):
  merged = shutil.copytree(run / 'merged/with', tmp_path / 'merged/with')
  (merged / 'merge.json').write_text(text)
  config = helpers.config(init=str(merged), init_state=True, num_steps=2)
  with pytest.raises(UserError, match='merge.json'):
    loop.train(config, tmp_path / 'x')
