"""Export to the layout of Hugging Face and back; against transformers itself.

The tests against transformers need requirements-oracle.txt and `-m oracle`.
"""

import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import card, checkpoint, log, state, tokens
from lm import hugging_face as hf
from lm import hugging_face_files as files
from lm import model as model_lib
from lm.errors import UserError
from lm.run import Run
from tests import helpers, tools

VARIANTS = {
  'plain': {},
  'groups, tied': {'num_kv_heads': 1, 'tie_embeddings': True, 'head_dim': 8},
  'qk_norm, scanned': {'qk_norm': True, 'scan_layers': True, 'head_dim': 32},
  'qk_norm, tied': {'qk_norm': True, 'tie_embeddings': True},
  'eps, theta': {'norm_eps': 0.3, 'rope_theta': 100.0, 'num_kv_heads': 1},
  'gelu': {'activation': 'gelu'},
  'relu2, qk_norm': {'activation': 'relu2', 'qk_norm': True},
}


def _two_layers():
  return helpers.config(model__num_layers=2)


def _build(variant):
  """A model whose norm scales are not all one, so that none can be mixed up."""
  config, rng = _two_layers(), np.random.default_rng(0)
  with config.unlocked():
    config.model.update(VARIANTS[variant])

  def draw(path, x):
    one = 'norm' in jax.tree_util.keystr(path)
    return np.float32(one + 0.2 * rng.standard_normal(x.shape))

  init = model_lib.build(config.model).init
  shapes = jax.eval_shape(init, jax.random.key(0))
  return config, jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize('variant', VARIANTS)
def test_there_and_back_to_the_last_bit(variant, tmp_path):
  config, params = _build(variant)
  files.write(tmp_path, hf.to_config(config), hf.to_tensors(params))
  theirs, tensors = files.read(tmp_path)
  again = _two_layers()
  with again.unlocked():
    again.model.update(hf.from_config(theirs))
  how = {'scan_layers': config.model.scan_layers}
  again.model.update(how)
  assert again.model.to_dict() == config.model.to_dict()
  back, want = helpers.flat(hf.from_tensors(again, tensors)), params
  want = helpers.flat(want)
  assert back.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(back[name], want[name], err_msg=name)


def test_rows_of_a_projection_are_heads_one_after_the_other():
  config, params = _build('groups, tied')
  q_DHK = np.asarray(params['block_1']['attn']['q'])
  o_HKD = np.asarray(params['block_1']['attn']['o'])
  tensors = hf.to_tensors(params)
  q = tensors['model.layers.1.self_attn.q_proj.weight']
  o = tensors['model.layers.1.self_attn.o_proj.weight']
  assert q[1 * 8 + 3, 5] == q_DHK[5, 1, 3]
  assert o[5, 1 * 8 + 3] == o_HKD[1, 3, 5]
  assert 'lm_head.weight' not in tensors
  assert all(x.flags.c_contiguous for x in tensors.values())


def test_what_the_classes_lack_is_refused():
  config, _ = _build('plain')
  config.model.init = 'orthogonal'  # of no meaning after the first step
  config.model.base_width = config.model.d_model  # nor this, here
  hf.to_config(config)
  config.model.base_width //= 2
  with pytest.raises(UserError, match='base_width=16 cannot be exported'):
    hf.to_config(config)
  config.model.base_width = 0
  config.model.logit_softcap = 30.0
  with pytest.raises(UserError, match='logit_softcap=30.0 cannot be exported'):
    hf.to_config(config)
  config.model.update({'logit_softcap': 0.0, 'gated': False})
  with pytest.raises(UserError, match='gated=False cannot be exported'):
    hf.to_config(config)
  config.model.update({'gated': True, 'num_heads': 3})
  with pytest.raises(UserError, match='d_model=32 cannot .*num_heads=3'):
    hf.to_config(config)
  with config.unlocked():
    config.model.update({'num_heads': 2, 'a_later_feature': 0.5})
  with pytest.raises(UserError, match='a_later_feature=0.5'):
    hf.to_config(config)


