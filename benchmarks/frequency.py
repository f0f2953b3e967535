r"""Rare tokens: what weight decay and the choice of optimizer do to them.

  python -m benchmarks.frequency

Two toys in which each input has one right answer, so that all loss is bias:
- bigram: the next token is a permutation of the last one; tokens are Zipf
  distributed; a table and a head of width 64 are trained by AdamW. Cautious
  decay is unbiased (2510.12402); plain decay forgets rare tokens first
  (2410.11985).
- classes: 111 classes with 100, 10 or 1 examples each, a softmax on one-hot
  inputs, full batch (2402.19449): gradient descent is slow on rare classes,
  Adam and the sign are not.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch import cli
from lm import frequency
from optimizers.adamw import adamw

VOCAB, WIDTH, BATCH, STEPS, PEAK = 200, 64, 64, 3000, 3e-3
ARMS = (
  'cautious',
  'random-matched',
  'cautious-gradient',
  'decoupled',
  'none',
)
CLASSES = np.repeat([100, 10, 1], [1, 10, 100])  # examples of each class


def zipf() -> np.ndarray:
  """Returns the probability of each token, falling like 1 / rank."""
  p = 1 / np.arange(1, VOCAB + 1)
  return p / p.sum()


@functools.cache
def _bigram(mode, num_steps):
  rng = np.random.default_rng(0)
  target = jnp.asarray(rng.permutation(VOCAB))
  start = {
    'table': jnp.asarray(rng.standard_normal((VOCAB, WIDTH)), jnp.float32),
    'head': jnp.asarray(rng.standard_normal((WIDTH, VOCAB)), jnp.float32) / 8,
  }
  tokens = rng.choice(VOCAB, (num_steps, BATCH), p=zipf())

  def losses(params, tokens):
    logits = params['table'][tokens] @ params['head']
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, target[tokens]
    )

  @jax.jit
  def run(weight_decay, tokens):
    def make(lr):
      return adamw(lr, None, PEAK, weight_decay=weight_decay, decay=mode)

    def body(carry, x):
      step, tokens = x
      params, state = carry
      lr = PEAK * (1 + jnp.cos(jnp.pi * step / num_steps)) / 2
      grads = jax.grad(lambda p: losses(p, tokens).mean())(params)
      updates, state = make(lr).update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    steps = jnp.arange(num_steps)
    first = (start, make(PEAK).init(start))
    (params, _), _ = jax.lax.scan(body, first, (steps, tokens))
    return losses(params, jnp.arange(VOCAB))

  return lambda weight_decay: np.asarray(run(weight_decay, tokens))


def bigram(
  mode: str, weight_decay: float, num_steps: int = STEPS
) -> np.ndarray:
  """Trains the bigram model; returns the final loss of each token (VOCAB,)."""
  return _bigram(mode, num_steps)(weight_decay)


def by_rarity(losses: np.ndarray, num: int = 4) -> np.ndarray:
  """Returns the mean loss of groups of equal mass, the rarest last."""
  counts = np.round(zipf() * 1e9).astype(np.int64)
  return frequency.means(losses, counts, num)


def classes(tx: optax.GradientTransformation, num_steps: int = 200):
  """Returns the losses (mean, frequent, medium, rare) of the second toy."""
  n = CLASSES.size
  share = jnp.asarray(CLASSES / CLASSES.sum())

  def losses(w):
    return -jnp.diag(jax.nn.log_softmax(w, axis=1))

  def body(carry, _):
    w, state = carry
    g = jax.grad(lambda w: jnp.sum(share * losses(w)))(w)
    updates, state = tx.update(g, state, w)
    return (optax.apply_updates(w, updates), state), None

  w = jnp.zeros((n, n))
  run = jax.jit(lambda w: jax.lax.scan(body, (w, tx.init(w)), length=num_steps))
  end = np.asarray(losses(run(w)[0][0]))
  groups = frequency.means(end, CLASSES, 3)
  return np.r_[np.sum(CLASSES / CLASSES.sum() * end), groups]


SMALL = {
  'gradient descent, lr 1': optax.sgd(1.0),
  'gradient descent, lr 10': optax.sgd(10.0),
  'Adam without momentum, lr 0.03': optax.adam(0.03, 0.0, 0.9),
  'sign, lr 0.03': optax.sign_sgd(0.03),
}


def main() -> None:
  start = time.time()
  for wd in (2.0, 10.0):
    for mode in ARMS:
      loss = np.sum(zipf() * bigram(mode, wd))
      print(f'bigram, wd {wd}, {mode}: {loss:.3g}', flush=True)
  for wd in (0.3, 1.0, 2.0):
    for mode in ('decoupled', 'cautious'):
      print(
        f'by rarity, wd {wd}, {mode}:', by_rarity(bigram(mode, wd)).round(4)
      )
  for name, tx in SMALL.items():
    print(f'classes, {name}: mean and groups', classes(tx).round(4))
  print(f'{time.time() - start:.0f} s')


if __name__ == '__main__':
  cli.run(main)
