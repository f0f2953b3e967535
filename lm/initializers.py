"""How the matrices of a model begin; embeddings and heads are normal."""

import math
from collections.abc import Callable

import jax
from jax import numpy as jnp

from lm import axes

# '' = normal; 'isometric' is 'zero' with singular values of RMS 1.
KINDS = ('', 'orthogonal', 'zero', 'isometric')
Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> parameter


def build(c, std: float, names: tuple[str, ...]) -> Initializer:
  """Returns the initializer of `config.model.init` for one parameter.

  ''           normal, of this `std`
  'orthogonal' random, orthonormal rows or columns (Saxe et al. 2013); residual
               outputs are divided by sqrt(2 num_layers)
  'zero'       ZerO (2110.12661, algorithm 1): deterministic, residual outputs 0

  Args:
    c: the model's config.
    std: of normal numbers.
    names: logical names of the dimensions, inputs before outputs.
  """
  meaning = axes.from_names(names)
  if not c.init or meaning.role != 'matrix':
    return jax.nn.initializers.normal(std)
  residual = names[meaning.outputs[0]] == 'embed'

  def init(key, shape, dtype):
    sides = [math.prod(shape[i] for i in d)
             for d in (meaning.inputs, meaning.outputs)]  # fmt: skip
    if c.init == 'orthogonal':
      gain = 1 / math.sqrt(2 * c.num_layers) if residual else 1.0
      x = jax.nn.initializers.orthogonal(gain)(key, sides, dtype)
    elif residual:
      x = jnp.zeros(sides, dtype)
    else:
      x = zero(*sides, isometric=c.init == 'isometric').astype(dtype)
    return x.reshape(shape)

  return init


def zero(fan_in: int, fan_out: int, *, isometric: bool = False) -> jax.Array:
  """Returns ZerO's matrix, (fan_in, fan_out): a partial identity or Hadamard.

  fan_out > fan_in: of the Hadamard matrix of the next power of two p, over
  sqrt(p), the first rows and columns. The RMS of its singular values is
  sqrt(fan_out / p), and all are this if fan_in is a power of two that divides
  fan_out; `isometric` divides by it.
  """
  if fan_out <= fan_in:
    return jnp.eye(fan_in, fan_out)
  p = 2 ** math.ceil(math.log2(fan_out))
  odd = jnp.arange(fan_in)[:, None] & jnp.arange(fan_out)
  sign = 1.0 - 2.0 * (jax.lax.population_count(odd) % 2)
  return sign / math.sqrt(fan_out if isometric else p)
