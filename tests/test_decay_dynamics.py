"""Where weight decay leads: equilibria, manifolds of minima, what falls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimizers.adamw import adamw
from optimizers.parts import kernels
from optimizers.parts.decay import descend
from tests import optimizer_problem as problem


@pytest.mark.parametrize(
  ('wd', 'rms', 'rotation'), [(0.1, 0.2236, 0.01026), (0.4, 0.1118, 0.02052)]
)
def test_equilibrium_under_random_gradients(wd, rms, rotation):
  """RMS(x) = sqrt(lr / 2 wd), rotation sqrt(2 lr wd (1 - b1) / (1 + b1)).

  The one check that decay is wired correctly in a long run (2305.17212). The
  formulas are limits of small lr wd; at these the RMS is smaller by 0.5 and 2 %
  (the variance of an AR(1) process that is driven by one).
  """
  lr, b1 = 0.01, 0.9
  tx = adamw(lr, b1=b1, b2=0.99, weight_decay=wd)

  def body(carry, key):
    x, state = carry
    g = jax.random.normal(key, x.shape)
    updates, state = tx.update(g, state, x)
    relative = jnp.linalg.norm(updates) / jnp.linalg.norm(x)
    return (x + updates, state), (jnp.mean(x**2), relative)

  x = rms * jnp.ones(4000)
  keys = jax.random.split(jax.random.key(0), 3000)
  _, (square, moved) = jax.jit(
    lambda x: jax.lax.scan(body, (x, tx.init(x)), keys)
  )(x)
  a = 1 - lr * wd
  noise = (1 - b1) / (1 + b1) * (1 + a * b1) / (1 - a * b1)
  exact = (lr**2 / (1 - a**2) * noise) ** 0.5
  got = square[-1000:].mean() ** 0.5
  assert got == pytest.approx(exact, rel=0.01)
  assert got == pytest.approx(rms, rel=0.025)
  assert moved[-1000:].mean() == pytest.approx(rotation, rel=0.01)


def _walk(f, start, mode, make, peak=1e-2, falls=True):
  """Minimises f in 20,000 steps of float64; to a learning rate of 0 if falls.

  Returns the end, f there, and by how much each step changed f.
  """
  n = 20_000

  def body(carry, t):
    x, state = carry
    tx = make(peak * (1 - falls * (t + 1) / n), None, peak, decay=mode)
    updates, state = tx.update(jax.grad(f)(x), state, x)
    return (x + updates, state), f(x)

  with jax.enable_x64(True):
    x = jnp.array(start)
    init = make(peak, None, peak, decay=mode).init(x)
    run = jax.jit(lambda x, s: jax.lax.scan(body, (x, s), jnp.arange(n)))
    (x, _), values = run(x, init)
    end = float(f(x))
    return np.asarray(x), end, np.diff(np.append(values, end))


def _parabola(p):
  return (p[1] - 3 - (p[0] - 3) ** 2) ** 2


def _circle(p):
  return ((p[1] - 3) ** 2 + (p[0] - 3) ** 2 - 1) ** 2


_adam = functools.partial(adamw, b2=0.95, weight_decay=0.4)


about = pytest.approx


@pytest.mark.parametrize(
  ('f', 'mode', 'end', 'digits', 'value'),
  [
    (_parabola, 'none', (4.788, 6.198), 3, about(0, abs=1e-10)),
    (_parabola, 'decoupled', (2.5, 2.5), 6, about(0.5625, abs=1e-6)),
    (_parabola, 'cautious', (2.99994, 3.0), 5, about(2.6e-13, rel=0.02)),
    (_circle, 'none', (3.910, 3.414), 3, about(0, abs=1e-10)),
    (_circle, 'decoupled', (2.29289, 2.29289), 5, about(0, abs=1e-10)),
    (_circle, 'cautious', (3.71447, 3.69967), 5, about(0, abs=1e-10)),
  ],
)
def test_where_decay_leads_on_a_manifold_of_minima(f, mode, end, digits, value):
  """Decay stops at a biased point, cautious decay at a Pareto point of |x|.

  End points computed independently in float64 for the toys of 2510.12402. In
  the circle's box |x| <= 1 / wd lies one point of it, so its loss is small too.
  """
  start = (5.0, 6.0) if f is _parabola else (4.5, 4.0)
  x, loss, _ = _walk(f, start, mode, _adam)
  # Half of a unit of the last printed digit, and what that was rounded from.
  np.testing.assert_allclose(x, end, rtol=0, atol=0.6 * 10.0**-digits)
  assert loss == value


def _sgd(learning_rate, axes, peak, *, decay):
  knobs = {'weight_decay': 0.5, 'decay': decay}
  return descend(optax.identity(), learning_rate, axes, peak, **knobs)


def test_cautious_decay_does_not_raise_the_loss_of_gradient_descent():
  """f itself is a Lyapunov function, up to O(lr^2); not so with plain decay."""
  run = functools.partial(_walk, _circle, (4.5, 4.0), make=_sgd, peak=1e-3)
  _, end, steps = run('cautious', falls=False)
  assert (steps > 1e-15).sum() <= 1 and end < 1e-26  # 4e-27: round-off
  _, end, steps = run('decoupled', falls=False)
  assert end == pytest.approx(0.1116, abs=5e-5)
  # Most are round-off beside the end, so their number has a tolerance.
  assert (steps > 1e-15).sum() == pytest.approx(7863, rel=0.01)


@pytest.mark.parametrize('f', [_parabola, _circle])
def test_the_rate_at_which_cautious_decay_lowers_the_loss(f):
  """-|grad f|^2 - wd sum max(x grad f, 0) (2510.12402); plain decay differs."""
  with jax.enable_x64(True):
    x = jnp.array(problem.normal((2,), 50))
    g = jax.vmap(jax.grad(f))(x)
    toward_zero = jnp.maximum(g * x, 0).sum(1)
    want = -(g**2).sum(1) - 0.5 * toward_zero
    rate = lambda mode: (g * _moved(mode, x, g)).sum(1)
    np.testing.assert_allclose(rate('cautious'), want, rtol=1e-12)
    assert (rate('decoupled') > want + 1e-3).any()


def _moved(mode, x, g):
  tx = _sgd(1.0, None, None, decay=mode)
  return tx.update(g, tx.init(x), x)[0]


@pytest.mark.parametrize('kernel', ['quadratic', 'relativistic'])
def test_the_lyapunov_function_of_momentum_with_cautious_decay(kernel):
  """f + K(m) + wd sum max(m x, 0) falls, up to O(lr^2); not with plain decay.

  2510.12402 for dx = -(grad K(m) + wd [m x >= 0] x) dt, dm = (grad f - m) dt:
  momentum with K = m^2 / 2, Lion-K with any even K.
  """
  k, wd, dims, e = kernels.KERNELS[kernel], 0.4, (0,), 0.1

  def h(x, m):
    toward_zero = jnp.maximum(m * x, 0).sum()
    return _circle(x) + k.value(m, e, dims)[0] + wd * toward_zero

  def rise(mode, lr):
    momentum = optax.stateless(lambda m, _: k.gradient(m, e, dims))
    tx = descend(momentum, lr, None, None, weight_decay=wd, decay=mode)

    def body(carry, _):
      x, m = carry
      before = h(x, m)
      m = m + lr * (jax.grad(_circle)(x) - m)
      updates, _ = tx.update(m, tx.init(x), x)
      return (x + updates, m), before

    with jax.enable_x64(True):
      start = jnp.array((4.5, 4.0)), jnp.zeros(2)
      run = lambda c: jax.lax.scan(body, c, length=int(20 / lr))[1]
      return np.diff(jax.jit(run)(start)).max()

  for lr in (1e-2, 1e-3):
    assert rise('cautious', lr) <= 20 * lr**2
  assert rise('decoupled', 1e-3) > 10 * 20 * 1e-3**2


def test_the_lyapunov_function_of_adam_with_cautious_decay():
  """f + sum a m^2 / 2h + wd sum max(m x, 0) falls, up to O(lr^2) (2510.12402).

  a m / h is Adam's direction with its corrected moments; means of time 1.
  """
  wd, eps = 0.4, 0.1

  def rise(mode, lr):
    knobs = {'b1': 1 - lr, 'b2': 1 - lr, 'eps': eps, 'weight_decay': wd}
    tx = adamw(lr, decay=mode, **knobs)

    def body(carry, _):
      x, state = carry
      updates, state = tx.update(jax.grad(_circle)(x), state, x)
      x, m, c = x + updates, state.mu, 1 - (1 - lr) ** state.count
      size = m**2 / (2 * c * (jnp.sqrt(state.nu / c) + eps))
      h = _circle(x) + (size + wd * jnp.maximum(m * x, 0)).sum()
      return (x, state), h

    with jax.enable_x64(True):
      x = jnp.array((4.5, 4.0))
      run = lambda x: jax.lax.scan(body, (x, tx.init(x)), length=int(20 / lr))
      return np.diff(jax.jit(run)(x)[1]).max()

  for lr in (1e-2, 1e-3):
    assert rise('cautious', lr) <= 10 * lr**2
    assert rise('decoupled', lr) > 500 * lr**2
