"""The decoder-only Transformer: RMSNorm, RoPE, gated layers, grouped queries.

The only file that knows flax.linen. Everybody else sees `build(config)`:
functions of a nested dict of float32 arrays, and what their dimensions mean.
The shapes follow Llama (Touvron et al. 2023): normalisation before each
sublayer, no biases; residual outputs start smaller by sqrt(2 num_layers)
(GPT-2, Radford et al. 2019, section 2.3).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import numpy as jnp
from ml_collections import FrozenConfigDict

from lm import attention, axes, initializers, linear, sharding, width
from lm.errors import UserError, did_you_mean

DTYPES = ('float32', 'bfloat16')  # float16 would need a loss scale
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.save_only_these_names(linear.NAME),
  'full': jax.checkpoint_policies.nothing_saveable,
}
# Of each block: largest score per head, (H,); cosine of its input and output.
PROBES = ('max_logits', 'cosine')
ACTIVATIONS = {
  'silu': nn.silu,
  'gelu': nn.gelu,  # by tanh (arXiv 1606.08415, section 2), as GPT-2 has it
  'relu2': lambda x: jnp.square(nn.relu(x)),  # arXiv 2109.08668
}


class Model(NamedTuple):
  """Pure functions of `params`, a nested dict of float32 arrays.

  init(key) -> params
  apply(params, tokens_BT) -> logits_BTV, float32
  hidden(params, tokens_BT) -> hidden_BTD after the last norm, compute dtype
  probe(params, tokens_BT, names) -> hidden_BTD, {name of PROBES: values}
  head(params) -> kernel_DV, such that logits = softcap(hidden @ kernel)
  axes: a tree of `lm.axes.Axes` with the structure of `params`
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[[Any, jax.Array], jax.Array]
  hidden: Callable[[Any, jax.Array], jax.Array]
  probe: Callable[[Any, jax.Array, tuple[str, ...]], tuple[jax.Array, Any]]
  head: Callable[[Any], jax.Array]
  axes: Any


def build(config: Any) -> Model:
  """Builds the model of `configs/base.py`'s section `model`.

  Works without a mesh and under `jax.set_mesh`: activations are then sharded
  by `lm.axes.RULES`, and callers enter no other context.

  Raises:
    UserError: a value that no model has, e.g. an odd head_dim.
  """
  _check(c := FrozenConfigDict(config))
  module = _Transformer(c)
  tokens = jnp.zeros((1, 1), jnp.int32)

  @jax.jit  # traced once, for the names below and for `init`
  def boxed(key):
    return module.init(key, tokens)['params']

  @jax.jit  # op by op, flax would also run the model
  def init(key):
    return jax.tree.map(lambda b: b.value, boxed(key), is_leaf=_is_box)

  def hidden(params, tokens_BT):
    return module.apply({'params': params}, tokens_BT)

  def probe(params, tokens_BT, names):
    return module.apply({'params': params}, tokens_BT, mutable=list(names))

  def head(params):
    kernel = params['embedding'].T if c.tie_embeddings else params['head']
    return kernel if width.ratio(c) == 1 else kernel / width.ratio(c)

  def apply(params, tokens_BT):
    h_BTD = hidden(params, tokens_BT)
    h_LD = h_BTD.reshape(-1, c.d_model)
    y_LV = linear.logits(h_LD, head(params), softcap=c.logit_softcap)
    return y_LV.reshape(*tokens_BT.shape, -1)

  names = jax.tree.map(
    lambda b: axes.from_names(b.names),
    jax.eval_shape(boxed, jax.random.key(0)),
    is_leaf=_is_box,
  )
  return Model(init, apply, hidden, probe, head, names)


def activations(config: Any, params: Any, tokens_BT: jax.Array) -> Any:
  """Returns flax's tree of all outputs of sublayers, layers not scanned."""
  module = _Transformer(FrozenConfigDict(config))
  more = {'capture_intermediates': True, 'mutable': 'intermediates'}
  return module.apply({'params': params}, tokens_BT, **more)[1]


