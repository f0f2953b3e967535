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

CHUNK = 64


def attention(q_BTHK, k_BTGK, v_BTGK, *, form: str = 'auto') -> jax.Array:
  """Softmax attention of every query to the keys at its time and before.

  Args:
    q_BTHK: queries of H heads.
    k_BTGK, v_BTGK: keys and values of G heads; head h of the queries reads
      head h // (H / G).
    form: one of FORMS. 'auto': 'chunked' on the CPU; elsewhere 'cudnn' on a GPU
      in 16 bits, else 'xla'.

  Returns:
    The mixed values, shaped and typed like the queries.
  """
  form = resolve(form, q_BTHK.dtype)
  if form == 'chunked':
    return _chunked(q_BTHK, k_BTGK, v_BTGK)
  return jax.nn.dot_product_attention(
    q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation=form
  )


def resolve(form: str, dtype) -> str:
  """Returns the form that 'auto' stands for on this machine, or `form`."""
  if form not in FORMS:
    raise UserError(
      f"attention '{form}' does not exist.{did_you_mean(form, FORMS)}"
    )
  if form != 'auto':
    return form
  platform = jax.default_backend()
  if platform == 'cpu':
    return 'chunked'
  half = jnp.dtype(dtype).itemsize == 2
  return 'cudnn' if platform in ('gpu', 'cuda') and half else 'xla'


def _chunked(q_BTHK, k_BTGK, v_BTGK):
  batch, time, heads, dim = q_BTHK.shape
  groups = k_BTGK.shape[2]
  shape = (batch, time, groups, heads // groups, dim)
  q_BGRTK = q_BTHK.reshape(shape).transpose(0, 2, 3, 1, 4) / math.sqrt(dim)
  k_BGTK, v_BGTK = k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2)
  chunks = []
  for start in range(0, time, CHUNK):
    end = min(start + CHUNK, time)
    q, k, v = (
      q_BGRTK[..., start:end, :],
      k_BGTK[..., :end, :],
      v_BGTK[..., :end, :],
    )
    scores = jnp.einsum(
      'bgrtk,bgsk->bgrts', q, k, preferred_element_type=jnp.float32
    )
    seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(v.dtype)
    chunks.append(jnp.einsum('bgrts,bgsk->bgrtk', weights, v))
  o_BGRTK = jnp.concatenate(chunks, axis=3)
  return o_BGRTK.transpose(0, 3, 1, 2, 4).reshape(q_BTHK.shape)
