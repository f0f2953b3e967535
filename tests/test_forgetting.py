"""Weights of past updates: figures, an identity, and the replay of a run."""

import hypothesis as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from optimizers.adamw import adamw
from schedules.theory import forgetting
from tests import optimizer_problem as problem


def test_golden_weights():
  """By hand, for 4 steps with wd = 0.5."""
  got = forgetting.weights([0.1] * 4, 0.5)
  np.testing.assert_allclose(got.updates, [0.0857375, 0.09025, 0.095, 0.1])
  assert got.initial == pytest.approx(0.81450625)
  got = forgetting.weights([0.1, 0.075, 0.05, 0.025], 0.5)
  want = [0.0926707, 0.0722109, 0.049375, 0.025]
  np.testing.assert_allclose(got.updates, want, atol=5e-8)
  assert got.initial == pytest.approx(0.8803716797)


@h.settings(max_examples=50, deadline=None, derandomize=True)
@h.given(
  st.lists(st.tuples(st.floats(0, 2), st.floats(0, 1)), min_size=1, max_size=9)
)
def test_identity(rows):
  """An update u = -1 / wd leaves x = 1 in place: P + sum wd w = 1."""
  lr, wd = np.array(rows).T
  got = forgetting.weights(lr, wd)
  assert got.initial + np.sum(wd * got.updates) == pytest.approx(1)
  left = forgetting.remaining(lr, wd)
  assert left[-1] == 1 and left[0] == pytest.approx(got.initial)
  np.testing.assert_allclose(got.updates, lr * left[1:])


RATES = 0.02 * (1 - np.arange(50) / 50)  # from the peak 0.02 to 0


@pytest.mark.parametrize(
  ('mode', 'weight_decay', 'effective'),
  [
    ('decoupled', 3.0, 3.0),
    ('independent', 0.06, 3.0),
    ('corrected', 3.0, 3 * RATES / 0.02),
  ],
)
def test_replay_of_a_run(mode, weight_decay, effective):
  """x_50 of AdamW from x_0 and 50 stored directions, taken without decay."""

  def make(lr, decay):
    return adamw(lr, None, 0.02, weight_decay=weight_decay, decay=decay)

  def body(carry, lr):
    x, state = carry
    g = jax.grad(problem.loss)(x)
    updates, new = make(lr, mode).update(g, state, x)
    bare, _ = make(lr, 'none').update(g, state, x)
    x = jax.tree.map(jnp.add, x, updates)
    return (x, new), jax.tree.map(lambda b: -b / lr, bare)

  x = problem.params()
  lr = jnp.asarray(RATES, jnp.float32)
  run = jax.jit(lambda start: jax.lax.scan(body, start, lr))
  (end, _), u = run((x, make(0.02, mode).init(x)))
  w = forgetting.weights(RATES, effective)
  assert w.initial < 0.5
  for start, path, last in zip(*map(jax.tree.leaves, (x, u, end)), strict=True):
    past = np.tensordot(w.updates, np.asarray(path, np.float64), 1)
    got = w.initial * np.asarray(start, np.float64) - past
    np.testing.assert_allclose(got, last, atol=1e-6)


def _cosine(num_steps, warmup, peak, floor):
  t = np.arange(num_steps)
  angle = np.pi * (t - warmup) / (num_steps - warmup)
  half = floor + (peak - floor) * (1 + np.cos(angle)) / 2
  return np.where(t < warmup, peak * t / warmup, half)


@pytest.mark.parametrize(
  ('num_steps', 'left', 'shares'),
  [
    (
      4730,
      [0.859, 0.876, 0.901, 0.925, 0.947, 0.965, 0.979, 0.989, 0.995, 0.999],
      [0.0576, 0.1603, 0.1731, 0.1617, 0.1408, 0.1131, 0.083, 0.055, 0.0335,
       0.0219],
    ),
    (
      70_500,
      [0.118, 0.179, 0.264, 0.374, 0.502, 0.636, 0.758, 0.857, 0.929, 0.979],
      [0.0523, 0.08, 0.1081, 0.1333, 0.1475, 0.1446, 0.1245, 0.0945, 0.0659,
       0.0492],
    ),
  ],
)  # fmt: skip
def test_deciles_of_published_runs(num_steps, left, shares):
  """The schedules of 2410.03249: cosine, warm-up 700, 6e-4 to 6e-5, wd 0.1."""
  got = forgetting.parts(_cosine(num_steps, 700, 6e-4, 6e-5), 0.1)
  np.testing.assert_allclose(got.remaining, left, atol=6e-4)
  np.testing.assert_allclose(got.shares, shares, atol=6e-5)
  large = forgetting.parts(_cosine(30_803, 700, 2e-4, 2e-5), 0.1)
  assert large.remaining[0] == pytest.approx(0.730, abs=6e-4)


def test_timescale():
  got = forgetting.timescale(3e-4, 0.1, num_steps=5046)
  assert got.steps == pytest.approx(33_333, abs=1)
  assert got.fraction == pytest.approx(6.6, abs=0.01)
  rms, rotation = forgetting.equilibrium(0.01, 0.1)
  assert rms == pytest.approx(0.2236, abs=5e-5)
  assert rotation == pytest.approx(0.01026, abs=5e-6)


@pytest.mark.parametrize(
  ('call', 'sentence'),
  [
    (lambda: forgetting.weights([0.1, -1], 0.1), 'lr contains -1.0; legal'),
    (lambda: forgetting.weights([0.1], np.nan), 'weight_decay contains nan'),
    (lambda: forgetting.weights([0.1], [0.1, 0.1]), r'weight_decay \(2,\)'),
    (lambda: forgetting.weights([], 0.1), r'lr has the shape \(0,\)'),
    (
      lambda: forgetting.parts([0.1] * 3, 0.1),
      'num=10 must be from 1 to the 3',
    ),
    (lambda: forgetting.timescale(0.1, 0, num_steps=5), 'weight_decay=0 must'),
  ],
)
def test_mistakes(call, sentence):
  with pytest.raises(ValueError, match=sentence):
    call()