@pytest.mark.parametrize(
  ('field', 'value', 'sentence'),
  [
    ('model_type', 'gpt2', "'gpt2' cannot be imported; legal: llama"),
    ('attention_bias', True, 'attention_bias=True cannot'),
    ('hidden_act', 'gelu', "hidden_act='gelu' cannot .* legal: silu, gelu_py"),
    ('hidden_act', ['silu'], r"hidden_act=\['silu'\] cannot"),
    ('rope_scaling', {'type': 'linear', 'factor': 2}, "rope_type='linear'"),
    ('rope_parameters', {'rope_type': 'llama3'}, "rope_type='llama3'"),
    ('rope_scaling', 'x', "rope_scaling='x' must be an object"),
    ('rope_theta', None, 'rope_theta=None must be a finite number >= 0'),
    ('rms_norm_eps', None, 'rms_norm_eps=None must be a finite number >= 0'),
    ('rms_norm_eps', float('nan'), 'rms_norm_eps=nan must be a finite'),
    ('rms_norm_eps', -1e-6, 'rms_norm_eps=-1e-06 must be a finite'),
    ('tie_word_embeddings', 'no', "tie_word_embeddings='no' must be a bool"),
    ('hidden_size', '64', "hidden_size='64' must be an integer >= 1"),
    ('num_attention_heads', 0, 'num_attention_heads=0 must be an integer'),
    ('vocab_size', 2.5, 'vocab_size=2.5 must be an integer'),
    ('head_dim', [8], r'head_dim=\[8\] must be an integer'),
  ],
)  # fmt: skip
def test_what_ours_lacks_is_refused(field, value, sentence):
  theirs = hf.to_config(_build('plain')[0])
  with pytest.raises(UserError, match=sentence):
    hf.from_config({**theirs, field: value})


def test_defaults_that_files_leave_out():
  theirs = hf.to_config(_build('plain')[0])
  for name in ('head_dim', 'num_key_value_heads', 'rope_theta'):
    del theirs[name]
  rope = {'rope_parameters': {'rope_theta': 5e5, 'rope_type': 'default'}}
  found = hf.from_config({**theirs, **rope})
  assert (found['head_dim'], found['num_kv_heads']) == (16, 2)
  assert found['rope_theta'] == 5e5
  # Legal in ours, so that an export of it comes back.
  assert hf.from_config({**theirs, 'rms_norm_eps': 0})['norm_eps'] == 0
  with pytest.raises(UserError, match='no field .num_hidden_layers'):
    del theirs['num_hidden_layers']
    hf.from_config(theirs)


def test_tensors_that_do_not_fit_are_named():
  config, params = _build('plain')
  tensors = hf.to_tensors(params)
  name = 'model.layers.1.mlp.up_proj.weight'
  missing = {k: v for k, v in tensors.items() if k != name}
  for wrong, sentence in (
    (missing, f"'{name}' is missing"),
    ({**tensors, name: tensors[name].T}, r'\(32, 64\); config.json says \(64'),
    ({**tensors, 'model.layers.0.bias': tensors[name]}, 'no place .*0.bias'),
  ):
    with pytest.raises(UserError, match=sentence):
      hf.from_tensors(config, wrong)


def test_without_the_package_one_sentence(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'safetensors.numpy', None)
  with pytest.raises(UserError, match='pip install safetensors'):
    files.safetensors()


@pytest.mark.parametrize('text', ['{}', '{"weight_map": ["a"]}',
                                  '{"weight_map": {"a": 3}}'])  # fmt: skip
