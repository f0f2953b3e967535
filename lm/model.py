"""The decoder-only Transformer: RMSNorm, RoPE, SwiGLU, grouped queries.

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
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict

from lm import attention, axes, linear
from lm.errors import UserError, did_you_mean

DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Model(NamedTuple):
  """Pure functions of `params`, a nested dict of float32 arrays.

  init(key) -> params
  apply(params, tokens_BT) -> logits_BTV, float32
  hidden(params, tokens_BT) -> hidden_BTD after the last norm, compute dtype
  head(params) -> kernel_DV, such that logits = softcap(hidden @ kernel)
  axes: a tree of `lm.axes.Axes` with the structure of `params`
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[[Any, jax.Array], jax.Array]
  hidden: Callable[[Any, jax.Array], jax.Array]
  head: Callable[[Any], jax.Array]
  axes: Any


def build(config: Any) -> Model:
  """Builds the model of `configs/base.py`'s section `model`.

  Works without a mesh and under `jax.set_mesh`: activations are then sharded
  by `lm.axes.RULES`, and callers enter no other context.

  Raises:
    UserError: a value that no model has, e.g. an odd head_dim.
  """
  c = FrozenConfigDict(config)
  _check(c)
  module = _Transformer(c)
  tokens = jnp.zeros((1, 1), jnp.int32)

  def boxed(key):
    return module.init(key, tokens)['params']

  def init(key):
    return jax.tree.map(lambda b: b.value, boxed(key), is_leaf=_is_box)

  def hidden(params, tokens_BT):
    return module.apply({'params': params}, tokens_BT)

  def head(params):
    return params['embedding'].T if c.tie_embeddings else params['head']

  def apply(params, tokens_BT):
    h_BTD = hidden(params, tokens_BT)
    return logits(h_BTD, head(params), softcap=c.logit_softcap)

  names = jax.tree.map(
    lambda b: axes.from_names(b.names),
    jax.eval_shape(boxed, jax.random.key(0)),
    is_leaf=_is_box,
  )
  return Model(init, apply, hidden, head, names)


def logits(h: jax.Array, kernel_DV: jax.Array, *, softcap: float) -> jax.Array:
  """Returns float32 logits, bounded by cap * tanh(logits / cap) if cap > 0."""
  kernel_DV = kernel_DV.astype(h.dtype)
  out = jnp.matmul(h, kernel_DV, preferred_element_type=jnp.float32)
  return softcap * jnp.tanh(out / softcap) if softcap else out


def num_params(config: Any) -> int:
  """Returns the number of parameters without making any."""
  shapes = jax.eval_shape(build(config).init, jax.random.key(0))
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def flops_per_token(config: Any, seq_len: int) -> float:
  """Returns the matrix-product FLOPs of training on one token.

  6 (N_layers (D H K + 2 D G K + H K D + 3 D F) + D V)    weights
  + 6 N_layers H K (T + 1)                                causal attention

  A multiply-add is 2, backward is twice forward, a token sees (T + 1) / 2 keys
  on average. The embedding look-up and elementwise work count nothing, and
  neither does recomputation (remat): divide by the peak for the MFU.
  """
  c = config
  queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  block = c.d_model * (2 * queries + 2 * keys + 3 * c.d_ff)
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
    table_VD = _constrain(table_VD, 'vocab', None)
    x_BTD = table_VD[tokens_BT].astype(c.dtype)
    x_BTD = _constrain(x_BTD, 'batch', 'seq', None)
    x_BTD = self.blocks(x_BTD, _rope_table(c, tokens_BT.shape[1]))
    return _norm(self, 'final_norm', x_BTD, c.norm_eps)

  def blocks(self, x_BTD, rope):
    c = self.c
    block = _Block
    if c.remat != 'none':
      policy = REMAT[c.remat]
      block = nn.remat(block, policy=policy, prevent_cse=not c.scan_layers)
    if not c.scan_layers:
      for i in range(c.num_layers):
        x_BTD, _ = block(c, name=f'block_{i}')(x_BTD, rope)
      return x_BTD
    scanned = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return scanned(c, name='blocks')(x_BTD, rope)[0]


class _Block(nn.Module):
  c: FrozenConfigDict

  @nn.compact
  def __call__(self, x_BTD, rope):
    c = self.c
    h_BTD = _norm(self, 'attn_norm', x_BTD, c.norm_eps)
    x_BTD += _Attention(c, name='attn')(h_BTD, rope)
    x_BTD = _constrain(x_BTD, 'batch', 'seq', None)
    h_BTD = _norm(self, 'mlp_norm', x_BTD, c.norm_eps)
    x_BTD += _Mlp(c, name='mlp')(h_BTD)
    return _constrain(x_BTD, 'batch', 'seq', None), None


