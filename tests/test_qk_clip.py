"""QK-clip: the same batch again has scores of at most tau; off is free."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import attention, model, qk_clip, state, step
from lm.errors import UserError
from tests import helpers

TOKENS = jax.random.randint(jax.random.key(1), (8, 33), 0, 256)


def _config(**knobs):
  large = {'model__init_std': 0.5, 'model__num_heads': 4,  # scores of 30
           'model__num_layers': 2}  # fmt: skip
  return helpers.config(**{**large, 'learning_rate': 0.0, **knobs})


def _one(config):
  net = model.build(config.model)
  s = state.init(config, net, jax.random.key(0))
  return (
    net,
    s,
    *jax.jit(step.build_train(config, net))(s, TOKENS, step.floats(config)),
  )


def _scores(net, params):
  _, found = net.probe(params, TOKENS[:, :-1], ('max_logits',))
  return found['max_logits']


def _numpy_scores(q_BTHK, k_BTGK):
  k_BTHK = np.repeat(k_BTGK, q_BTHK.shape[2] // k_BTGK.shape[2], axis=2)
  s = np.einsum('bthk,bshk->hbts', q_BTHK, k_BTHK) / q_BTHK.shape[3] ** 0.5
  causal = np.tril(np.ones(s.shape[-2:], bool))
  return np.where(causal, s, -np.inf).max((1, 2, 3))


@pytest.mark.parametrize('groups', [4, 2])
def test_max_logits_by_numpy(groups):
  """150 queries, so that there are chunks."""
  q, k = (np.random.default_rng(h).normal(size=(2, 150, h, 8)).astype('f')
          for h in (4, groups))  # fmt: skip
  got = attention.max_logits(jnp.asarray(q), jnp.asarray(k))
  np.testing.assert_allclose(got, _numpy_scores(q, k), rtol=1e-5)


def test_golden_factors():
  """S = 250, tau = 100: gamma = 0.4; sqrt(gamma) each, or all on the query."""
  ones = jnp.ones((6, 2, 4))
  tree = {'max_logits': jnp.array([250.0, 90.0])}
  got = qk_clip.clip({'q': ones, 'k': ones, 'v': ones}, tree, 100.0)
  for name in ('q', 'k'):
    np.testing.assert_allclose(got[name][:, 0], 0.632456, rtol=1e-6)
    np.testing.assert_array_equal(got[name][:, 1], 1)
  np.testing.assert_array_equal(got['v'], ones)
  shared = qk_clip.clip({'q': ones, 'k': ones[:, :1]}, tree, 100.0)
  np.testing.assert_allclose(shared['q'][:, 0], 0.4, rtol=1e-6)
  np.testing.assert_array_equal(shared['q'][:, 1], 1)
  np.testing.assert_array_equal(shared['k'], 1)


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('groups', [4, 2])
def test_the_same_batch_again_has_scores_of_tau(groups, scan):
  """Without a step; exact in the first layer, whose input does not change.

  With accumulation and remat, which must not lose or divide a maximum.
  """
  config = _config(
    model__num_kv_heads=groups, model__scan_layers=scan, grad_accum_steps=2,
    model__remat='full',
  )  # fmt: skip

  def first(params):
    found = _scores(net, params)
    layer = found['blocks'] if scan else found['block_0']
    scores = np.asarray(layer['attn']['max_logits'])
    return scores[0] if scan else scores

  net = model.build(config.model)
  before = first(net.init(jax.random.key(0)))
  tau = float(np.median(before))
  config.qk_clip = tau
  _, old, new, metrics = _one(config)
  np.testing.assert_allclose(
    first(new.params), np.minimum(before, tau), rtol=1e-5
  )
  largest = qk_clip.largest(_scores(net, old.params))
  np.testing.assert_allclose(metrics['optim/max_logit'], largest, rtol=1e-5)


def test_off_or_not_reached_is_the_same_step():
  """Off, the program has no scores; below tau, the step has no clipping."""
  off = _config(learning_rate=1e-2)
  net, _, plain, metrics = _one(off)
  assert 'qk_clip' not in step.floats(off) and 'optim/max_logit' not in metrics
  *_, high, _ = _one(_config(learning_rate=1e-2, qk_clip=1e6))
  *_, low, _ = _one(_config(learning_rate=1e-2, qk_clip=5.0))
  differs = []
  for a, b, c in zip(
    *(jax.tree.leaves(s.params) for s in (plain, high, low)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-4)
    differs.append((b != c).any())
  assert sum(differs) == 2  # q of two layers: their heads share keys


def test_mistakes_are_one_sentence():
  with pytest.raises(UserError, match=r'qk_clip=100.0 would do nothing'):
    state.check(_config(qk_clip=100.0, model__qk_norm=True))
  sf = helpers.config('optimizer=schedule_free_adamw', qk_clip=100.0)
  with pytest.raises(UserError, match='are a mean; use another optimizer'):
    state.check(sf)
