"""Our parameters under the names of Hugging Face: Llama, or Qwen3 with QK-norm.

Both turn the same halves of a head in RoPE and compute RMSNorm as we do, so
that a kernel is only transposed: ours are (inputs, outputs), torch's (outputs,
inputs), and heads are flattened, head by head.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import card, width
from lm import model as model_lib
from lm.errors import UserError

# Our path -> name there, and how many leading dimensions are inputs; 0 = the
# array is the same.
_TOP = {
  'embedding': ('model.embed_tokens', 0),
  'final_norm': ('model.norm', 0),
  'head': ('lm_head', 1),
}
_BLOCK = {
  'attn_norm': ('input_layernorm', 0),
  'attn/q': ('self_attn.q_proj', 1),
  'attn/k': ('self_attn.k_proj', 1),
  'attn/v': ('self_attn.v_proj', 1),
  'attn/o': ('self_attn.o_proj', 2),
  'attn/q_norm': ('self_attn.q_norm', 0),
  'attn/k_norm': ('self_attn.k_norm', 0),
  'mlp_norm': ('post_attention_layernorm', 0),
  'mlp/gate': ('mlp.gate_proj', 1),
  'mlp/up': ('mlp.up_proj', 1),
  'mlp/down': ('mlp.down_proj', 1),
}
# Our knob -> theirs; both sides of an import and an export.
_SIZES = {
  'num_layers': 'num_hidden_layers',
  'd_model': 'hidden_size',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'd_ff': 'intermediate_size',
  'vocab_size': 'vocab_size',
}
_OTHER = {
  'rope_theta': 'rope_theta',
  'tie_embeddings': 'tie_word_embeddings',
  'norm_eps': 'rms_norm_eps',
  'init_std': 'initializer_range',
}
# Our model.activation -> their hidden_act.
_ACTIVATIONS = {
  'silu': 'silu',
  'gelu': 'gelu_pytorch_tanh',
  'relu2': 'relu2',
}
_CLASSES = {'llama': 'LlamaForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}
# What our model is not, and theirs may be.
_WITHOUT = {
  'attention_bias': False,
  'mlp_bias': False,
  'use_sliding_window': False,
  'rope_type': 'default',
}
# Fields that their files may leave out.
_DEFAULTS = {
  **_WITHOUT,
  'model_type': None,
  'hidden_act': 'silu',
  'num_key_value_heads': None,
  'head_dim': None,
  'rope_theta': 10_000.0,
  'rope_scaling': None,
  'rope_parameters': None,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'initializer_range': 0.02,
}


def to_config(config: ConfigDict, *, dtype: str = 'float32') -> dict[str, Any]:
  """Returns config.json of the model of a run.

  Raises:
    UserError: the model has a feature that these classes do not have.
  """
  c = config.model
  known = {*_SIZES, *_OTHER, *card.HOW, 'qk_norm', 'activation', 'gated'}
  if width.ratio(c) == 1 and c.base_head_dim in (0, c.head_dim):
    known |= {'base_width', 'base_head_dim'}  # muP at its base changes nothing
  for knob in c:
    if (knob not in known and c[knob]) or (knob == 'gated' and not c.gated):
      raise UserError(
        f'model.{knob}={c[knob]} cannot be exported: the Llama and Qwen3 '
        'classes of transformers have no such feature.'
      )
  kind = 'qwen3' if c.qk_norm else 'llama'
  if kind == 'llama' and c.d_model % c.num_heads:
    raise UserError(
      f'model.d_model={c.d_model} cannot be exported with model.num_heads='
      f'{c.num_heads}: the Llama class of transformers needs a multiple.'
    )
  return {
    'architectures': [_CLASSES[kind]],
    'model_type': kind,
    **{theirs: c[ours] for ours, theirs in {**_SIZES, **_OTHER}.items()},
    'hidden_act': _ACTIVATIONS[c.activation],
    'attention_bias': False,
    'mlp_bias': False,
    'max_position_embeddings': config.seq_len,
    'bos_token_id': None,
    'eos_token_id': None,
    'torch_dtype': dtype,
    'use_cache': True,
  }


def from_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the section `model` of our config for a config.json.

  Raises:
    UserError: another kind of model, or a feature that ours has not.
  """
  t = {**_DEFAULTS, **theirs}
  kind = t['model_type']
  if kind not in _CLASSES:
    raise UserError(
      f"model_type='{kind}' cannot be imported; legal: {', '.join(_CLASSES)}."
    )
  # One of three places, by the version of transformers.
  rope = {'rope_theta': t['rope_theta'], 'rope_type': 'default'}
  for name in ('rope_scaling', 'rope_parameters'):
    if not isinstance(t[name] or {}, Mapping):
      raise UserError(f'config.json: {name}={t[name]!r} must be an object.')
  rope |= (t['rope_scaling'] or {}) | (t['rope_parameters'] or {})
  t |= rope | {'rope_type': rope.pop('type', rope['rope_type'])}
  for name, value in _WITHOUT.items():
    if t[name] != value:
      raise UserError(
        f'{name}={t[name]!r} cannot be imported: our model has no such feature.'
      )
  if t['hidden_act'] not in _ACTIVATIONS.values():
    raise UserError(
      f'hidden_act={t["hidden_act"]!r} cannot be imported; legal: '
      f'{", ".join(_ACTIVATIONS.values())}.'
    )
  try:
    t['num_key_value_heads'] = (
      t['num_key_value_heads'] or t[_SIZES['num_heads']]
    )
    for name in ('hidden_size', 'num_attention_heads'):
      check_size(name, t[name])
    narrow = t['hidden_size'] // t['num_attention_heads']
    t['head_dim'] = t['head_dim'] or (128 if kind == 'qwen3' else narrow)
    model = {ours: t[name] for ours, name in {**_SIZES, **_OTHER}.items()}
  except KeyError as e:
    raise UserError(f'config.json has no field {e}.') from e
  for name in _SIZES.values():
    check_size(name, t[name])
  for ours, name in _OTHER.items():
    if ours == 'tie_embeddings':
      if not isinstance(t[name], bool):
        raise UserError(f'config.json: {name}={t[name]!r} must be a bool.')
    else:
      model[ours] = _number(name, t[name])
  act = {v: k for k, v in _ACTIVATIONS.items()}[t['hidden_act']]
  return {**model, 'qk_norm': kind == 'qwen3', 'activation': act}