class _Attention(nn.Module):
  c: FrozenConfigDict

  @nn.compact
  def __call__(self, x_BTD, rope):
    c = self.c
    D, K = c.d_model, c.head_dim

    def project(name, heads):
      kernel = _param(
        self, name[0], c.init_std, embed=D, **{name[1]: heads}, head_dim=K
      )
      y = linear.linear(x_BTD, kernel)
      y = y.reshape(*x_BTD.shape[:-1], heads, K)
      return _constrain(y, 'batch', 'seq', name[1], None)

    q_BTHK = project(('q', 'heads'), c.num_heads)
    k_BTGK = project(('k', 'kv_heads'), c.num_kv_heads)
    v_BTGK = project(('v', 'kv_heads'), c.num_kv_heads)
    if c.qk_norm:
      q_BTHK = _norm(self, 'q_norm', q_BTHK, c.norm_eps)
      k_BTGK = _norm(self, 'k_norm', k_BTGK, c.norm_eps)
    q_BTHK, k_BTGK = _rotate(q_BTHK, rope), _rotate(k_BTGK, rope)
    o_BTHK = attention.attention(q_BTHK, k_BTGK, v_BTGK, form=c.attention)
    o_HKD = _param(
      self, 'o', _out_std(c), heads=c.num_heads, head_dim=K, embed=D
    )
    o_BTD = o_BTHK.reshape(*x_BTD.shape[:-1], -1)
    return linear.linear(o_BTD, o_HKD, 2)


class _Mlp(nn.Module):
  c: FrozenConfigDict

  @nn.compact
  def __call__(self, x_BTD):
    c = self.c
    sides = {'embed': c.d_model, 'mlp': c.d_ff}
    gate_DF = _param(self, 'gate', c.init_std, **sides)
    up_DF = _param(self, 'up', c.init_std, **sides)
    down_FD = _param(self, 'down', _out_std(c), mlp=c.d_ff, embed=c.d_model)
    gate_BTF = linear.linear(x_BTD, gate_DF)
    up_BTF = linear.linear(x_BTD, up_DF)
    h_BTF = _constrain(nn.silu(gate_BTF) * up_BTF, 'batch', 'seq', 'mlp')
    return linear.linear(h_BTF, down_FD)


def _param(module, name, std, **sides):
  """A float32 parameter ~ N(0, std^2); `sides` maps logical names to sizes."""
  init = nn.with_logical_partitioning(nn.initializers.normal(std), tuple(sides))
  return module.param(name, init, tuple(sides.values()), jnp.float32)


def _norm(module, name, x, eps):
  """RMSNorm (Zhang and Sennrich 2019, eq. 4) over the last dimension."""
  init = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
  scale = module.param(name, init, (x.shape[-1],), jnp.float32)
  x32 = x.astype(jnp.float32)
  scale_inv = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale_inv * scale).astype(x.dtype)


def _rope_table(c, time):
  """cos and sin of every position's angles: (T, 1, K / 2)."""
  half = jnp.arange(c.head_dim // 2, dtype=jnp.float32)
  frequency = c.rope_theta ** (-2 * half / c.head_dim)
  angle = jnp.arange(time, dtype=jnp.float32)[:, None, None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def _rotate(x_BTHK, rope):
  """RoPE (Su et al. 2021, eq. 34): pairs (i, i + K/2) turn with position."""
  cos, sin = rope
  a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BTHK.dtype)


def _out_std(c):
  return c.init_std / math.sqrt(2 * c.num_layers)


def _constrain(x, *names):
  """Shards an activation by logical names; nothing without a mesh.

  Axes that the mesh lacks or that a surrounding `shard_map` has taken are left
  out: the same model runs in a notebook, on a pod, and inside a sweep.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  free = set(mesh.axis_names) - set(mesh.manual_axes)
  spec = [axes.RULES[n] if n else None for n in names]
  spec = [s if isinstance(s, tuple) else (s,) for s in spec]
  spec = [tuple(a for a in s if a in free) or None for s in spec]
  return jax.lax.with_sharding_constraint(x, P(*spec))


def _is_box(x):
  return isinstance(x, nn.LogicallyPartitioned)


def _check(c):
  """Refuses what no model can be; sizes that do not fit each other."""
  for name in ('num_layers', 'd_model', 'num_heads', 'num_kv_heads',
               'head_dim', 'd_ff', 'vocab_size'):  # fmt: skip
    if c[name] < 1:
      raise UserError(f'model.{name}={c[name]} must be at least 1.')
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
    ('attention', attention.FORMS),
  ):
    if c[name] not in legal:
      hint = did_you_mean(c[name], legal)
      raise UserError(f"model.{name}='{c[name]}' does not exist.{hint}")