def flops_per_token(config: Any, seq_len: int) -> float:
  """Returns the matrix-product FLOPs of training on one token.

  6 (N_layers (D H K + 2 D G K + H K D + 3 D F) + D V)    weights
  + 6 N_layers H K (T + 1)                                causal attention

  3 D F is 2 D F without a gate. A multiply-add is 2, backward is twice forward,
  a token sees (T + 1) / 2 keys on average. Elementwise work counts nothing, nor
  does recomputation (remat): divide by the peak for the MFU.
  """
  c = config
  queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  block = c.d_model * (2 * queries + 2 * keys + (2 + c.gated) * c.d_ff)
  weights = c.num_layers * block + c.d_model * c.vocab_size
  return 6.0 * (weights + c.num_layers * queries * (seq_len + 1))


class _Transformer(nn.Module):
  c: FrozenConfigDict

  @nn.compact
  def __call__(self, tokens_BT):
    c = self.c
    table_VD = _param(
      self, 'embedding', c.init_std, vocab=c.vocab_size, embed=c.d_model
    )
    if not c.tie_embeddings:  # used by Model.head, made here
      _param(self, 'head', c.init_std, embed=c.d_model, vocab=c.vocab_size)
    # Gathered over 'embed' first: XLA would otherwise replicate the output of
    # the look-up ("involuntary full rematerialization").
    table_VD = sharding.constrain(table_VD, 'vocab', None)
    x_BTD = table_VD[tokens_BT].astype(c.dtype)
    x_BTD = sharding.constrain(x_BTD, 'batch', 'seq', None)
    rope = attention.rope_table(c.head_dim, c.rope_theta, tokens_BT.shape[1])
    # Blocks work on flat tokens (L = B T), see lm/linear.py.
    x_LD = self.blocks(x_BTD.reshape(-1, c.d_model), rope)
    x_LD = _norm(self, 'final_norm', x_LD, c.norm_eps)
    return x_LD.reshape(x_BTD.shape)

  def blocks(self, x_LD, rope):
    c = self.c
    block = _Block
    if c.remat != 'none':
      policy = REMAT[c.remat]
      block = nn.remat(block, policy=policy, prevent_cse=not c.scan_layers)
    if not c.scan_layers:
      for i in range(c.num_layers):
        x_LD, _ = block(c, name=f'block_{i}')(x_LD, rope)
      return x_LD
    scanned = nn.scan(
      block,
      variable_axes={'params': 0, **dict.fromkeys(PROBES, 0)},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return scanned(c, name='blocks')(x_LD, rope)[0]


class _Block(nn.Module):
  c: FrozenConfigDict

  @nn.compact
  def __call__(self, x_LD, rope):
    c = self.c
    before_LD = x_LD
    h_LD = _norm(self, 'attn_norm', x_LD, c.norm_eps)
    x_LD += _Attention(c, name='attn')(h_LD, rope)
    x_LD = sharding.constrain(x_LD, 'batch', None)
    h_LD = _norm(self, 'mlp_norm', x_LD, c.norm_eps)
    x_LD += _Mlp(c, name='mlp')(h_LD)
    _probe(self, 'cosine', lambda: linear.cosine(before_LD, x_LD))
    return sharding.constrain(x_LD, 'batch', None), None


class _Attention(nn.Module):
  c: FrozenConfigDict

  @nn.compact
  def __call__(self, x_LD, rope):
    c = self.c
    D, H, G, K = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
    time = rope[0].shape[0]

    def project(name, **heads):
      kernel = _param(self, name, _std(c), embed=D, **heads, head_dim=K)
      y = linear.linear(x_LD, kernel.reshape(D, -1))
      y = y.reshape(-1, time, kernel.shape[1], K)
      return sharding.constrain(y, 'batch', 'seq', *heads, None)

    q_BTHK = project('q', heads=H)
    k_BTGK = project('k', kv_heads=G)
    v_BTGK = project('v', kv_heads=G)
    if c.qk_norm:
      q_BTHK = _norm(self, 'q_norm', q_BTHK, c.norm_eps)
      k_BTGK = _norm(self, 'k_norm', k_BTGK, c.norm_eps)
    q_BTHK, k_BTGK = (
      attention.rotate(q_BTHK, rope),
      attention.rotate(k_BTGK, rope),
    )
    if c.base_head_dim not in (0, K):  # muP: 1/K in place of 1/sqrt(K)
      q_BTHK *= math.sqrt(c.base_head_dim / K)
    _probe(self, 'max_logits', lambda: attention.max_logits(q_BTHK, k_BTGK))
    o_BTHK = attention.attention(q_BTHK, k_BTGK, v_BTGK, form=c.attention)
    kernel = _param(
      self, 'o', _std(c, c.num_layers), heads=H, head_dim=K, embed=D
    )
    return linear.linear(o_BTHK.reshape(-1, H * K), kernel.reshape(-1, D))


class _Mlp(nn.Module):
  c: FrozenConfigDict

  @nn.compact
  def __call__(self, x_LD):
    c = self.c
    sides = {'embed': c.d_model, 'mlp': c.d_ff}
    if c.gated:  # arXiv 2002.05202
      gate_DF = _param(self, 'gate', _std(c), **sides)
    up_DF = _param(self, 'up', _std(c), **sides)
    down_FD = _param(
      self, 'down', _std(c, c.num_layers), mlp=c.d_ff, embed=c.d_model
    )
    first_DF = gate_DF if c.gated else up_DF
    h_LF = ACTIVATIONS[c.activation](linear.linear(x_LD, first_DF))
    if c.gated:
      h_LF *= linear.linear(x_LD, up_DF)
    return linear.linear(sharding.constrain(h_LF, 'batch', 'mlp'), down_FD)


def _param(module, name, std, **sides):
  """A float32 parameter; `sides` maps logical names to sizes."""
  init = initializers.build(module.c, std, tuple(sides))
  init = nn.with_logical_partitioning(init, tuple(sides))
  return module.param(name, init, tuple(sides.values()), jnp.float32)


def _probe(module, name, compute):
  """Hands out compute() under this name to `Model.probe`, if asked for it."""
  if module.is_mutable_collection(name) and not module.is_initializing():
    module.put_variable(name, name, compute())


def _norm(module, name, x, eps):
  """RMSNorm (Zhang and Sennrich 2019, eq. 4) over the last dimension."""
  init = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
  scale = module.param(name, init, (x.shape[-1],), jnp.float32)
  x32 = x.astype(jnp.float32)
  scale_inv = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale_inv * scale).astype(x.dtype)


