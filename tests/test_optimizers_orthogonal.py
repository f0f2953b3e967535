"""NorMuon, AdaMuon, Dion, MARS and MARS-M against figures and identities.

Figures: the authors' published PyTorch code, run in float64. 'torch' layout is
(outputs, inputs), which axes express here without a transposition.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimizers.adamuon import adamuon
from optimizers.dion import dion
from optimizers.mars import mars
from optimizers.marsm import marsm
from optimizers.muon import muon
from optimizers.normuon import normuon
from optimizers.parts import newton_schulz, roles
from tests import optimizer_problem as problem

W0 = np.array([[1.0, -0.5, 0.0], [0.0, 2.0, -1.0]])
M = np.array([[[3.0, 0, 1], [0, 2, -1]], [[-1.0, 2, 0], [0.5, 1, 1]]])
TORCH = roles.Axes(('out', 'in'), 'matrix', (1,), (0,))


def _orthogonalized(m):
  """Five steps with Keller Jordan's coefficients, on the singular values."""
  u, s, w = np.linalg.svd(m, full_matrices=False)
  s = s / (np.linalg.norm(s) + 1e-8)
  for a, b, c in newton_schulz.PRESETS['keller'].rows * 5:
    s = a * s + b * s**3 + c * s**5
  return (u * s) @ w


def test_golden_normuon_in_both_layouts():
  torch = [[0.980322785, -0.498734279, -0.006025265],
           [0.000633196, 1.979388994, -0.989483432]]  # fmt: skip
  flax = [[0.979326995, -0.498525501, -0.013953975],
          [0.000421034, 1.977328277, -0.985584487]]  # fmt: skip
  for axes, want in ((TORCH, torch), (None, flax)):
    got = problem.run(normuon(0.02, axes), W0, M[:1])[0]
    np.testing.assert_allclose(got, want, atol=2e-8)
  moved = problem.run(normuon(1.0, TORCH, decay='none'), W0, M[:1])[0] - W0
  rms = np.sqrt((moved**2).mean(1))
  np.testing.assert_allclose(rms, 0.539180, atol=1e-6)


def test_normuon_over_steps_by_its_formula():
  """By numpy: two steps see the mean of squares, at its default too."""
  for knobs, b2 in (({}, 0.95), ({'neuron_b2': 0.7}, 0.7)):
    x, m, v = W0.copy(), 0.0, 0.0
    for g in M:
      m = 0.95 * m + 0.05 * g
      o = _orthogonalized(0.05 * g + 0.95 * m)
      v = b2 * v + (1 - b2) * (o**2).mean(1, keepdims=True)
      p = o / (np.sqrt(v) + 1e-10)
      x = x - 0.02 * (p * np.linalg.norm(o) / np.linalg.norm(p) + 0.1 * x)
    got = problem.run(normuon(0.02, TORCH, **knobs), W0, M)[-1]
    np.testing.assert_allclose(got, x, atol=1e-9)


def _numpy_adamuon(x, grads, lr, mu, wd):
  """Of 2 x 3 matrices and wider ones: no transposition."""
  m, v = np.zeros_like(x), np.zeros_like(x)
  for g in grads:
    m = mu * m + (1 - mu) * g
    o = _orthogonalized(np.sign((1 - mu) * g + mu * m))
    o *= max(1, x.shape[1] / x.shape[0]) ** 0.5
    v = mu * v + (1 - mu) * o**2
    p = o / (np.sqrt(v) + 1e-8)
    x = x - lr * (0.2 * p / np.sqrt((p**2).mean()) + wd * x)
  return x


def test_adamuon_by_its_formula():
  got = problem.run(adamuon(0.02), W0, M)[-1]
  want = _numpy_adamuon(W0, M, 0.02, 0.95, 0.1)
  np.testing.assert_allclose(got, want, atol=1e-9)
  moved = problem.run(adamuon(1.0, decay='none'), W0, M[:1])[0] - W0
  assert np.sqrt((moved**2).mean()) == pytest.approx(0.2)


def test_golden_dion():
  """Constant gradient, first two unit vectors as the basis."""
  want = [
    [[0.982508067, -0.499, -0.005163978], [0, 1.981394065, -0.990697033]],
    [[0.965096936, -0.498455040, -0.010075835],
     [-0.000679560, 1.962648770, -0.981550905]],
  ]  # fmt: skip
  with jax.enable_x64(True):
    tx = dion(0.02, TORCH, rank=2)
    x, g = jnp.asarray(W0), jnp.asarray(M[0])
    state = tx.init(x)
    inner = state.matrices._replace(basis=jnp.eye(3)[None, :, :2])
    state = state._replace(matrices=inner)
    for expected in want:
      updates, state = tx.update(g, state, x)
      x = x + updates
      np.testing.assert_allclose(x, expected, atol=2e-9)


