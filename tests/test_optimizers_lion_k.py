"""Lion-K: convex analysis of its kernels, and the function that it descends."""

import functools

import hypothesis as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optimizers.lion_k import lion_k
from optimizers.parts import kernels, roles
from tests import optimizer_problem as problem

KERNELS = kernels.KERNELS
X = [0.5, -0.2, 1.0, 0.1, -2.0, 0.3]
E = {'topk': 1 / 3}  # 2 of 6; e = 0.3 for all others
VALUES = {  # K(X), computed from the definitions in float64
  'l1': 4.1, 'l2': 2.321637353, 'l3': 2.092414051, 'linf': 2.0,
  'quadratic': 2.695, 'soft': 2.6, 'topk': 3.0, 'huber': 3.283333333,
  'relativistic': 4.750547644, 'logcosh': 3.09581102, 'group': 3.565878884,
}  # fmt: skip
GRADIENTS = {
  'huber': [1, -2 / 3, 1, 1 / 3, -1, 1],
  'logcosh': [0.931110, -0.582783, 0.997457, 0.321513, -0.999997, 0.761594],
  'group': [0.928477, -0.371391, 0.995037, 0.099504, -0.988936, 0.148340],
}
SMOOTH = ('l2', 'l3', 'quadratic', 'huber', 'relativistic', 'logcosh')
each = pytest.mark.parametrize('name', KERNELS)


def _shaped(name, x):
  """Groups of two for 'group', one tensor for all others."""
  return (x.reshape(3, 2), (1,)) if name == 'group' else (x, (0,))


@functools.cache
def _jitted(name, part):
  return jax.jit(getattr(KERNELS[name], part), static_argnums=2)


def _call(name, part, x):
  x, dims = _shaped(name, np.asarray(x))
  e = np.float64(E.get(name, 0.3))
  return np.asarray(_jitted(name, part)(x, e, dims))


@each
def test_golden_values_and_gradients(name):
  with jax.enable_x64(True):
    assert _call(name, 'value', X).sum() == pytest.approx(
      VALUES[name], abs=1e-8
    )
    if name in GRADIENTS:
      got = _call(name, 'gradient', X).ravel()
      np.testing.assert_allclose(got, GRADIENTS[name], atol=1e-6)


@h.settings(max_examples=15, deadline=None, derandomize=True)
@h.given(
  x=hnp.arrays(np.float64, (6,), elements=st.floats(-3, 3).map(
    lambda v: round(v, 3) + 0.0005)),
  y=hnp.arrays(np.float64, (6,), elements=st.floats(-1.5, 1.5)),
  name=st.sampled_from(list(KERNELS)),
)  # fmt: skip
def test_fenchel_young(x, y, name):
  """K(x) + K*(y) >= <x, y>, equal for y = grad K(x), for distinct |x|."""
  h.assume(np.unique(np.abs(x)).size == 6)
  with jax.enable_x64(True):
    value = _call(name, 'value', x)
    g = _call(name, 'gradient', x)
    tight = value + _call(name, 'conjugate', g.ravel())
    z, dims = _shaped(name, x)
    inner = (z * g).sum(dims, keepdims=True)
    np.testing.assert_allclose(tight, inner, rtol=1e-9, atol=1e-9)
    w, _ = _shaped(name, y)
    other = value + _call(name, 'conjugate', y)
    assert (other >= (z * w).sum(dims, keepdims=True) - 1e-5).all()


@each
def test_gradient_is_that_of_the_value(name):
  with jax.enable_x64(True):
    x, dims = _shaped(name, np.array(X))
    e = E.get(name, 0.31)
    value = lambda x: KERNELS[name].value(x, e, dims).sum()
    got = KERNELS[name].gradient(jnp.asarray(x), e, dims)
    np.testing.assert_allclose(got, jax.grad(value)(jnp.asarray(x)), atol=1e-9)


def test_l1_is_the_lion_of_optax_and_scanned_layers_are_separate():
  x, grads = np.ones((3, 4)), problem.normal((3, 4))
  ours = lion_k(0.01, kernel='l1')
  theirs = optax.lion(0.01, weight_decay=1.0)
  np.testing.assert_allclose(
    problem.run(ours, x, grads), problem.run(theirs, x, grads), atol=1e-15
  )
  stack = np.stack([grads[0], 100 * grads[1]])
  for name in KERNELS:
    tx = lion_k(0.01, kernel=name)
    both = problem.run(tx, np.zeros((2, 3, 4)), [stack])[0]
    for i in (0, 1):
      one = problem.run(tx, np.zeros((3, 4)), [stack[i]])[0]
      np.testing.assert_allclose(both[i], one, atol=1e-12)


def test_groups_are_the_inputs_of_a_neuron():
  x, g = np.zeros((3, 4)), problem.normal((3, 4), 1)
  moved = problem.run(lion_k(1.0, kernel='group'), x, g)[0]
  np.testing.assert_allclose(np.linalg.norm(moved, axis=0), 1)
  axes = roles.Axes(('', ''), 'matrix', (1,), (0,))
  moved = problem.run(lion_k(1.0, axes, kernel='group'), x, g)[0]
  np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1)


A = np.diag(np.arange(1, 7) / 3)
STAR = np.array([2, -1.5, 0.4, 0.1, -0.7, 0.3])


def _lyapunov(name, lr, num_steps, b1=0.9, b2=0.99):
  """Returns H_t of the discrete Lyapunov function, decay 1, from x = 0.

  H = f(x) + K*(x) + c (K*(x) + K(mu) + <mu, x>),
  c = lr b1 / ((1 - b2) + lr (1 - b1)), both x and mu before step t.
  """
  k = KERNELS[name]
  dims = (1,) if name == 'group' else (0,)
  shape = (3, 2) if name == 'group' else (6,)
  e = E.get(name, 0.3)
  axes = (
    roles.Axes(('',) * len(shape), 'matrix', dims) if dims == (1,) else None
  )
  tx = lion_k(lr, axes, kernel=name, epsilon=e, relative=False, b1=b1, b2=b2)
  f = lambda x: (x.ravel() - STAR) @ A @ (x.ravel() - STAR) / 2
  c = lr * b1 / ((1 - b2) + lr * (1 - b1))

  def body(carry, _):
    x, state = carry
    conjugate = k.conjugate(x, e, dims).sum()
    bracket = (
      conjugate + k.value(state.mu, e, dims).sum() + (state.mu * x).sum()
    )
    h = f(x) + conjugate + c * bracket
    updates, state = tx.update(jax.grad(f)(x), state, x)
    return (x + updates, state), h

  with jax.enable_x64(True):
    x = jnp.zeros(shape)
    run = lambda x: jax.lax.scan(body, (x, tx.init(x)), length=num_steps)[1]
    return np.asarray(jax.jit(run)(x))


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
    assert all(rise <= 3 * lr**2 for lr, rise in rises.items()), rises


def test_it_rises_if_the_momentum_is_shorter_than_the_interpolation():
  assert np.diff(_lyapunov('l1', 1e-2, 2000, b1=0.99, b2=0.9)).max() > 1e-3


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
