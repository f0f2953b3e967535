"""Cross-entropy in slices against the plain formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import loss, model
from tests.test_model import build, config

TOKENS_BS = np.random.default_rng(0).integers(0, 256, (3, 12), np.int32)


@functools.cache
def _plain(softcap, z_loss):
  net, params = build()
  f = lambda p: _definition(net, p, softcap, z_loss)
  return jax.jit(jax.value_and_grad(f))(params)


def _definition(net, params, softcap, z_loss):
  """log-softmax of all logits at once, by the definition."""
  h = net.hidden(params, TOKENS_BS[:, :-1])
  y = h.astype(jnp.float32) @ net.head(params)
  y = softcap * jnp.tanh(y / softcap) if softcap else y
  total = jnp.log(jnp.exp(y - y.max()).sum(-1)) + y.max()
  right = jnp.take_along_axis(y, TOKENS_BS[:, 1:, None], -1)[..., 0]
  return (total - right).mean() + z_loss * (total**2).mean()


@pytest.mark.parametrize('chunk', [0, 7, 64])
@pytest.mark.parametrize(('softcap', 'z_loss'), [(0.0, 0.0), (3.0, 0.1)])
def test_slices_give_the_loss_and_its_gradient(chunk, softcap, z_loss):
  net, params = build()

  def ours(p):
    out = loss.next_token(
      net, p, TOKENS_BS, z_loss=z_loss, softcap=softcap, chunk=chunk
    )
    return out.loss

  want = _plain(softcap, z_loss)
  got = jax.jit(jax.value_and_grad(ours))(params)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6)


def test_parts_add_up():
  net, params = build()
  out = loss.next_token(net, params, TOKENS_BS, z_loss=0.5)
  plain = loss.next_token(net, params, TOKENS_BS)
  np.testing.assert_allclose(out.cross_entropy, plain.loss, rtol=1e-6)
  assert out.loss > out.cross_entropy


def test_uniform_logits_cost_log_vocab():
  net, params = build()
  params = {**params, 'head': jnp.zeros_like(params['head'])}
  out = loss.next_token(net, params, TOKENS_BS)
  np.testing.assert_allclose(out.cross_entropy, np.log(256), rtol=1e-6)


def test_slices_never_hold_all_logits():
  net = model.build(config(vocab_size=4096))
  params = jax.eval_shape(net.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((8, 129), jnp.int32)

  def temporary(chunk):
    f = lambda p, t: loss.next_token(net, p, t, chunk=chunk).loss
    compiled = jax.jit(jax.grad(f)).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  all_logits = 8 * 128 * 4096 * 4
  assert temporary(0) > all_logits
  assert temporary(64) < all_logits
