r"""Loss of plasticity: a small network that must learn task after task.

  python -m benchmarks.plasticity

Each task is 256 random inputs, the same ones in all tasks, with new random
labels, and 40 steps of Adam. Without a regulariser it loses the ability to
learn them: units die. L2, spectral regularisation (2406.06811) and normalise
and project (NaP: 2407.01800) prevent that.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch import cli
from optimizers.adamw import adamw
from optimizers.parts.nap import nap
from optimizers.parts.spectral_penalty import spectral_penalty

SIZES = (32, 64, 64, 10)  # inputs, two hidden layers, classes
EXAMPLES, TASKS, STEPS, RATE, SEEDS = 256, 30, 40, 1e-2, 3

# Method, are layers normalised, weights of the regulariser. NaP needs the
# normalisation (without it, the first step of its paper is missing).
ARMS = (
  ('none', False, (0.0,)),
  ('l2', False, (3e-3, 1e-2, 3e-2)),
  ('spectral', False, (1e-2, 1e-1, 1.0)),
  ('none', True, (0.0,)),
  ('l2', True, (1e-3, 3e-3, 1e-2)),
  ('nap', True, (0.0,)),
)


def _optimizer(method, weight):
  decay = 'coupled' if method == 'l2' else 'none'
  tx = adamw(RATE, b2=0.999, weight_decay=weight, decay=decay)
  if method == 'spectral':
    return spectral_penalty(tx, None, weight, power=1)
  return nap(tx, None) if method == 'nap' else tx


def _forward(params, x, normalised):
  """Returns logits and the units of hidden layers that are above 0."""
  active = []
  for w, b in params[:-1]:
    x = x @ w + b
    if normalised:
      x = x * jax.lax.rsqrt(jnp.mean(x**2, 1, keepdims=True) + 1e-6)
    active.append(x > 0)
    x = jax.nn.relu(x)
  w, b = params[-1]
  return x @ w + b, jnp.stack(active)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(method, normalised, weight, key):
  """Returns (accuracy, share of dead units), each at the end of each task."""
  tx = _optimizer(method, weight)
  start, inputs, labels = jax.random.split(key, 3)
  shapes = list(zip(SIZES[:-1], SIZES[1:], strict=True))
  keys = jax.random.split(start, len(shapes))
  params = [
    (jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, jnp.zeros(n))
    for k, (m, n) in zip(keys, shapes, strict=True)
  ]
  x = jax.random.normal(inputs, (EXAMPLES, SIZES[0]))
  labels = jax.random.randint(labels, (TASKS, EXAMPLES), 0, SIZES[-1])

  def task(carry, y):
    def loss(p):
      logits, _ = _forward(p, x, normalised)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def body(carry, _):
      p, s = carry
      u, s = tx.update(jax.grad(loss)(p), s, p)
      return (optax.apply_updates(p, u), s), None

    carry, _ = jax.lax.scan(body, carry, length=STEPS)
    logits, active = _forward(carry[0], x, normalised)
    right = jnp.mean(logits.argmax(1) == y)
    return carry, (right, jnp.mean(~active.any(1)))

  return jax.lax.scan(task, (params, tx.init(params)), labels)[1]


@functools.cache
def run(
  method: str, normalised: bool, weights: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Trains all tasks in turn.

  Returns:
    (weights, SEEDS, TASKS), at the end of each task: the accuracy, and the
    share of hidden units that are 0 on all examples.
  """
  one = functools.partial(_train, method, normalised)
  keys = jax.random.split(jax.random.key(0), SEEDS)
  seeds = jax.vmap(one, (None, 0))
  found = jax.vmap(seeds, (0, None))(jnp.array(weights), keys)
  return tuple(map(np.asarray, found))


def main() -> None:
  for method, normalised, weights in ARMS:
    start = time.time()
    accuracy, dead = run(method, normalised, weights)
    name = method + ', normalised' * normalised
    for i, weight in enumerate(weights):
      last = ' '.join(f'{x:.3f}' for x in accuracy[i, :, -5:].mean(1))
      print(
        f'{name} {weight:g}: accuracy of the first task '
        f'{accuracy[i, :, 0].mean():.3f}, of the last five {last}; dead units '
        f'{dead[i, :, -1].mean():.3f}'
      )
    print(f'{time.time() - start:.0f} s', flush=True)


if __name__ == '__main__':
  cli.run(main)
