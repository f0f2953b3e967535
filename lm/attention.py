"""Causal attention in three forms that compute the same thing.

'cudnn' and 'xla' are `jax.nn.dot_product_attention`; 'chunked' is for the CPU:
queries in chunks, each of which sees only the keys up to its own end, so about
half of the scores are never computed.
"""

import math

import jax
from jax import numpy as jnp

from lm.errors import UserError, did_you_mean

FORMS = ('auto', 'chunked', 'xla', 'cudnn')


def attention(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGK: jax.Array,
  *,
  form: str = 'auto',
) -> jax.Array:
  """Softmax attention of every query to the keys at its time and before.

  Args:
    q_BTHK: queries of H heads.
    k_BTGK: keys of G heads; head h of the queries reads head h // (H / G).
    v_BTGK: values.
    form: one of FORMS. 'auto': 'chunked' on the CPU; elsewhere 'cudnn' on a
      GPU in 16 bits, else 'xla'.

  Returns:
    The weighted values, shaped and typed like the queries.
  """
  form = resolve(form, q_BTHK.dtype)
  if form == 'chunked':
    return _chunked(q_BTHK, k_BTGK, v_BTGK)
  return jax.nn.dot_product_attention(
    q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation=form
  )


def rope_table(head_dim: int, theta: float, time: int) -> tuple:
  """cos and sin of every position's angles: (T, 1, K / 2)."""
  half = jnp.arange(head_dim // 2, dtype=jnp.float32)
  frequency = theta ** (-2 * half / head_dim)
  angle = jnp.arange(time, dtype=jnp.float32)[:, None, None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: jax.Array, rope: tuple) -> jax.Array:
  """RoPE (Su et al. 2021, eq. 34): pairs (i, i + K/2) turn with position."""
  cos, sin = rope
  a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BTHK.dtype)


def max_logits(q_BTHK: jax.Array, k_BTGK: jax.Array) -> jax.Array:
  """Returns the largest causal score q k / sqrt(K) of each head, float32 (H,).

  A second product, half as large as `_forward`'s pair, for whichever form.
  """
  q, k = jax.lax.stop_gradient(_by_group(q_BTHK, k_BTGK))
  largest = []
  for start, end in _chunks(q.shape[3]):
    scores = _product('bgrtk,bgsk->bgrts', q[..., start:end, :], k[:, :, :end])
    seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    scores = jnp.where(seen, scores, -jnp.inf)
    largest.append(scores.max((0, 3, 4)))
  return jnp.stack(largest).max(0).reshape(-1)


def resolve(form: str, dtype: jnp.dtype) -> str:
  """Returns the form that 'auto' stands for on this machine, or `form`."""
  if form not in FORMS:
    hint = did_you_mean(form, FORMS)
    raise UserError(f"attention '{form}' does not exist.{hint}")
  backend = jax.default_backend()
  cudnn = backend == 'gpu' and jnp.dtype(dtype).itemsize == 2
  if form == 'cudnn' and not cudnn:
    raise UserError(
      f"attention 'cudnn' needs a GPU and a 16-bit model.dtype; here: {backend}"
      f" and '{dtype}'. Choose 'auto', 'chunked' or 'xla'."
    )
  if form != 'auto':
    return form
  if backend == 'cpu':
    return 'chunked'
  return 'cudnn' if cudnn else 'xla'


def _chunked(q_BTHK, k_BTGK, v_BTGK):
  q_BGRTK, k_BGTK = _by_group(q_BTHK, k_BTGK)
  o_BGRTK = _causal(q_BGRTK, k_BGTK, v_BTGK.swapaxes(1, 2))
  return o_BGRTK.transpose(0, 3, 1, 2, 4).reshape(q_BTHK.shape)


def _by_group(q_BTHK, k_BTGK):
  """R = H / G queries share a key. Time next to last: products are plain."""
  batch, time, heads, dim = q_BTHK.shape
  groups = k_BTGK.shape[2]
  q_BTGRK = q_BTHK.reshape(batch, time, groups, heads // groups, dim)
  q_BGRTK = q_BTGRK.transpose(0, 2, 3, 1, 4) / math.sqrt(dim)
  return q_BGRTK, k_BTGK.swapaxes(1, 2)


@jax.custom_vjp
def _causal(q_BGRTK, k_BGTK, v_BGTK):
  return _forward(q_BGRTK, k_BGTK, v_BGTK)[0]


def _forward(q, k, v):
  outputs, weights = [], []
  for start, end in _chunks(q.shape[3]):
    scores = _product('bgrtk,bgsk->bgrts', q[..., start:end, :], k[:, :, :end])
    seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    w = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(v.dtype)
    outputs.append(_product('bgrts,bgsk->bgrtk', w, v[:, :, :end]))
    weights.append(w)
  o = jnp.concatenate(outputs, axis=3).astype(q.dtype)
  return o, (q, k, v, o, weights)


def _backward(saved, do):
  """Written out: 435 ms against 460 by automatic differentiation (`tiny`).

  d scores = w (d w - sum(w d w)), and the sum is that of o * d o (Dao et al.
  2022, section B.2).
  """
  q, k, v, o, weights = saved
  time = q.shape[3]
  # A product with ones: XLA's sum over a short last dimension takes one number
  # at a time (397 -> 390 ms).
  ones = jnp.ones((q.shape[4], 1))
  shift = _product('bgrtk,ko->bgrto', (o * do).astype(jnp.float32), ones)
  dq, dk, dv = [], 0.0, 0.0
  for (start, end), w in zip(_chunks(time), weights, strict=True):
    q_i, do_i = q[..., start:end, :], do[..., start:end, :]
    dw = _product('bgrtk,bgsk->bgrts', do_i, v[:, :, :end])
    dscores = (w * (dw - shift[..., start:end, :])).astype(q.dtype)
    dq.append(_product('bgrts,bgsk->bgrtk', dscores, k[:, :, :end]))
    pad = (0, 0), (0, 0), (0, time - end), (0, 0)
    dk += jnp.pad(_product('bgrts,bgrtk->bgsk', dscores, q_i), pad)
    dv += jnp.pad(_product('bgrts,bgrtk->bgsk', w, do_i), pad)
  dq = jnp.concatenate(dq, axis=3)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_causal.defvjp(_forward, _backward)


def _chunks(time):
  """(start, end) of each chunk: 64 queries, more when that makes over 8."""
  size = max(64, -(-time // 8))
  return [(t, min(t + size, time)) for t in range(0, time, size)]


def _product(subscripts, a, b):
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