def test_an_index_that_names_no_files(text, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(UserError, match='index.json. names no files'):
    files.read(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"model": []}')
  assert not files.has_byte_tokenizer(tmp_path)


def test_the_characters_of_bytes():
  """GPT-2's map: a bijection, printable ASCII unchanged, space is U+0120."""
  found = files.byte_characters()
  assert len(set(found)) == 256
  assert ''.join(found[33:127]) == ''.join(map(chr, range(33, 127)))
  assert (found[32], found[10], found[0], found[255]) == ('Ġ', 'Ċ', 'Ā', 'ÿ')


@pytest.fixture
def run(tmp_path):
  """Two checkpoints at a constant learning rate, in a folder with a space."""
  path = tmp_path / 'a run'
  path.mkdir()
  config, params = _build('plain')
  constant = helpers.config('schedule=constant').schedule
  with config.unlocked():
    config.schedule = constant
  log.write_json(path / 'config.json', card.as_dict(config))
  checkpoints = checkpoint.Checkpoints(path)
  zero = jnp.zeros((), jnp.int32)
  for step in (4, 8):
    scaled = jax.tree.map(lambda x: jnp.asarray(x / step), params)  # noqa: B023
    full = state.TrainState(zero, scaled, (), (), zero, zero)
    checkpoints.save(full, step, {'step': step, 'mean_start': 0})
  checkpoints.close()
  return path


def test_the_tokenizer_of_token_shards_is_exported(
  run, tmp_path, monkeypatch, capsys
):
  tokenizers = pytest.importorskip('tokenizers')
  config = log.read_json(run / 'config.json')
  size = config['model']['vocab_size']
  config['data'].update(source='bin', train=f'{tmp_path}/data/*.bin')
  log.write_json(run / 'config.json', config)
  export = lambda name, *words: tools.call(
    monkeypatch, 'export', f'--at={run}', f'--out={tmp_path}/{name}', *words
  )
  assert export('none') == 0
  assert 'no tokenizer.json beside' in capsys.readouterr().out
  (tmp_path / 'data').mkdir()
  words = {c: i for i, c in enumerate('abcdefgh')}
  words = tokenizers.models.WordLevel({**words, tokens.END: len(words)}, 'a')
  made = tokenizers.Tokenizer(words)
  made.add_special_tokens([tokens.END])
  path = tmp_path / 'data' / 'tokenizer.json'
  made.save(str(path))
  assert export('found') == 0 and export('named', f'--tokenizer={path}') == 0
  for name in ('found', 'named'):
    about = log.read_json(tmp_path / name / 'tokenizer_config.json')
    assert about['eos_token'] == tokens.END
    read = tokenizers.Tokenizer.from_file(f'{tmp_path}/{name}/tokenizer.json')
    assert read.get_vocab() == made.get_vocab()
  capsys.readouterr()
  made.add_tokens([f'w{i}' for i in range(size)])
  made.save(str(path))
  assert export('large') == 2
  assert f'the model has {size} tokens' in capsys.readouterr().err
  path.write_text('{"model": 1}')
  assert export('no') == 2
  assert 'no tokenizer.json with a vocabulary' in capsys.readouterr().err
  assert export('gone', f'--tokenizer={tmp_path}/x') == 2
  assert 'cannot be read' in capsys.readouterr().err
  assert {p.name for p in tmp_path.iterdir()} >= {'none', 'found', 'named'}
  assert not {p.name for p in tmp_path.iterdir()} & {'large', 'no', 'gone'}
  config['data'].update(source='text')
  log.write_json(run / 'config.json', config)
  assert export('bytes', f'--tokenizer={path}') == 2
  assert 'this one is on bytes' in capsys.readouterr().err


def _import(monkeypatch, out, workdir):
  return tools.call(
    monkeypatch, 'import_hf', f'--from={out}', f'--workdir={workdir}'
  )


def _next(capsys):
  """The words of the command that was printed last, as a shell reads it."""
  return shlex.split(capsys.readouterr().out.rpartition('Next: ')[2])


def test_the_commands(run, tmp_path, monkeypatch, capsys):
  """A checkpoint and a merge: exported, imported, the same bits."""
  merge = f'--run={run}', '--steps=4,8', '--method=uniform', '--name=m'
  assert tools.call(monkeypatch, 'merge', *merge) == 0
  assert _next(capsys)[-1] == f'--at={run},{run}/merged/m'
  found = Run(run)
  for at, ours in (('@4', found.params(4)), ('/merged/m', found.params('m'))):
    out, back = tmp_path / f'out {at[1:3]}', tmp_path / f'back {at[1:3]}'
    place = f'--at={run}{at}', f'--out={out}'
    assert tools.call(monkeypatch, 'export', *place) == 0
    assert _next(capsys)[3] == f'--from={out}'
    assert _import(monkeypatch, out, back) == 0
    assert _next(capsys)[-1] == f'--workdir={back}-tuned'
    again = Run(back)
    theirs, ours = helpers.flat(again.params()), helpers.flat(ours)
    for name in ours:
      np.testing.assert_array_equal(theirs[name], ours[name])
    assert again.config.data.source == 'python_source'
    assert again.config.seq_len == found.config.seq_len
    assert tools.call(monkeypatch, 'export', *place) == 2
    assert 'is never overwritten' in capsys.readouterr().err
  place = f'--at={run}@5', f'--out={out}-x'
  assert tools.call(monkeypatch, 'export', *place) == 2
  assert 'has the steps 4, 8' in capsys.readouterr().err
  assert _import(monkeypatch, run, tmp_path / 'x') == 2
  assert 'has no model.safetensors' in capsys.readouterr().err
  assert _import(monkeypatch, tmp_path / 'none', tmp_path / 'x') == 2
  assert 'no directory with config.json' in capsys.readouterr().err
  theirs = log.read_json(out / 'config.json')
  for wrong in ('x', 0, None):
    edited = {**theirs, 'max_position_embeddings': wrong}
    log.write_json(out / 'config.json', edited)
    assert _import(monkeypatch, out, tmp_path / 'x') == 2
    error = capsys.readouterr().err
    assert f'max_position_embeddings={wrong!r} must be an integer' in error
  log.write_json(out / 'config.json', theirs)
  (out / 'model.safetensors').write_bytes(b'123')
  assert _import(monkeypatch, out, tmp_path / 'x') == 2
  assert 'model.safetensors' in capsys.readouterr().err
  assert not (tmp_path / 'x').exists()


def _logits(config, params, folder, tokens):
  """Ours and theirs, float32."""
  import torch
  import transformers

  folder.mkdir()
  files.write(folder, hf.to_config(config), hf.to_tensors(params))
  ours = model_lib.build(config.model).apply(params, tokens)
  net = transformers.AutoModelForCausalLM.from_pretrained(folder)
  assert net.dtype == torch.float32
  with torch.no_grad():
    theirs = net(torch.tensor(tokens)).logits.numpy()
  return np.asarray(ours), theirs


@pytest.mark.oracle
@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_in_transformers(variant, tmp_path):
  config, params = _build(variant)
  tokens = np.random.default_rng(1).integers(0, 256, (3, 32))
  ours, theirs = _logits(config, params, tmp_path / 'a', tokens)
  assert np.abs(ours).max() > 1
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
  # The test can fail: another base of RoPE is another model.
  config.model.rope_theta *= 2
  _, other = _logits(config, params, tmp_path / 'b', tokens)
  assert np.abs(other - ours).max() > 1e-2


@pytest.mark.oracle
def test_the_tokenizer_in_transformers(tmp_path):
  import transformers

  files.write_byte_tokenizer(tmp_path, 32)
  config, params = _build('plain')
  files.write(tmp_path, hf.to_config(config), hf.to_tensors(params))
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  every = ''.join(map(chr, range(0x800))) + 'Ā <0x00> \r\n\t  a 漢字 🙂 e\u0301'
  for text in (every, 'def f(x):\n  return x\n', ' \0 ', '.', ''):
    found = tokenizer(text)['input_ids']
    assert found == list(text.encode())
    assert tokenizer.decode(found) == text
  assert len(tokenizer) == 256
  assert files.has_byte_tokenizer(tmp_path)


@pytest.mark.oracle
def test_files_that_transformers_writes(tmp_path):
  """In bfloat16 and in several shards, of a model that it made."""
  import torch
  import transformers

  config = transformers.LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    rope_parameters={'rope_type': 'default', 'rope_theta': 300.0},
  )
  torch.manual_seed(0)
  net = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
  net.save_pretrained(tmp_path, max_shard_size='20KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  theirs, tensors = files.read(tmp_path)
  ours = _two_layers()
  with ours.unlocked():
    ours.model.update(hf.from_config(theirs))
  params = hf.from_tensors(ours, tensors)
  tokens = np.arange(24)[None]
  with torch.no_grad():
    want = net.to(torch.float32)(torch.tensor(tokens)).logits.numpy()
  found = model_lib.build(ours.model).apply(params, tokens)
  np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)
  assert json.loads((tmp_path / 'config.json').read_text())['vocab_size'] == 256


