"""A small parameter tree with every role, scanned or not, and a loss on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import axes as lm_axes

_BLOCK = {
  'query': (('embed', 'heads', 'head_dim'), (8, 2, 4)),
  'out': (('heads', 'head_dim', 'embed'), (2, 4, 8)),
  'norm': (('norm',), (8,)),
}
_ENDS = {
  'table': (('vocab', 'embed'), (16, 8)),
  'head': (('embed', 'vocab'), (8, 16)),
}


def names_and_shapes(scan=True, layers=2):
  """Returns a tree of (logical names, shape)."""
  if scan:
    blocks = {k: (('layers', *n), (layers, *s)) for k, (n, s) in _BLOCK.items()}
    return {'blocks': blocks, **_ENDS}
  return {**{f'block_{i}': dict(_BLOCK) for i in range(layers)}, **_ENDS}


def _is_pair(x):
  return isinstance(x, tuple)


def axes(scan=True):
  return jax.tree.map(
    lambda x: lm_axes.from_names(x[0]), names_and_shapes(scan), is_leaf=_is_pair
  )


def params(scan=True, seed=0, dtype=jnp.float32):
  """Normal numbers of size 0.3; the same ones on every machine."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x[1]), dtype),
    names_and_shapes(scan),
    is_leaf=_is_pair,
  )


def gradients(num_steps, scan=True):
  """A tree like `params` with a leading axis of steps."""
  trees = [params(scan, 1 + i) for i in range(num_steps)]
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def loss(tree):
  """Cross-entropy of a fixed permutation of 16 tokens; `tree` is scanned."""
  x = tree['table']
  for i in range(2):
    b = jax.tree.map(lambda x, i=i: x[i], tree['blocks'])
    q = jnp.einsum('td,dhk->thk', x, b['query'])
    x = x + jnp.einsum('thk,hkd->td', jnp.tanh(q), b['out'])
    x = x * (1 + b['norm'])
  logits = x @ tree['head']
  wanted = jnp.roll(jnp.arange(16), 5)
  return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), wanted])


def normal(shape, n=6, seed=0):
  """n arrays of standard normal numbers, float64."""
  return np.random.default_rng(seed).standard_normal((n, *shape))


def run(tx, x, grads):
  """Returns the parameters after each of the steps, all in float64."""
  with jax.enable_x64(True):
    x = jax.tree.map(jnp.asarray, x)
    state, out = tx.init(x), []
    update = jax.jit(tx.update)
    for g in grads:
      updates, state = update(jax.tree.map(jnp.asarray, g), state, x)
      x = optax.apply_updates(x, updates)
      out.append(x)
    return jax.tree.map(lambda *y: np.stack(y), *out)
