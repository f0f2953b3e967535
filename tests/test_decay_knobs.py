"""Weight decay that a run changes: it follows schedules, it is normalised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import spec, step
from optimizers.parts import decay
from tests import helpers


def _knobs(n, **overrides):
  c = helpers.config('schedule=linear', **overrides)
  return c, step.knobs(c, n, step.floats(c))


def test_decoupled_decay_that_follows_the_schedule_is_corrected():
  """AdamC, and the way to have it with any mask."""
  x, lr = jnp.linspace(-1, 1, 16).reshape(4, 4), 1e-3
  moved = []
  for overrides in (
    {'follow': 'weight_decay=0'},
    {'optimizer__decay': 'corrected'},
    {},
  ):
    c, floats = _knobs(9, optimizer__weight_decay=3.0, **overrides)
    rate = lr * step.multiplier(c, 9, {})
    tx = spec.build('optimizers', c.optimizer, rate, None, lr, floats=floats)
    moved.append(tx.update(0 * x, tx.init(x), x)[0])
  np.testing.assert_allclose(moved[0], moved[1], rtol=1e-6)
  assert np.abs(moved[0] - moved[2]).max() > 1e-5


def test_normalized_decay():
  """0.05 sqrt(128 / (50_000 * 100)) = 2.5298e-4, 5.9628e-5 for 1800 epochs."""
  for epochs, want in ((100, 2.5298e-4), (1800, 5.9628e-5)):
    _, got = _knobs(
      0,
      num_steps=50_000 * epochs // 128,
      normalize_decay=True,
      optimizer__weight_decay=0.05,
    )
    assert got['weight_decay'] == pytest.approx(want, rel=1e-4)
  both = {'num_steps': 100, 'follow': 'weight_decay=10'}
  _, got = _knobs(
    60, normalize_decay=True, optimizer__weight_decay=30.0, **both
  )
  _, want = _knobs(60, optimizer__weight_decay=30.0, **both)
  assert 10 < want['weight_decay'] < 30
  assert got['weight_decay'] == pytest.approx(want['weight_decay'] / 10)
  assert got['b1'] == want['b1']


@pytest.mark.parametrize('mode', decay.MODES)
def test_each_mode_is_linear_in_wd_so_that_wd_can_follow_a_schedule(mode):
  rng = np.random.default_rng(0)
  x, u = jnp.asarray(rng.normal(size=(2, 8, 8)) + 0.5, jnp.float32)

  @jax.jit
  def moved(wd):
    tx = decay.descend(
      optax.identity(), 0.5, None, 2.0, weight_decay=wd, decay=mode
    )
    return tx.update(u, tx.init(x), x)[0]

  parts = [moved(wd) - moved(0.0) for wd in (0.25, 0.125)]
  np.testing.assert_allclose(parts[0], 2 * parts[1], atol=1e-6)
  assert parts[0].any() == (mode != 'none')