_TASK = """task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.oracle
def test_lm_eval_reads_an_export(tmp_path, monkeypatch):
  """Its log-likelihoods are ours, on a task of local lines, offline."""
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
  import lm_eval
  from lm_eval import tasks

  config, params = _build('plain')
  files.write(tmp_path, hf.to_config(config), hf.to_tensors(params))
  files.write_byte_tokenizer(tmp_path, config.seq_len)
  # lm_eval moves a space at the end of the text to the choices.
  line = {'text': 'import', 'choices': [' os', ' é'], 'answer': 1}
  (tmp_path / 'words.jsonl').write_text(json.dumps(line) + '\n')
  (tmp_path / 'next_word.yaml').write_text(
    _TASK.replace('FOLDER', f'{tmp_path}')
  )
  done = lm_eval.simple_evaluate(
    model='hf',
    model_args=f'pretrained={tmp_path},prefix_token_id=0',
    tasks=['next_word'],
    task_manager=tasks.TaskManager(include_path=str(tmp_path)),
    device='cpu',
    batch_size=1,
    bootstrap_iters=0,
  )
  (sample,) = done['samples']['next_word']
  found = [float(r[0][0]) for r in sample['resps']]
  apply = model_lib.build(config.model).apply
  for choice, theirs in zip(line['choices'], found, strict=True):
    tokens = list((line['text'] + choice).encode())
    logits = np.float64(apply(params, np.array([tokens]))[0])
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    n = len(choice.encode())
    ours = sum(logp[i - 1, tokens[i]] for i in range(-n, 0))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
