"""The forms of attention against each other, the linear layer against jnp."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from lm import attention, linear, loss
from tests.test_model import TOKENS_BT, build


@pytest.mark.parametrize('form', ['chunked', 'xla'])
def test_no_token_sees_the_future(form):
  """The gradient of logits at t with respect to a later embedding is 0."""
  net, params = build(attention=form)
  t, time = 66, 70  # over the end of a chunk

  @jax.jit
  @jax.grad
  def gradient(embedding):
    # One row of the table per position: its gradient is that of the position.
    positions = jnp.arange(time)[None]
    return net.apply({**params, 'embedding': embedding}, positions)[0, t].sum()

  size = np.abs(gradient(params['embedding'])[:time]).max(-1)
  assert (size[t + 1 :] == 0).all()
  assert (size[: t + 1] > 0).all()


def _inputs(length, kv_heads, dtype):
  keys = jax.random.split(jax.random.key(1), 4)
  heads = 4, kv_heads, kv_heads, 4  # queries, keys, values, weight of the sum
  return [
    jax.random.normal(k, (2, length, h, 8), dtype)
    for k, h in zip(keys, heads, strict=True)
  ]


@functools.partial(jax.jit, static_argnums=0)
def _run(form, q, k, v, weight):
  """Output and gradients of attention."""

  def f(q, k, v):
    out = attention.attention(q, k, v, form=form)
    return (out * weight).sum().astype(jnp.float32), out

  (_, out), grads = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)
  return out, *grads


@pytest.mark.parametrize(
  ('length', 'kv_heads'), [(1, 4), (63, 2), (64, 4), (65, 1), (200, 2)]
)
def test_chunked_attention_is_the_plain_one(length, kv_heads):
  inputs = _inputs(length, kv_heads, jnp.float32)
  for a, b in zip(_run('chunked', *inputs), _run('xla', *inputs), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_chunked_attention_in_bfloat16():
  """Half precision in and out, sums in float32: within 0.8 % of float32."""
  half = _run('chunked', *_inputs(130, 2, jnp.bfloat16))
  exact = _run(
    'xla', *(x.astype(jnp.float32) for x in _inputs(130, 2, jnp.bfloat16))
  )
  for a, b in zip(half, exact, strict=True):
    assert a.dtype == jnp.bfloat16
    a = np.asarray(a, np.float32)
    assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.008


def test_chunked_attention_is_another_program():
  """It never computes the upper triangle: fewer FLOPs than the plain form."""
  inputs = _inputs(512, 4, jnp.float32)

  def flops(form):
    return _run.lower(form, *inputs).compile().cost_analysis()['flops']

  assert flops('chunked') < 0.75 * flops('xla')


@pytest.mark.parametrize('shape', [(5, 3, 7), (5, 7, 3)])
def test_linear_is_a_product(shape):
  """Both orientations of the kernel's gradient, by the definition."""
  tokens, inputs, outputs = shape
  x, w, dy = (
    jax.random.normal(jax.random.key(i), s)
    for i, s in enumerate(
      [(tokens, inputs), (inputs, outputs), (tokens, outputs)]
    )
  )
  y, vjp = jax.vjp(linear.linear, x, w)
  dx, dw = vjp(dy)
  for got, want in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_kernel_is_summed_in_float32():
  """2048 equal bfloat16 terms: a sum in bfloat16 would stop at 256."""
  x = jnp.ones((2048, 4), jnp.bfloat16)
  _, vjp = jax.vjp(linear.linear, x, jnp.ones((4, 2)))
  dx, dw = vjp(jnp.ones((2048, 2), jnp.bfloat16))
  assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(dw, 2048.0)


def test_products_with_the_hessian():
  """Forward over reverse equals reverse over reverse (for Sophia and kin)."""
  net, params = build(num_layers=1)
  rng = np.random.default_rng(0)
  direction = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), params
  )
  grad = jax.grad(lambda p: loss.next_token(net, p, TOKENS_BT).loss)

  @jax.jit
  def forward(p):
    return jax.jvp(grad, (p,), (direction,))[1]

  @jax.jit
  @jax.grad
  def reverse(p):
    return jnp.vdot(
      *(jax.flatten_util.ravel_pytree(t)[0] for t in (grad(p), direction))
    )

  a, b = (
    jax.flatten_util.ravel_pytree(f(params))[0] for f in (forward, reverse)
  )
  assert np.linalg.norm(a) > 0
  assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)


def test_positions_keep_the_dtype_and_turn_in_float32():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 8)))
  half = x.astype(jnp.bfloat16)
  rope = attention.rope_table(8, 1e4, 5)
  got = attention.rotate(half, rope)
  assert got.dtype == jnp.bfloat16
  want = attention.rotate(half.astype(jnp.float32), rope)
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
