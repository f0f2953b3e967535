"""Weight decay of whole training steps: knobs of a run that change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import loop, step
from optimizers.parts import decay
from tests import helpers


def _steps(num_steps=2, **overrides):
  """Parameters and metrics after some steps of a run of 100."""
  c = helpers.config('schedule=linear', **{'num_steps': 100, **overrides})
  built = loop.build(c)
  state, out = built.init(), []
  for n in range(num_steps):
    tokens = built.data.train.batch(n, [(0, c.batch_size)])
    state, metrics = built.train_step(state, tokens, step.floats(c))
    out.append(jax.device_get(metrics))
  return jax.device_get(state.params), out


def _close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_decoupled_decay_that_follows_the_schedule_is_corrected():
  """AdamC, and the way to have it with any mask."""
  knobs = {'optimizer__weight_decay': 3.0, 'num_steps': 4}
  a, _ = _steps(3, follow='weight_decay=0', **knobs)
  b, _ = _steps(3, optimizer__decay='corrected', **knobs)
  c, _ = _steps(3, **knobs)
  _close(a, b, rtol=1e-5, atol=1e-7)
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), a, c)
  assert max(jax.tree.leaves(moved)) > 1e-4


def test_normalized_decay():
  """0.05 sqrt(128 / (50_000 * 100)) = 2.5298e-4, 5.9628e-5 for 1800 epochs."""
  for epochs, want in ((100, 2.5298e-4), (1800, 5.9628e-5)):
    num_steps = 50_000 * epochs // 128
    c = helpers.config(num_steps=num_steps, normalize_decay=True)
    c.optimizer.weight_decay = 0.05
    got = step.knobs(c, 0, step.floats(c))['weight_decay']
    assert got == pytest.approx(want, rel=1e-4)
  a, log = _steps(
    normalize_decay=True, optimizer__weight_decay=30.0, follow='weight_decay=10'
  )
  b, _ = _steps(optimizer__weight_decay=3.0, follow='weight_decay=1')
  _close(a, b, rtol=1e-6, atol=1e-8)
  assert log[1]['optim/weight_decay'] == pytest.approx(1 + 2 * 0.99, rel=1e-5)


@pytest.mark.parametrize('mode', decay.MODES)
def test_each_mode_is_linear_in_wd_so_that_wd_can_follow_a_schedule(mode):
  rng = np.random.default_rng(0)
  x, u = jnp.asarray(rng.normal(size=(2, 8, 8)), jnp.float32)

  @jax.jit
  def moved(wd):
    tx = decay.descend(
      optax.identity(), 0.5, None, 2.0, weight_decay=wd, decay=mode
    )
    return tx.update(u, tx.init(x), x)[0]

  parts = [moved(wd) - moved(0.0) for wd in (0.25, 0.125)]
  np.testing.assert_allclose(parts[0], 2 * parts[1], atol=1e-6)
  assert parts[0].any() == (mode != 'none')
