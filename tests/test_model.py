"""The model against a numpy forward pass, and against itself in other forms."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, sizes
from lm import loss, model
from lm.errors import UserError
from tests.helpers import flat

TOKENS_BT = np.random.default_rng(0).integers(0, 256, (2, 13), np.int32)


def config(**overrides):
  """Two layers, three heads in one group more than usual, odd lengths."""
  c = base.get_config('size=debug').model
  c.update(num_heads=4, num_kv_heads=2, head_dim=8, d_model=24, d_ff=40)
  c.update(init_std=0.3, **overrides)
  return c


@functools.cache
def build(**overrides):
  """A model and parameters; norm scales vary too, or none would see them."""
  net = model.build(config(**overrides))
  rng = np.random.default_rng(0)

  def draw(x, axes):
    noise = 0.3 * rng.normal(size=x.shape).astype(np.float32)
    return jnp.asarray(noise + (axes.role == 'vector'))

  shapes = jax.eval_shape(net.init, jax.random.key(0))
  return net, jax.tree.map(draw, shapes, net.axes)


# --- numpy, float64: the definition, one line per layer


def _norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def _rope(x_BTHK):
  """Rotates pairs (i, i + K/2) by t * theta^(-2i/K)."""
  T, K = x_BTHK.shape[1], x_BTHK.shape[3]
  angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, K, 2) / K)
  c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = np.split(x_BTHK, 2, -1)
  return np.concatenate([a * c - b * s, b * c + a * s], -1)


def _attention(p, x_BTD, qk_norm):
  q, k, v = (np.einsum('btd,dhk->bthk', x_BTD, p[n]) for n in 'qkv')
  if qk_norm:
    q, k = _norm(q, p['q_norm']), _norm(k, p['k_norm'])
  q, k = _rope(q), _rope(k)
  k, v = (np.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
  s = np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(q.shape[-1])
  s = np.where(np.tri(s.shape[-1], dtype=bool), s, -np.inf)
  w = np.exp(s - s.max(-1, keepdims=True))
  o = np.einsum('bhts,bshk->bthk', w / w.sum(-1, keepdims=True), v)
  return np.einsum('bthk,hkd->btd', o, p['o'])


_HALF = np.sqrt(2 / np.pi)
_ACTIVATIONS = {
  'silu': lambda x: x / (1 + np.exp(-x)),
  'gelu': lambda x: x / 2 * (1 + np.tanh(_HALF * (x + 0.044715 * x**3))),
  'relu2': lambda x: np.where(x > 0, x * x, 0),
}


def _forward(params, tokens, c):
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = params['embedding'][tokens]
  for i in range(c.num_layers):
    p = params[f'block_{i}']
    x = x + _attention(p['attn'], _norm(x, p['attn_norm']), c.qk_norm)
    m, h = p['mlp'], _norm(x, p['mlp_norm'])
    act = _ACTIVATIONS[c.activation]
    h = act(h @ m['gate']) * (h @ m['up']) if c.gated else act(h @ m['up'])
    x = x + h @ m['down']
  x = _norm(x, params['final_norm'])
  y = x @ (params['embedding'].T if c.tie_embeddings else params['head'])
  cap = c.logit_softcap
  return cap * np.tanh(y / cap) if cap else y


@pytest.mark.parametrize(
  'overrides',
  [
    {},
    {'qk_norm': True, 'tie_embeddings': True, 'num_kv_heads': 4},
    {'logit_softcap': 5.0, 'num_kv_heads': 1, 'attention': 'xla'},
    {'activation': 'gelu'},
    {'activation': 'relu2', 'gated': False},
  ],
)
def test_forward_is_the_definition(overrides):
  net, params = build(**overrides)
  got = jax.jit(net.apply)(params, TOKENS_BT)
  assert got.dtype == jnp.float32
  want = _forward(params, TOKENS_BT, config(**overrides))
  np.testing.assert_allclose(
    got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max()
  )


def _stacked(params, n):
  blocks = [params[f'block_{i}'] for i in range(n)]
  rest = {k: v for k, v in params.items() if not k.startswith('block_')}
  return {**rest, 'blocks': jax.tree.map(lambda *x: jnp.stack(x), *blocks)}


@functools.cache
def _objective(**overrides):
  """Loss and gradient of a model, always with the unrolled model's params."""
  net, _ = build(**overrides)
  _, params = build()
  if overrides.get('scan_layers'):
    params = _stacked(params, 2)
  f = lambda p: loss.next_token(net, p, TOKENS_BT, z_loss=1e-2).loss
  compiled = jax.jit(jax.value_and_grad(f)).lower(params).compile()
  value, grads = compiled(params)
  return value, grads, compiled.as_text()


def assert_close(a, b, rtol=1e-4, atol=1e-5):
  a, b = flat(a), flat(b)
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_allclose(
      np.asarray(a[key], np.float32), np.asarray(b[key], np.float32),
      rtol=rtol, atol=atol, err_msg=key,
    )  # fmt: skip


def test_scan_is_the_unrolled_model():
  stacked = build(scan_layers=True)[1]
  value, grads, _ = _objective()
  value2, grads2, program = _objective(scan_layers=True)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, grads2)
  assert 'while' in program
  np.testing.assert_allclose(value, value2, rtol=1e-5)
  assert_close(_stacked(grads, 2), grads2)


@pytest.mark.parametrize(('remat', 'scan'), [('dots', True), ('full', False)])
def test_remat_does_not_change_the_numbers(remat, scan):
  value, grads, _ = _objective(scan_layers=scan)
  value2, grads2, _ = _objective(scan_layers=scan, remat=remat)
  np.testing.assert_allclose(value, value2, rtol=1e-6)
  assert_close(grads, grads2)