def _std(c, layers=0.5):
  return c.init_std / math.sqrt(width.ratio(c) * 2 * layers)


def _is_box(x):
  return isinstance(x, nn.LogicallyPartitioned)


def _check(c):
  """Refuses what no model can be; sizes that do not fit each other."""
  for name in ('num_layers', 'd_model', 'num_heads', 'num_kv_heads',
               'head_dim', 'd_ff', 'vocab_size', 'base_width',
               'base_head_dim'):  # fmt: skip
    least = 0 if name.startswith('base') else 1
    if not least <= c[name] < 2**31:  # tokens are int32
      raise UserError(f'model.{name}={c[name]} must be {least} to 2**31 - 1.')
  for name, least in (('rope_theta', 1), ('init_std', 0), ('norm_eps', 0),
                      ('logit_softcap', 0), ('loss_chunk', 0)):  # fmt: skip
    if not least <= c[name] < math.inf:
      raise UserError(f'model.{name}={c[name]} must be from {least} on.')
  if c.num_heads % c.num_kv_heads:
    raise UserError(
      f'model.num_kv_heads={c.num_kv_heads} must divide '
      f'model.num_heads={c.num_heads}.'
    )
  if c.head_dim % 2:
    raise UserError(
      f'model.head_dim={c.head_dim} must be even: RoPE turns pairs.'
    )
  for name, legal in (
    ('dtype', DTYPES),
    ('remat', REMAT),
    ('activation', ACTIVATIONS),
    ('init', initializers.KINDS),
    ('attention', attention.FORMS),
  ):
    if c[name] not in legal:
      hint = did_you_mean(c[name], legal)
      raise UserError(f"model.{name}='{c[name]}' does not exist.{hint}")
  attention.resolve(c.attention, c.dtype)