def check_size(name: str, value: Any) -> None:
  """Raises UserError unless a field of config.json is an int >= 1."""
  if type(value) is not int or value < 1:
    raise UserError(f'config.json: {name}={value!r} must be an integer >= 1.')


def _number(name, value):
  number = type(value) in (int, float) and math.isfinite(value)
  if not number or value < 0:
    raise UserError(
      f'config.json: {name}={value!r} must be a finite number >= 0.'
    )
  return float(value)


def to_tensors(params: Any, *, dtype: str = 'float32') -> dict[str, np.ndarray]:
  """Returns the tensors by name, contiguous."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    for name, inputs, layer in _names(_path(path), len(leaf)):
      x = np.asarray(leaf if layer is None else leaf[layer])
      x = x.astype(jax.numpy.dtype(dtype))
      if inputs:
        x = x.reshape(int(np.prod(x.shape[:inputs])), -1).T
      found[name] = np.ascontiguousarray(x)
  return found


def from_tensors(config: ConfigDict, tensors: Mapping[str, np.ndarray]) -> Any:
  """Returns float32 parameters of the model of `config` from tensors by name.

  Raises:
    UserError: a tensor is missing, of another shape, or has no place.
  """
  init = model_lib.build(config.model).init
  shapes = jax.eval_shape(init, jax.random.key(0))
  used = {'lm_head.weight'} if config.model.tie_embeddings else set()

  def read(path, want):
    layers = []
    for name, inputs, layer in _names(_path(path), want.shape[0]):
      shape = want.shape if layer is None else want.shape[1:]
      layers.append(_read(tensors, name, inputs, shape))
      used.add(name)
    return layers[0] if layer is None else np.stack(layers)

  params = jax.tree_util.tree_map_with_path(read, shapes)
  # Buffers that old versions of transformers saved.
  rest = {n for n in tensors if not n.endswith('rotary_emb.inv_freq')} - used
  if rest:
    raise UserError(
      f"{len(rest)} tensors have no place in this model, e.g. '{min(rest)}'."
    )
  return params


def _read(tensors, name, inputs, shape):
  if name not in tensors:
    raise UserError(f"the tensor '{name}' is missing.")
  x = np.asarray(tensors[name]).astype(np.float32)
  flat = shape
  if inputs:
    flat = (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
  if x.shape != flat:
    raise UserError(
      f"the tensor '{name}' has the shape {x.shape}; config.json says {flat}."
    )
  return (x.T if inputs else x).reshape(shape)


def _path(path: tuple) -> str:
  return '/'.join(key.key for key in path)


def _names(path: str, layers: int) -> Iterator[tuple[str, int, int | None]]:
  """Yields (name, inputs, layer) of the tensors that one leaf of ours is.

  layer: index into the leaf; None = the leaf is not scanned.
  """
  first, _, rest = path.partition('/')
  if first == 'blocks':
    name, inputs = _BLOCK[rest]
    for i in range(layers):
      yield f'model.layers.{i}.{name}.weight', inputs, i
  elif first.startswith('block_'):
    name, inputs = _BLOCK[rest]
    layer = first.removeprefix('block_')
    yield f'model.layers.{layer}.{name}.weight', inputs, None
  else:
    name, inputs = _TOP[path]
    yield f'{name}.weight', inputs, None
