"""A linear layer whose three matrix products are two-dimensional."""

import math

import jax


def linear(x_LD: jax.Array, kernel: jax.Array, num_inputs: int = 1):
  """Multiplies by a float32 kernel in the dtype of `x`.

  Args:
    x_LD: the inputs; its last dimension is the kernel's first `num_inputs`
      dimensions, flattened. All leading dimensions are a batch.
    kernel: float32.

  Returns:
    An array with the leading dimensions of `x` and the kernel's remaining
    dimensions flattened.
  """
  inputs = math.prod(kernel.shape[:num_inputs])
  kernel_DF = kernel.reshape(inputs, -1).astype(x_LD.dtype)
  return x_LD @ kernel_DF
