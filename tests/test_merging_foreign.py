"""Checkpoints of other programs, merged by the documented command."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from merging.engine import safetensors, stream
from tests import helpers, tools
from tests import merging_items as made


def _params(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return {
    'dense': {'kernel': draw(3, 4), 'layer.norm': draw(4)},
    'embed': draw(5, 3).astype(jnp.bfloat16),
    'blocks': [draw(2), [draw(), draw(2, 1, 2)]],
  }


def _state(seed):
  params = _params(seed)
  return {
    'step': jnp.int32(seed),
    'params': params,
    'opt_state': optax.adam(1.0).init(params),
  }


def _nanodo(root, step):
  """One item `state` in a CheckpointManager, as nanodo and simply save."""
  handlers = {'state': ocp.Checkpointer(ocp.PyTreeCheckpointHandler())}
  manager = ocp.CheckpointManager(root, handlers)
  manager.save(step, {'state': _state(step)})
  manager.close()


def _maxtext(root, step):
  """One item `items` in zarr 3, with params in params."""
  handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
  with ocp.CheckpointManager(
    root, item_names=('items',), item_handlers={'items': handler}
  ) as manager:
    state = {**_state(step), 'params': {'params': _params(step)}}
    args = ocp.args.Composite(items=ocp.args.PyTreeSave(state))
    manager.save(step, args=args)


def _plain(root, step):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(root / str(step), _params(step))


LAYOUTS = {
  'nanodo': (_nanodo, 'state', lambda t: t['params']),
  'maxtext': (_maxtext, 'items', lambda t: t['params']['params']),
  'plain': (_plain, '', lambda t: t),
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  root = tmp_path_factory.mktemp('foreign')
  for name, (save, _, _) in LAYOUTS.items():
    for step in (10, 20, 40):
      save(root / name, step)
  return root


def _merge(monkeypatch, *arguments):
  return tools.call(monkeypatch, 'merge', *arguments)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_orbax_trees_of_other_trainers(saved, tmp_path, monkeypatch, layout):
  _, item, params = LAYOUTS[layout]
  out = tmp_path / 'out'
  code = _merge(
    monkeypatch,
    f'--inputs={saved / layout}',
    '--steps=40,20',
    '--method=wma',
    f'--out={out}',
  )
  assert code == 0
  # Plain Orbax reads the result: optimizer and step are not in it.
  with ocp.StandardCheckpointer() as checkpointer:
    got = checkpointer.restore(out / item)
  assert layout == 'plain' or set(got) == {'params'}
  one, two = _params(20), _params(40)
  for got_leaf, a, b in zip(
    *map(jax.tree.leaves, (params(got), one, two)), strict=True
  ):
    want = np.asarray(a, 'f4') / 3 + np.asarray(b, 'f4') * 2 / 3
    assert got_leaf.dtype == a.dtype
    atol = 1e-6 if a.dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(got_leaf, 'f4'), want, atol=atol)
  assert jax.tree.structure(params(got)) == jax.tree.structure(one)
  about = json.loads((out / 'merge.json').read_text())
  assert [r['step'] for r in about['sources']] == [20, 40]
  assert about['method']['name'] == 'wma'


def test_the_tree_is_found_or_named(saved, tmp_path, monkeypatch, capsys):
  inputs = f'--inputs={saved}/nanodo/10,{saved}/nanodo/20'
  trees = ('', 'state.params', 'state.params.dense', 'params', 'params.dense')
  for i, tree in enumerate(trees):
    out = tmp_path / str(i)
    assert _merge(monkeypatch, inputs, f'--tree={tree}', f'--out={out}') == 0
    meta = json.loads((out / 'state' / '_METADATA').read_text())
    assert len(meta['tree_metadata']) == (2 if 'dense' in tree else 6)
  inputs_ = f'--inputs={saved}/maxtext'
  out = tmp_path / 'maxtext'
  assert (
    _merge(monkeypatch, inputs_, '--tree=params.params', f'--out={out}') == 0
  )
  again = _merge(monkeypatch, inputs, f'--out={tmp_path}/0')
  assert again == 0 and 'this very merge already' in capsys.readouterr().out


# Safetensors: an independent writer and reader of ten lines each.
def _write(path, tensors):
  header, data = {'__metadata__': {'format': 'pt'}}, b''
  names = {'float32': 'F32', 'bfloat16': 'BF16', 'int64': 'I64'}
  for name, x in tensors.items():
    raw = x.tobytes()
    header[name] = {
      'dtype': names[x.dtype.name],
      'shape': x.shape,
      'data_offsets': [len(data), len(data) + len(raw)],
    }
    data += raw
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


def _read(path):
  raw, kinds = path.read_bytes(), {'F32': 'f4', 'BF16': ml_dtypes.bfloat16}
  n = int.from_bytes(raw[:8], 'little')
  header = json.loads(raw[8 : 8 + n])
  assert header.pop('__metadata__') == {'format': 'pt'}
  return {
    k: np.frombuffer(
      raw[8 + n + v['data_offsets'][0] : 8 + n + v['data_offsets'][1]],
      kinds[v['dtype']],
    ).reshape(v['shape'])
    for k, v in header.items()
  }


def _tensors(seed):
  rng = np.random.default_rng(seed)
  return {
    'model.embed.weight': rng.standard_normal((7, 3)).astype('f4'),
    'model.norm.weight': rng.standard_normal(3).astype(ml_dtypes.bfloat16),
    'lm_head.weight': rng.standard_normal((2, 3, 2)).astype('f4'),
    'scale': np.asarray(rng.standard_normal(), 'f4'),
  }


def _model(folder, seed, shards):
  folder.mkdir(parents=True)
  tensors = _tensors(seed)
  (folder / 'config.json').write_text('{"model_type": "llama"}')
  if shards == 1:
    _write(folder / 'model.safetensors', tensors)
    return folder
  where = {}
  for i, part in enumerate((list(tensors)[:2], list(tensors)[2:])):
    name = f'model-0000{i + 1}-of-00002.safetensors'
    _write(folder / name, {k: tensors[k] for k in part})
    where |= dict.fromkeys(part, name)
  index = {'metadata': {'total_size': 1}, 'weight_map': where}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


@pytest.mark.parametrize('shards', [1, 2])
def test_safetensors_models(tmp_path, monkeypatch, shards):
  for step in (500, 1000):
    _model(tmp_path / f'run/checkpoint-{step}', step, shards)
  out = tmp_path / 'out'
  code = _merge(
    monkeypatch, f'--inputs={tmp_path}/run', '--method=wma', f'--out={out}'
  )
  assert code == 0
  got = {}
  for path in out.glob('*.safetensors'):
    got |= _read(path)
  one, two = _tensors(500), _tensors(1000)
  assert got.keys() == one.keys()
  for name, x in got.items():
    want = one[name].astype('f8') / 3 + two[name].astype('f8') * 2 / 3
    assert x.dtype == one[name].dtype
    atol = 2e-7 if x.dtype == np.float32 else 1e-2
    np.testing.assert_allclose(x.astype('f8'), want, atol=atol)
  names = {p.name for p in out.iterdir()}
  assert {'config.json', 'merge.json'} < names
  assert ('model.safetensors.index.json' in names) == (shards == 2)
  about = json.loads((out / 'merge.json').read_text())
  assert len({r['sha256'] for r in about['sources']}) == 2


def test_one_safetensors_model_in_other_types_and_blocks(tmp_path):
  """c = 1 is the same bits; float32 from bfloat16 is exact; any block size."""
  from merging.engine import stream

  source = _model(tmp_path / 'a', 1, 1)
  stream.merge([(source, 1.0)], tmp_path / 'same')
  stream.merge([(source, 1.0)], tmp_path / 'wide', dtype='float32')
  other = _model(tmp_path / 'b', 2, 1)
  both = [(source, 0.3), (other, 0.7)]
  stream.merge(both, tmp_path / 'large')
  stream.merge(both, tmp_path / 'small', max_bytes=100)
  read = lambda name: _read(tmp_path / name / 'model.safetensors')
  for name, x in _tensors(1).items():
    assert read('same')[name].tobytes() == x.tobytes()
    np.testing.assert_array_equal(read('wide')[name], x.astype('f4'))
    assert read('small')[name].tobytes() == read('large')[name].tobytes()
  whole = stream.combine(both)
  for name, x in read('large').items():
    assert whole[name].tobytes() == x.tobytes()


@pytest.mark.oracle
def test_the_reference_package_reads_a_merge(tmp_path):
  numpy = pytest.importorskip('safetensors.numpy')
  from merging.engine import stream

  source = tmp_path / 'a'
  source.mkdir()
  tensors = {k: v for k, v in _tensors(1).items() if v.dtype == np.float32}
  numpy.save_file(tensors, source / 'model.safetensors')
  stream.merge([(source, 1.0)], tmp_path / 'out')
  got = numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  for name, x in tensors.items():
    np.testing.assert_array_equal(got[name], x)


def test_the_dtype_of_the_result_is_in_its_config(tmp_path, monkeypatch):
  for i in (1, 2):
    folder = _model(tmp_path / f'm-{i}', i, 1)
    (folder / 'config.json').write_text(f'{{"torch_dtype": "float{16 * i}"}}')
  words = f'--inputs={tmp_path}/m-1,{tmp_path}/m-2', f'--out={tmp_path}/out'
  assert _merge(monkeypatch, *words, '--dtype=bfloat16') == 0
  text = (tmp_path / 'out' / 'config.json').read_text()
  assert json.loads(text) == {'torch_dtype': 'bfloat16'}


def test_checkpoints_of_other_models_are_refused(tmp_path, monkeypatch, capsys):
  """The shapes are the same, the functions are not."""
  folders = [_model(tmp_path / f'm-{i}', i, 1) for i in (1, 2)]
  for folder, theta in zip(folders, (1e4, 500.0), strict=True):
    (folder / 'config.json').write_text(json.dumps({'rope_theta': theta}))
  files = [folder / 'model.safetensors' for folder in folders]
  runs = [tmp_path / 'a', tmp_path / 'b']
  for run, activation in zip(runs, ('silu', 'relu2'), strict=True):
    params = made.params(len(activation))
    made.save(run / 'checkpoints' / '3' / 'params', params)
    config = helpers.config(model__activation=activation)
    (run / 'config.json').write_text(json.dumps(config.to_dict()))
    (run / 'meta.json').write_text('{}')
  for inputs, sentence in (
    (folders, "m-2/config.json' has rope_theta=500.0, '"),
    (files, "m-2/config.json' has rope_theta=500.0, '"),
    ([r / 'checkpoints/3' for r in runs], "has model.activation='relu2', '"),
  ):
    words = ','.join(map(str, inputs)), f'--out={tmp_path}/out', '--steps=1,2'
    assert _merge(monkeypatch, f'--inputs={words[0]}', *words[1:]) == 2
    error = capsys.readouterr().err
    assert sentence in error and 'another model' in error, error
  assert not (tmp_path / 'out').exists()


def _damage(folder, change):
  path = folder / 'model.safetensors'
  raw = bytearray(path.read_bytes())
  change(raw)
  path.write_bytes(bytes(raw))


DAMAGE = {
  'truncated': (lambda raw: raw.__delitem__(slice(-3, None)), 'are described'),
  'no header': (
    lambda raw: raw.__setitem__(slice(0, 8), b'\xff' * 8),
    'header',
  ),
  'not JSON': (lambda raw: raw.__setitem__(8, 0), 'is not a readable'),
  'empty': (lambda raw: raw.clear(), 'header of 0 bytes'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_safetensors(tmp_path, monkeypatch, capsys, damage):
  change, message = DAMAGE[damage]
  models = [_model(tmp_path / f'm-{i}', i, 1) for i in (1, 2)]
  _damage(models[1], change)
  inputs = ','.join(map(str, models))
  code = _merge(monkeypatch, f'--inputs={inputs}', f'--out={tmp_path}/out')
  error = capsys.readouterr().err
  assert code == 2 and message in error and error.count('\n') == 1, error
  assert not (tmp_path / 'out').exists()


def test_safetensors_that_do_not_fit(tmp_path, monkeypatch, capsys):
  def check(message, *extra):
    inputs = f'--inputs={tmp_path}/m-1,{tmp_path}/m-2'
    code = _merge(monkeypatch, inputs, f'--out={tmp_path}/out', *extra)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count('\n') == 1, error
    assert not (tmp_path / 'out').exists()

  _model(tmp_path / 'm-1', 1, 1)
  two = _model(tmp_path / 'm-2', 2, 1) / 'model.safetensors'
  good = _tensors(2)
  _write(two, {k: v for k, v in good.items() if k != 'scale'})
  check("leaf 'scale' is not in both")
  _write(two, {**good, 'scale': np.ones(2, 'f4')})
  check("leaf 'scale' is float32() in")
  _write(two, {**good, 'scale': good['scale'].astype(ml_dtypes.bfloat16)})
  check("leaf 'scale' is float32() in")
  _write(two, good)
  check("has no tree 'params'", '--tree=params')
  check('(as given): each checkpoint has its own step', '--steps=3,3')
  check('--steps has 1 for 2 inputs', '--steps=3')
  check("out' lies in", f'--out={tmp_path}/m-1/deep/out')
  check("dtype='int8' is unknown", '--dry_run', '--dtype=int8')
  check('--run and --inputs exclude each other', '--run=x')
  check('--window needs --run', '--window=10')
  check('from_run needs --run', '--method=from_run')
  for i in (1, 2):
    path = tmp_path / f'm-{i}' / 'model.safetensors'
    _write(path, {**good, 'position_ids': np.arange(3)})
  check("leaf 'position_ids' of")
  check("leaf 'position_ids' of", '--dry_run')
  sources = [(tmp_path / f'm-{i}', 0.5) for i in (1, 2)]
  stream.merge(sources, tmp_path / 'x', integers=True, dtype='bfloat16')
  (header,) = safetensors.Folder(tmp_path / 'x').headers.values()
  kinds = {
    k: v['dtype']
    for k, v in header[1].items()
    if k in ('scale', 'position_ids')
  }
  assert kinds == {'scale': 'BF16', 'position_ids': 'I64'}
  _write(two, good)
  (two.parent / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': {**dict.fromkeys(good, two.name), 'x': two.name}})
  )
  check("leaf 'x' of")
  (two.parent / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': {'x': 'x.safetensors'}})
  )
  _write(two.parent / 'x.safetensors', {'x': np.ones(2, 'f4')})
  check('does not name it: two models')


def test_mistakes_with_orbax_trees(saved, tmp_path, monkeypatch, capsys):
  def check(message, *arguments):
    code = _merge(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count('\n') == 1, error
    assert not (tmp_path / 'out').exists()

  out = f'--out={tmp_path}/out'
  check('--out is missing', f'--inputs={saved}/plain')
  check(
    'no step 30; it has: 10, 20, 40',
    f'--inputs={saved}/plain',
    out,
    '--steps=10,30',
  )
  check('does not exist', f'--inputs={saved}/nothing', out)
  check("no leaf below 'stat'", f'--inputs={saved}/nanodo', out, '--tree=stat')
  check("no leaf below 'x'", f'--inputs={saved}/nanodo', out, '--tree=state.x')
  check(
    'is int32; only', f'--inputs={saved}/nanodo', out, '--tree=state.opt_state'
  )
  check(
    'different formats',
    out,
    '--steps=1,2',
    f'--inputs={saved}/plain/10,{_model(tmp_path / "m-1", 1, 1)}',
  )
  with ocp.StandardCheckpointer() as checkpointer:
    for i in (1, 2):
      tree = {'model': np.ones(2, 'f4'), 'optimizer': np.ones(2, 'f4')}
      checkpointer.save(tmp_path / f'nnx/{i}', tree)
  check("more than parameters ('optimizer')", f'--inputs={tmp_path}/nnx', out)
  with ocp.StandardCheckpointer() as checkpointer:
    for i in (1, 2):
      one = {'params': _params(i), 'opt_state': {'params': np.ones(2, 'f4')}}
      checkpointer.save(tmp_path / f'deep/{i}', {'model': one, 'step': i})
      checkpointer.save(tmp_path / f'two/{i}', {'a': one, 'b': one})
  text = "more than parameters ('a.opt_state.params'); name them with --tree: "
  check(f'{text}a.params, b.params.', f'--inputs={tmp_path}/two', out)
  for i in (1, 2):
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / f'text/{i}', {**_params(i), 'name': 'gpt'})
    (tmp_path / f'empty/{i}').mkdir(parents=True)
    (tmp_path / f'empty/{i}/notes.txt').touch()
  check('it is text, not an array', f'--inputs={tmp_path}/text', out)
  nothing = ','.join(f'{tmp_path}/empty/{i}' for i in (1, 2))
  check(f"'{tmp_path}/empty/1' is no checkpoint", f'--inputs={nothing}', out)
  check('--max_mib=abc must be an integer', out, '--max_mib=abc')
  text = 'where the next merge would take it for a checkpoint'
  check(text, f'--inputs={tmp_path}/deep', f'--out={tmp_path}/deep/m-3')
  assert _merge(monkeypatch, f'--inputs={tmp_path}/deep', out) == 0
  about = json.loads((tmp_path / 'out' / 'merge.json').read_text())
  assert about['method']['tree'] == 'model.params'


def test_the_command_in_its_own_process(saved, tmp_path):
  done = helpers.command(
    'launch.merge', f'--inputs={saved}/maxtext', f'--out={tmp_path}/out'
  )
  assert 'Averages noise like ' in done.stdout
  assert f'wrote {tmp_path}/out/items' in done.stdout


def test_a_folder_of_bare_items(tmp_path, monkeypatch, capsys):
  for step in (100, 200):
    made.save(tmp_path / f'in/ckpt-{step}', made.params(step))
  words = f'--inputs={tmp_path}/in', f'--out={tmp_path}/out'
  assert _merge(monkeypatch, *words) == 0
  assert '200' in capsys.readouterr().out
  (tmp_path / 'in/ckpt-200').rename(tmp_path / 'in/last-100')
  assert _merge(monkeypatch, *words) == 2
  assert 'has step 100 twice: ckpt-100, last-100' in capsys.readouterr().err


def test_no_step_is_guessed_from_the_folder(tmp_path, monkeypatch, capsys):
  """'exp3/best' is not step 3, and is left out where others are chosen."""
  root = tmp_path / 'exp3'
  for name in ('100', '200', 'best'):
    made.save(root / name, made.params(len(name)))
  out = f'--out={tmp_path}/out'
  listed = ','.join(f'{root}/{name}' for name in ('100', '200', 'best'))
  for inputs in (f'--inputs={root}', f'--inputs={listed}'):
    assert _merge(monkeypatch, inputs, out) == 2
    assert "best' does not end in a step" in capsys.readouterr().err
  assert _merge(monkeypatch, f'--inputs={root}', '--steps=100,200', out) == 0
  (root / 'latest').symlink_to(root / '200')
  listed = ','.join(f'{root}/{name}' for name in ('latest', '100', '200'))
  words = f'--inputs={listed}', '--steps=1,2,3', f'--out={tmp_path}/y'
  assert _merge(monkeypatch, *words) == 2
  assert "200' is listed twice" in capsys.readouterr().err


def test_a_safetensors_file_may_be_a_link(tmp_path, monkeypatch):
  """As in the cache of a hub, where the content has no suffix."""
  for i in (1, 2):
    file = _model(tmp_path / f'm-{i}', i, 1) / 'model.safetensors'
    file.rename(tmp_path / f'blob-{i}')
    file.symlink_to(tmp_path / f'blob-{i}')
  inputs = ','.join(f'{tmp_path}/m-{i}/model.safetensors' for i in (1, 2))
  words = f'--inputs={inputs}', '--steps=1,2', f'--out={tmp_path}/out'
  assert _merge(monkeypatch, *words) == 0


def test_names_without_steps_are_taken_in_the_order_given(
  tmp_path, monkeypatch, capsys
):
  """Files beside the tensors are those of the last one; steps may say else."""
  for name in ('b', 'a'):
    _model(tmp_path / name, 1, 1)
    (tmp_path / name / 'config.json').write_text(
      json.dumps({'_name_or_path': name})
    )
  inputs = f'--inputs={tmp_path}/b,{tmp_path}/a'
  read = lambda out: json.loads((out / 'config.json').read_text())
  newest = lambda out: read(out)['_name_or_path']
  assert _merge(monkeypatch, inputs, f'--out={tmp_path}/x') == 0
  assert 'no steps: taken as 1 to 2' in capsys.readouterr().out
  assert newest(tmp_path / 'x') == 'a'
  assert _merge(monkeypatch, inputs, f'--out={tmp_path}/y', '--steps=2,1') == 0
  assert newest(tmp_path / 'y') == 'b'
  (tmp_path / 'b').rename(tmp_path / '10')
  (tmp_path / 'a').rename(tmp_path / '9')
  inputs = f'--inputs={tmp_path}/9,{tmp_path}/10'
  assert _merge(monkeypatch, inputs, f'--out={tmp_path}/z') == 0
  assert newest(tmp_path / 'z') == 'b'


@pytest.mark.parametrize(
  'change',
  [
    lambda meta: [],
    lambda meta: {**meta, 'chunks': [0, 2]},
    lambda meta: {**meta, 'chunks': [2]},
    lambda meta: {k: v for k, v in meta.items() if k != 'shape'},
    lambda meta: {**meta, 'shape': None},
  ],
)
def test_damaged_metadata_of_an_array(tmp_path, monkeypatch, capsys, change):
  for i in (1, 2):
    made.save(
      tmp_path / f'in/{i}', {'w': np.ones((4, 2), 'f4')}, use_ocdbt=False,
      use_compression=False,
    )  # fmt: skip
  path = tmp_path / 'in/2/w/.zarray'
  path.write_text(json.dumps(change(json.loads(path.read_text()))))
  out = tmp_path / 'out'
  code = _merge(monkeypatch, f'--inputs={tmp_path}/in', f'--out={out}')
  error = capsys.readouterr().err
  assert code == 2 and "leaf 'w' of" in error and error.count('\n') == 1, error
  assert not out.exists()
