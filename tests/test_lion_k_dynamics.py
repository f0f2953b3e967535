"""Lion-K: the functions that it descends, and the bounds that it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimizers.lion_k import lion_k
from optimizers.parts import kernels, roles
from tests import optimizer_problem as problem

KERNELS = kernels.KERNELS
DIMS = {'group': (1,), 'nuclear': (0, 1)}
E = {'topk': 1 / 3, 'lp': 3.0}  # 2 of 6, p; e = 0.3 for all others
SMOOTH = ('l2', 'lp', 'quadratic', 'huber', 'relativistic', 'logcosh')
each = pytest.mark.parametrize('name', KERNELS)
A = np.diag(np.arange(1, 7) / 3)
STAR = np.array([2, -1.5, 0.4, 0.1, -0.7, 0.3])


def _lyapunov(name, lr, num_steps, b1=0.9, b2=0.99, parts=False):
  """Returns H_t of the discrete Lyapunov function, decay 1, from x = 0.

  H = f(x) + K*(x) + c (K*(x) + K(mu) + <mu, x>),
  c = lr b1 / ((1 - b2) + lr (1 - b1)), both x and mu before step t. `parts`
  returns f + K* and c (...) by themselves.
  """
  k = KERNELS[name]
  dims = DIMS.get(name, (0,))
  shape = (3, 2) if name in DIMS else (6,)
  e = E.get(name, 0.3)
  axes = roles.Axes(('', ''), 'matrix', (1,), (0,)) if name in DIMS else None
  tx = lion_k(lr, axes, kernel=name, epsilon=e, relative=False, b1=b1, b2=b2)
  f = lambda x: (x.ravel() - STAR) @ A @ (x.ravel() - STAR) / 2
  c = lr * b1 / ((1 - b2) + lr * (1 - b1))

  def body(carry, _):
    x, state = carry
    conjugate = k.conjugate(x, e, dims).sum()
    bracket = (
      conjugate + k.value(state.mu, e, dims).sum() + (state.mu * x).sum()
    )
    h = jnp.stack([f(x) + conjugate, c * bracket])
    updates, state = tx.update(jax.grad(f)(x), state, x)
    return (x + updates, state), h

  with jax.enable_x64(True):
    x = jnp.zeros(shape)
    run = lambda x: jax.lax.scan(body, (x, tx.init(x)), length=num_steps)[1]
    h = np.asarray(jax.jit(run)(x))
  return h.T if parts else h.sum(1)


def test_golden_lyapunov_function_of_lion():
  want = [2.0016666667, 1.80065, 1.63655915, 1.4850304893, 1.3691378160,
          1.2682947008]  # fmt: skip
  np.testing.assert_allclose(_lyapunov('l1', 0.1, 6), want, atol=1e-9)


@each
def test_the_lyapunov_function_falls(name):
  """Never rises for smooth kernels; by O(lr^2) for those with kinks."""
  rises = {lr: np.diff(_lyapunov(name, lr, int(20 / lr))).max()
           for lr in (1e-2, 1e-3)}  # fmt: skip
  if name in SMOOTH:
    assert max(rises.values()) <= 1e-12
  else:
    assert all(rise <= 1.65 * lr**2 for lr, rise in rises.items()), rises


def test_the_constants_of_what_lion_rises_by():
  """1.65e-4 and 1.6e-6 at lr = 1e-2 and 1e-3: O(lr^2), with the constant."""
  for lr, want, digit in ((1e-2, 1.65e-4, 1e-6), (1e-3, 1.6e-6, 1e-7)):
    rise = np.diff(_lyapunov('l1', lr, int(20 / lr))).max()
    assert rise == pytest.approx(want, abs=digit / 2)


def test_the_weight_of_the_gap_has_the_factor_lr():
  """Without it, c = b1 / ((1 - b2) + lr (1 - b1)), the function rises by O(1).

  So what the tests above see falling is not any sum of the three parts.
  """
  parts = _lyapunov('l1', 1e-2, 2000, parts=True)
  sound, slip = parts[0] + parts[1], parts[0] + parts[1] / 1e-2
  np.testing.assert_allclose(sound, _lyapunov('l1', 1e-2, 2000), rtol=1e-12)
  assert np.diff(slip).max() > 0.1 > 1e3 * np.diff(sound).max() / 2


def test_it_rises_if_the_momentum_is_shorter_than_the_interpolation():
  """By 4e-3 in a step of lr = 1e-2, of smooth kernels, which never rose."""
  b1, b2 = map(jnp.asarray, (0.99, 0.9))  # numbers would be refused
  assert np.diff(_lyapunov('l1', 1e-2, 2000, b1, b2)).max() > 1e-3
  for name in ('huber', 'relativistic', 'logcosh'):
    rise = np.diff(_lyapunov(name, 1e-2, 2000, b1, b2)).max()
    assert rise == pytest.approx(4e-3, abs=5e-4)


def test_excess_over_the_box_shrinks_as_predicted():
  """x = 10, wd = 0.5, lr = 0.1: wd |x| - 1 falls like (1 - lr wd)^t."""
  tx = lion_k(0.1, kernel='l1', weight_decay=0.5)
  x = problem.run(tx, np.array([10.0]), np.full((5, 1), -1.0))
  excess = 0.5 * np.abs(np.r_[10.0, x.ravel()]) - 1
  assert (excess <= 4 * 0.95 ** np.arange(6) + 1e-12).all()
  x = problem.run(tx, np.array([10.0]), np.full((5, 1), 1.0))
  excess = 0.5 * np.abs(np.r_[10.0, x.ravel()]) - 1
  want = [4.0, 3.7, 3.415, 3.144, 2.887, 2.643]
  np.testing.assert_allclose(excess, want, atol=6e-4)


BOUNDS = {  # what wd x stays inside of, by the kernel
  'l1': np.abs, 'soft': np.abs, 'huber': np.abs, 'relativistic': np.abs,
  'logcosh': np.abs, 'l2': np.linalg.norm,
  'nuclear': lambda x: np.linalg.norm(x, 2), 'linf': lambda x: np.abs(x).sum(),
  'lp': lambda x: (np.abs(x) ** 1.5).sum() ** (2 / 3),
}  # fmt: skip


@pytest.mark.parametrize('name', BOUNDS)
def test_a_trained_network_reaches_its_bound_and_keeps_it(name):
  """Weights start outside, and the excess falls like (1 - lr wd)^t."""
  rng = np.random.default_rng(0)
  data, first, second = (
    jnp.asarray(rng.standard_normal(s)) for s in ((64, 8), (8, 16), (16, 4))
  )
  target = jnp.tanh(data @ first / 3) @ second / 4

  def loss(w):
    return jnp.mean((jnp.tanh(data @ w['a']) @ w['b'] - target) ** 2)

  e = 3.0 if name == 'lp' else 0.5
  tx = lion_k(0.005, kernel=name, epsilon=e, weight_decay=2.0)

  def body(carry, _):
    w, state = carry
    updates, state = tx.update(jax.grad(loss)(w), state, w)
    w = jax.tree.map(jnp.add, w, updates)
    return (w, state), (w, loss(w))

  w = {'a': 3 * first, 'b': 3 * second}
  run = jax.jit(lambda w: jax.lax.scan(body, (w, tx.init(w)), length=1000)[1])
  trace, losses = jax.device_get(run(w))
  for leaf in trace.values():
    bound = np.array([np.max(BOUNDS[name](2.0 * x)) for x in leaf[::50]])
    assert bound[0] > 3
    assert (bound < 1.001 + bound[0] * 0.99 ** np.arange(0, 1000, 50)).all()
  assert losses[-1] < losses[0]


def test_the_polar_factor_takes_singular_values_to_the_bound():
  """Constant gradient, wd = 0.5: all of them end at 1 / wd exactly."""
  g = problem.normal((4, 4), 1)[0]
  tx = lion_k(0.1, kernel='nuclear', weight_decay=0.5)
  x = problem.run(tx, np.zeros((4, 4)), [g] * 600)[-1]
  top = np.linalg.svd(x, compute_uv=False)
  np.testing.assert_allclose(top, 2, rtol=1e-10)


@pytest.mark.parametrize('name', ['l1', 'quadratic', 'huber', 'relativistic',
                                  'logcosh'])  # fmt: skip
def test_the_continuous_lyapunov_function_falls(name):
  """H = f + (c / wd) K*(wd x) + (1 - e c) / (1 + e wd) gap (2310.05898).

  For dx = grad K(n) - wd x, dm = -grad f - c m, n = m - e (grad f + c m), in
  the sign of the paper; gap = K*(wd x) + K(m) - wd <m, x> is never negative.
  """
  k, wd, c, e = KERNELS[name], 0.8, 0.7, 0.4
  f = lambda x: (x - STAR) @ A @ (x - STAR) / 2

  def rates(x, m):
    g = jax.grad(f)(x)
    pull = k.gradient(m - e * (g + c * m), 0.3, (0,))
    direction = pull - wd * x, -g - c * m

    def gap(x, m):
      pair = k.conjugate(wd * x, 0.3, (0,)) + k.value(m, 0.3, (0,))
      return pair[0] - wd * m @ x

    def h(x, m):
      outer = f(x) + c / wd * k.conjugate(wd * x, 0.3, (0,))[0]
      return outer + (1 - e * c) / (1 + e * wd) * gap(x, m)

    return jax.jvp(h, (x, m), direction)[1], gap(x, m)

  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-0.99 / wd, 0.99 / wd, (2000, 6)))
    m = jnp.asarray(rng.normal(size=x.shape))
    rate, gap = jax.device_get(jax.jit(jax.vmap(rates))(x, m))
  assert rate.max() <= 1e-12 and rate.min() < -1 and gap.min() >= -1e-12
