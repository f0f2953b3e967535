"""The linear layer, flat: three two-dimensional matrix products.

Both forms below are for XLA's CPU backend, where they were measured: sums of
the time of every operation of a training step on one core, size `tiny`, in
slices of 512 tokens (`benchmarks/step_cpu.py` measures whole steps).
"""

import functools

import jax
from jax import ad_checkpoint
from jax import numpy as jnp

from lm import sharding

# What `remat` may keep: results of linear layers carry this name.
NAME = 'linear'


def linear(
  x_LD: jax.Array, kernel_DF: jax.Array, *, dtype: str | None = None
) -> jax.Array:
  """Multiplies tokens by a float32 kernel, in the precision of the tokens.

  The gradient of the kernel is accumulated and returned in float32, also from
  bfloat16 tokens. Tokens come flat (L = B T): with a batch and a time
  dimension XLA does elementwise work once per layout (422 -> 431 ms).

  Args:
    x_LD: float32 or bfloat16.
    kernel_DF: float32.
    dtype: of the result; None = that of the tokens.
  """
  y_LF = _linear(x_LD, kernel_DF, jnp.dtype(dtype or x_LD.dtype))
  return ad_checkpoint.checkpoint_name(y_LF, NAME)


def logits(
  x_LD: jax.Array, kernel_DV: jax.Array, *, softcap: float = 0.0
) -> jax.Array:
  """Returns float32 logits, bounded by cap * tanh(logits / cap) if cap > 0.

  softcap is static: 0 is another program.
  """
  y_LV = linear(x_LD, kernel_DV, dtype='float32')
  y_LV = sharding.constrain(y_LV, 'batch', 'vocab')
  return softcap * jnp.tanh(y_LV / softcap) if softcap else y_LV


def cosine(a_LD: jax.Array, b_LD: jax.Array) -> jax.Array:
  """The mean over tokens of the cosine between two vectors, float32."""
  a, b = a_LD.astype(jnp.float32), b_LD.astype(jnp.float32)
  dot = lambda x, y: jnp.sum(x * y, axis=-1)
  return jnp.mean(dot(a, b) * jax.lax.rsqrt(dot(a, a) * dot(b, b) + 1e-12))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x_LD, kernel_DF, dtype):
  return _product(x_LD, kernel_DF, dtype)


def _product(x_LD, kernel_DF, dtype):
  return _dot(x_LD, kernel_DF.astype(x_LD.dtype), (1, 0), dtype)


def _forward(x_LD, kernel_DF, dtype):
  # Not by _linear: then a Hessian product could not differentiate this.
  return _product(x_LD, kernel_DF, dtype), (x_LD, kernel_DF)


def _backward(dtype, saved, dy_LF):
  x_LD, kernel_DF = saved
  dy_LF = dy_LF.astype(x_LD.dtype)
  dx_LD = _dot(dy_LF, kernel_DF.astype(x_LD.dtype), (1, 1), x_LD.dtype)
  wide = kernel_DF.shape[0] <= kernel_DF.shape[1]
  if wide or jax.default_backend() != 'cpu':
    return dx_LD, _dot(x_LD, dy_LF, (0, 0), jnp.float32)
  # The CPU wants the wider side on the right: 94 GFLOP/s against 52 for
  # D = 512, F = 128; 107 against 82 in `small` (422 -> 402 ms). The barrier
  # keeps XLA from undoing it.
  dkernel_FD = _dot(dy_LF, x_LD, (0, 0), jnp.float32)
  return dx_LD, jax.lax.optimization_barrier(dkernel_FD).T


_linear.defvjp(_forward, _backward)


def _dot(a, b, contract, dtype):
  i, j = contract
  dims = ((i,), (j,)), ((), ())
  return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)