def test_dion_of_full_rank_tends_to_the_polar_factor():
  g = problem.normal((4, 6), 1)[0]
  u, _, v = np.linalg.svd(g, full_matrices=False)
  tx = dion(1.0, decay='none', scale='spectral')
  got = problem.run(tx, np.zeros((4, 6)), [g] * 200)
  last = got[-2] - got[-1]
  np.testing.assert_allclose(last, 1.5**0.5 * u @ v, atol=1e-6)
  low = dion(1.0, decay='none', rank=2)
  moved = problem.run(low, np.zeros((4, 6)), [g])[0]
  assert np.linalg.matrix_rank(moved) == 2


def test_golden_mars():
  grads = np.array([[0.3, -0.1], [-0.2, 0.4]])
  tx = mars(0.1, weight_decay=0.5)
  want = [[0.85000000226, -1.80000000678], [0.80949594763, -1.76500244228]]
  got = problem.run(tx, np.array([1.0, -2.0]), grads)
  np.testing.assert_allclose(got, want, atol=5e-9)


@pytest.mark.parametrize(
  'clip, mu', [(False, [0.07375, 0.0831875, 0.048715625]),
               (True, [0.05, 0.060625, 0.02728125])]
)  # fmt: skip
def test_golden_momentum_of_mars(clip, mu):
  with jax.enable_x64(True):
    tx = mars(0.1, clip=clip)
    x = jnp.zeros(1)
    state = tx.init(x)
    for g, want in zip((1.0, 0.5, -0.25), mu, strict=True):
      _, state = tx.update(jnp.full(1, g), state, x)
      np.testing.assert_allclose(state[1].mu, want, atol=1e-12)


def test_golden_marsm():
  small = [
    [[0.990671084463686, -0.498889833070960, -0.002498055309958],
     [0.000165250393561, 1.991664890954326, -0.995777362012643]],
    [[0.984801754931379, -0.499670906738499, -0.005150379790042],
     [0.001898479955631, 1.983095850556794, -0.992681367276016]],
  ]  # fmt: skip
  clipped = [
    [[0.990671085282301, -0.498889833188110, -0.002498054978511],
     [0.000165250217834, 1.991664890914316, -0.995777362051213]],
    [[0.991312363620767, -0.502489558256599, -0.001010055818045],
     [-0.003951377119845, 1.985829142287142, -0.996958208396311]],
  ]  # fmt: skip
  published = [
    [[0.990671067, -0.498889831, -0.002498062],
     [0.000165254, 1.991664892, -0.995777361]],
    [[0.984801726, -0.499670923, -0.005150395],
     [0.001898482, 1.983095827, -0.992681368]],
  ]  # fmt: skip
  # The authors add 1e-7 to the norm before Newton-Schulz (`published`), this
  # project 1e-8 (their formulas with it).
  for grads, want, atol in (
    (M / 10, small, 5e-9), (M, clipped, 5e-9), (M / 10, published, 4e-8)
  ):  # fmt: skip
    got = problem.run(marsm(0.02), W0, grads)
    np.testing.assert_allclose(got, want, atol=atol)


def test_marsm_with_gamma_one_minus_momentum_is_nesterov_muon():
  grads = problem.normal((3, 5))
  x = np.ones((3, 5))
  a = marsm(0.02, gamma=0.05, clip=False)
  b = muon(0.02, scale='moonlight')
  np.testing.assert_allclose(
    problem.run(a, x, grads), problem.run(b, x, grads), atol=1e-9
  )
  c = marsm(0.02, clip=False)
  gap = np.abs(problem.run(c, x, grads) - problem.run(b, x, grads)).max()
  assert gap > 1e-4


def test_each_layer_of_a_stack_is_on_its_own():
  grads = problem.normal((2, 4, 3), 3) * np.array([1, 50])[:, None, None]
  for make in (normuon, adamuon, mars, marsm):
    both = problem.run(make(0.02), np.ones((2, 4, 3)), grads)
    tx = make(0.02)
    for i in (0, 1):
      one = problem.run(tx, np.ones((4, 3)), grads[:, i])
      np.testing.assert_allclose(both[:, i], one, atol=1e-9)


def test_what_dion_keeps_of_the_momentum():
  """B - (1 - mu) R P^T at mu = 0.9, and a direction that nothing moved."""
  with jax.enable_x64(True):
    tx = dion(1.0, TORCH, rank=2, momentum=0.9, decay='none')
    x, g = jnp.zeros((2, 3)), jnp.array([[1.0, 0, 0], [0, 0, 0]])
    state = tx.init(x)
    q = jnp.eye(3)[None, :, :2]  # of inputs; the second sees no gradient
    state = state._replace(matrices=state.matrices._replace(basis=q))
    _, state = tx.update(g, state, x)
    kept = state.matrices.buffer
    np.testing.assert_allclose(kept, 0.9 * np.asarray(g), atol=1e-12)
    np.testing.assert_allclose(abs(state.matrices.basis), q, atol=1e-12)
