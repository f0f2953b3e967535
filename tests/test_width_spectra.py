"""Top singular values over the width, by the rule for weight decay.

2510.15262 finds them to go as sqrt(lr / wd) width^0.75, so that at muP's lr ~
1 / width they stay if wd ~ sqrt(width). That power is empirical: it is 0.5 for
random gradients and, with 1 / wd in place of the root, 1 for constant ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.parts import widths
from lm import loop, state, step, width
from optimizers.adamw import adamw
from tests import helpers

SIZES = (32, 128)
LR, WD = 1e-2, 2.0  # at width 32: 50 steps are a time constant of the decay


def _config(d, rule):
  knobs = {
    'learning_rate': LR,
    'model.num_layers': 1,
    'model.base_width': SIZES[0],
    'optimizer.weight_decay': WD,
    'width.decay': rule,
  }
  config = helpers.config()
  config.update_from_flattened_dict(knobs)
  return widths.at_width(config, d, 'heads')


@functools.partial(jax.jit, static_argnames=('d', 'random', 'num_steps'))
def _driven(lr, wd, d, random, num_steps):
  """Matrices from 0 under gradients of 1, or random ones."""
  tx = adamw(lr, b2=0.99, weight_decay=wd)

  def body(carry, key):
    x, s = carry
    g = jax.random.normal(key, x.shape) if random else jnp.ones_like(x)
    u, s = tx.update(g, s, x)
    return (x + u, s), None

  x = jnp.zeros((8, d, d))
  keys = jax.random.split(jax.random.key(0), num_steps)
  return jax.lax.scan(body, (x, tx.init(x)), keys)[0][0]


def _edge(d):
  """Mean top singular value of d x d unit normals (Johnstone 2001)."""
  a, b = (d - 1) ** 0.5, d**0.5
  spread = (a + b) * (1 / a + 1 / b) ** (1 / 3)
  return ((a + b) ** 2 - 1.2065 * spread) ** 0.5


@pytest.mark.parametrize(
  ('rule', 'slopes'),
  [
    ('sqrt', (0.5, -0.25)),
    ('constant', (1.0, 0.0)),
    ('independent', (0.0, -0.5)),
  ],
)
def test_the_powers_of_aligned_and_of_random_updates(rule, slopes):
  """d / wd and 2 sqrt(d lr / 2 wd), with what is due to the size and to b1.

  The law of the paper lies between them: 0, +0.25 and -0.25.
  """
  n, b1, found = 600, 0.9, []
  for d in SIZES:
    f_lr, f_wd = width.factors(_config(d, rule))['matrix']
    lr, wd = LR * f_lr, WD * f_wd
    top = lambda x: np.linalg.norm(np.asarray(x), 2, axis=(1, 2)).mean()
    a = 1 - lr * wd
    aligned = top(_driven(lr, wd, d, False, n))
    assert aligned == pytest.approx(d / wd * (1 - a**n), rel=1e-4)
    noise = (1 - b1) / (1 + b1) * (1 + a * b1) / (1 - a * b1)
    rms = lr * (noise * (1 - a ** (2 * n)) / (1 - a**2)) ** 0.5
    random = top(_driven(lr, wd, d, True, n))
    assert random == pytest.approx(rms * _edge(d), rel=0.015)
    found.append((aligned, random / _edge(d) * d**0.5))
  # Up to the memory of b1, 10 steps, beside that of the decay, 50 to 200.
  got = [widths.slope(SIZES, x) for x in zip(*found, strict=True)]
  np.testing.assert_allclose(got, slopes, atol=0.06)


SEEDS = 2
RULES = ('sqrt', 'constant', 'independent')
KINDS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


def _trained(d, rule, num_steps=1500, every=50):
  """{kind: (top singular value, RMS of entries)}, over the second half."""
  config = _config(d, rule)
  built = loop.build(config)
  train_step = step.build_train(config, built.model)  # on one device
  traced = step.floats(config)

  def one(s, batch):
    return train_step(s, batch, traced)[0], None

  def some(s, batches):
    s, _ = jax.lax.scan(one, s, batches)
    return s, s.params

  tokens = np.stack([np.asarray(built.batch(n)) for n in range(num_steps)])
  batches = tokens.reshape(-1, every, *tokens.shape[1:])
  make = lambda key: state.init(config, built.model, key)
  run = jax.jit(jax.vmap(lambda key: jax.lax.scan(some, make(key), batches)[1]))
  trace = jax.device_get(run(jax.random.split(jax.random.key(0), SEEDS)))
  squares = []
  for i in np.ndindex(SEEDS, len(batches)):
    if i[1] < len(batches) // 2:
      continue
    params = jax.tree.map(lambda x, i=i: x[i], trace)
    trained = widths.Trained(config, built.model, None, params, params)
    _, top = widths.singular_values(trained)
    block = {**params['block_0']['attn'], **params['block_0']['mlp']}
    squares.append([(top[k] ** 2, np.mean(block[k] ** 2)) for k in KINDS])
  return dict(zip(KINDS, np.sqrt(np.mean(squares, 0)), strict=True))


@pytest.mark.slow
def test_top_singular_values_of_trained_matrices():
  """The powers of the law, and which matrices follow it.

  Slopes after 7.5 to 30 time constants, of three seeds and of means over seeds:

    rule       law    q, k           v              o              MLP
    sqrt        0     -.06 to -.03   .09 to  .12    .14 to  .17    .02 to  .14
    constant    .25    .17 to  .25   .33 to  .54    .38 to  .56    .34 to  .51
    independent -.25  -.37 to -.28  -.07 to -.05   -.05 to -.02   -.18 to -.04

  The order holds for all; "below 0.1 by sqrt" for q and k only (up to width 256
  they have +0.25 and +0.27 with constant decay). Not because of the width: top
  over RMS goes as width^0.71 to width^0.83 by sqrt, in all. But RMS ~ sqrt(lr /
  wd), -0.75 by sqrt and -0.5 with constant decay, is -0.65 and -0.3 in v and o:
  at width 32 their entries are half of what random gradients give (perhaps the
  loss pulls back), and closer to that where decay is weaker.
  """
  narrow = _trained(SIZES[0], 'sqrt')  # where all rules are the same
  wide = {rule: _trained(SIZES[1], rule) for rule in RULES}
  for kind in KINDS:
    tops, entries = (
      [widths.slope(SIZES, (narrow[kind][i], wide[rule][kind][i]))
       for rule in RULES] for i in (0, 1)
    )  # fmt: skip
    sqrt, constant, independent = tops
    assert sqrt - entries[0] == pytest.approx(0.75, abs=0.1), kind
    assert constant - sqrt > 0.15 and sqrt - independent > 0.1, kind
    if kind in ('q', 'k'):
      assert abs(sqrt) < 0.1 and constant > 0.1
      assert constant - sqrt == pytest.approx(0.25, abs=0.1)
      assert sqrt - independent == pytest.approx(0.25, abs=0.12)
    else:
      assert -0.05 < sqrt < 0.2 and constant > 0.25