def test_remat_trades_products_for_memory():
  """'full' computes every product of a block again, 'dots' only attention's."""

  def cost(remat):
    net = model.build(config(remat=remat, scan_layers=True, num_layers=8))
    params = jax.eval_shape(net.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, 65), jnp.int32)
    f = jax.grad(lambda p, t: loss.next_token(net, p, t).loss)
    traced = jax.jit(f).trace(params, tokens)
    memory = traced.lower().compile().memory_analysis().temp_size_in_bytes
    return str(traced.jaxpr).count('dot_general'), memory

  (a, none), (b, dots), (c, full) = map(cost, ('none', 'dots', 'full'))
  assert a < b < c
  assert none > dots > full


def test_bfloat16_is_close_and_parameters_stay_float32():
  net, params = build()
  half, same = build(dtype='bfloat16')
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(same))
  a, b = (jax.jit(n.apply)(params, TOKENS_BT) for n in (net, half))
  assert b.dtype == jnp.float32
  error = np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))
  assert 1e-4 < error < 0.05  # it is another precision, and close
  _, grads, _ = _objective(dtype='bfloat16')
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('scan', [False, True])
def test_axes_describe_every_parameter(scan):
  net, params = build(scan_layers=scan, qk_norm=True)
  assert jax.tree.structure(net.axes) == jax.tree.structure(params)
  roles = {}
  for a, (path, x) in zip(
    jax.tree.leaves(net.axes),
    jax.tree_util.tree_leaves_with_path(params),
    strict=True,
  ):
    assert len(a.names) == x.ndim
    name = jax.tree_util.keystr(path[-1:], simple=True)
    roles[name] = a.role
    if a.role == 'matrix':
      assert sorted((*a.inputs, *a.outputs, *a.batch)) == list(range(x.ndim))
      assert len(a.batch) == scan
    if name == 'o':
      assert [x.shape[i] for i in a.inputs] == [4, 8]
      assert [x.shape[i] for i in a.heads] == [4]
  assert {k for k, v in roles.items() if v == 'vector'} == {
    'attn_norm', 'mlp_norm', 'final_norm', 'q_norm', 'k_norm',
  }  # fmt: skip
  assert (roles['embedding'], roles['head']) == ('embedding', 'head')


def test_init_scales():
  net = model.build(config(d_model=96, d_ff=200, head_dim=24))
  params = net.init(jax.random.key(0))
  p = params['block_0']
  into = [*(p['attn'][k] for k in 'qkv'), p['mlp']['gate'], p['mlp']['up']]
  for x in into:
    assert np.std(x) == pytest.approx(0.3, rel=0.05)
  for out in (p['attn']['o'], p['mlp']['down']):
    assert np.std(out) == pytest.approx(0.3 / 2, rel=0.05)  # sqrt(2 layers)
  assert (params['final_norm'] == 1).all()


@pytest.mark.parametrize('name', sizes.SIZES)
def test_sizes_have_about_their_number_of_parameters(name):
  c = base.get_config(f'size={name}').model
  d, f, v, h, g, k = (
    c[x] for x in ('d_model', 'd_ff', 'vocab_size', 'num_heads',
                   'num_kv_heads', 'head_dim')
  )  # fmt: skip
  block = d * k * (2 * h + 2 * g) + 3 * d * f + 2 * d
  want = c.num_layers * block + (1 if c.tie_embeddings else 2) * v * d + d
  shapes = jax.eval_shape(model.build(c).init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == want
  named = {'124m': 124e6, '350m': 350e6, '1b': 1.3e9, '3b': 3e9, '7b': 7e9}
  if name in named:
    hidden = want - (0 if c.tie_embeddings else v * d)
    assert hidden == pytest.approx(named[name], rel=0.2)


def test_flops_by_hand():
  """One layer: every weight 6 per token, every visible key 12 per head dim."""
  c = config(num_layers=1)
  weights = 24 * (32 + 16 + 16) + 32 * 24 + 3 * 24 * 40 + 24 * 256
  pairs = sum(range(1, 14)) / 13  # keys that a token sees, on average
  want = 6 * weights + 12 * pairs * 32
  assert model.flops_per_token(c, 13) == pytest.approx(want)
  c.gated = False
  less = 6 * 24 * 40
  assert model.flops_per_token(c, 13) == pytest.approx(want - less)


@pytest.mark.parametrize(
  ('overrides', 'sentence'),
  [
    ({'num_kv_heads': 3}, 'num_kv_heads=3 must divide'),
    ({'activation': 'relu'}, "activation='relu' does not exist. Did you mean"),
    ({'head_dim': 7}, 'must be even'),
    ({'dtype': 'float31'}, "Did you mean 'float32'"),
    ({'remat': 'all'}, 'Legal: .*full'),
    ({'attention': 'flash'}, 'Legal: .*chunked'),
    ({'num_layers': 0}, '=0 must be 1 to'),
    ({'loss_chunk': -1}, 'loss_chunk=-1 must be from 0 on'),
  ],
)
def test_mistakes_are_one_sentence(overrides, sentence):
  with pytest.raises(UserError, match=sentence):
    model.build(config(**overrides))


def test_norm_by_numpy():
  """eps stands inside of the root; bfloat16 is normalised in float32."""
  x = np.random.default_rng(0).standard_normal((3, 16)) * 1e-3
  module = types.SimpleNamespace(param=lambda *_: jnp.ones(16))
  norm = lambda x: model._norm(module, 'scale', x, 1e-5)
  want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  got = norm(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  half = jnp.asarray(x, jnp.bfloat16)
  got = norm(half)
  assert got.dtype == jnp.bfloat16
  wide = np.asarray(half, np.float64)
  want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_array_equal(got, jnp.asarray(want, jnp.bfloat16))
