"""Muon learns bytes at least as well as AdamW, each at its best rate."""

import jax
import numpy as np
import pytest

from lm import loop, state, step
from tests import helpers

STEPS, SEEDS = 300, 2


def _losses(name, rates):
  """Final validation losses (rates, seeds) of configs/debug.py."""
  config = helpers.config(
    f'optimizer={name},schedule=linear', num_steps=STEPS, batch_size=16,
    eval__num_sequences=256,
  )  # fmt: skip
  built = loop.build(config)
  train_step = step.build_train(config, built.model)  # on one device
  tokens = np.stack([np.asarray(built.batch(n)) for n in range(STEPS)])
  held_out = built.data.eval_tokens_ES

  def run(rate, key):
    traced = {**step.floats(config), 'learning_rate': rate}
    one = lambda s, batch: (train_step(s, batch, traced)[0], None)
    s = jax.lax.scan(one, state.init(config, built.model, key), tokens)[0]
    return step.build_eval(config, built.model)(s.params, held_out)

  keys = jax.random.split(jax.random.key(0), SEEDS)
  over_keys = jax.vmap(run, (None, 0))
  found = jax.jit(jax.vmap(over_keys, (0, None)))(np.asarray(rates), keys)
  return np.asarray(found)


@pytest.mark.slow
def test_muon_is_ahead_of_adamw_each_at_its_best_rate():
  """2.05 against 2.29 nats; the best rates are inside of the grids.

  The claim of Jordan (2024), at 37,024 parameters and 150,000 bytes.
  """
  best = {}
  for name, lowest in (('adamw', 1.5e-3), ('muon', 1.2e-2)):
    losses = _losses(name, lowest * 2.0 ** np.arange(4))
    place = losses.mean(1).argmin()
    assert 0 < place < 3, (name, losses)
    best[name] = losses[place]
  assert (best['muon'] < best['adamw'] - 0.1).all(), best
  assert best['adamw'].max() < 2.5, 'a baseline that learns'
