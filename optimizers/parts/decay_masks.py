"""Which entries of a parameter decay: cautious masks and their random controls.

With u the descent direction, g the gradient and x the parameter, x decays

  decay                where
  'cautious'           u x >= 0     2510.12402, equation 1: ties decay
  'cautious-strict'    u x > 0      ties do not
  'cautious-gradient'  g x >= 0     the ablation of the paper
  'cautious-tensor'    <u, x> >= 0  a whole matrix or nothing of it
  'random-matched'     at random, as often as 'cautious' would do it now, in
                       this matrix of this run
  'random:0.5'         at random with the probability given, here 0.5

Each matrix of a stack counts for itself. The random masks are a function of the
number of updates and the parameter's name: the same in each run and sharding.
Differs from the paper: its random control has the rates of another run, the one
with cautious decay.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

RANDOM = ('random-matched', 'random:0.5')
MODES = (
  'cautious',
  'cautious-strict',
  'cautious-gradient',
  'cautious-tensor',
  *RANDOM,
)


class RandomState(NamedTuple):
  """Wraps the state of a method whose decay is masked at random."""

  count: jax.Array
  inner: Any


def canonical(decay: str) -> str:
  """Returns the entry of MODES for `decay`: 'random:0.5' for any probability.

  Raises:
    ValueError: the probability is none.
  """
  name, _, rate = decay.partition(':')
  if name != 'random':
    return decay
  try:
    legal = 0 <= float(rate) <= 1
  except ValueError:
    legal = False
  if not legal:
    raise ValueError(
      f"decay='{decay}' needs a probability from 0 to 1, as in 'random:0.5'."
    )
  return 'random:0.5'


def key(count: jax.Array | None, path: Any) -> jax.Array | None:
  """Returns the random key of the parameter at a path for one update."""
  if count is None:
    return None
  name = zlib.crc32(jax.tree_util.keystr(path).encode())
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), count), name)


def masked(
  decay: str,
  x: jax.Array,
  u: jax.Array,
  g: jax.Array,
  *,
  batch: tuple[int, ...],
  key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns x where it decays and 0 elsewhere, and u.

  `batch` are the dimensions that stack matrices; `key` is None unless the mask
  is random. Signs are compared, because a product underflows to -0, which would
  count as aligned.
  """
  dims = tuple(i for i in range(x.ndim) if i not in batch)
  if decay == 'cautious-tensor':
    return jnp.where(jnp.sum(u * x, dims, keepdims=True) >= 0, x, 0), u
  if decay == 'cautious-gradient':
    return jnp.where(jnp.sign(g) * jnp.sign(x) >= 0, x, 0), u
  if decay.startswith('random:'):
    return _at_random(float(decay.partition(':')[2]), x, key), u
  # Times a 1 that XLA cannot see through, because XLA writes a division of two
  # uses to memory, but not a multiplication: 1.8 times the time with AdamW.
  u = u * jax.lax.optimization_barrier(jnp.ones((), u.dtype))
  agree = jnp.sign(u) * jnp.sign(x)
  if decay == 'cautious-strict':
    return jnp.where(agree > 0, x, 0), u
  if decay == 'cautious':
    return jnp.where(agree >= 0, x, 0), u
  rate = jnp.mean(agree >= 0, dims, keepdims=True)
  return _at_random(rate, x, key), u


def _at_random(rate, x, key):
  return jnp.where(jax.random.uniform(key, x.shape) < rate, x, 0)
