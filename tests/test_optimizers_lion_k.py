"""Lion-K: convex analysis of its kernels, and what an update is."""

import functools

import hypothesis as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optimizers.lion import lion
from optimizers.lion_k import lion_k
from optimizers.parts import kernels, roles
from tests import optimizer_problem as problem

KERNELS = kernels.KERNELS
X = [0.5, -0.2, 1.0, 0.1, -2.0, 0.3]
DIMS = {'group': (1,), 'nuclear': (0, 1)}
E = {'topk': 1 / 3, 'lp': 3.0}  # 2 of 6, p; e = 0.3 for all others
VALUES = {  # K(X), computed from the definitions in float64
  'l1': 4.1, 'l2': 2.321637353, 'lp': 2.092414051, 'linf': 2.0,
  'quadratic': 2.695, 'soft': 2.6, 'topk': 3.0, 'huber': 3.283333333,
  'relativistic': 4.750547644, 'logcosh': 3.09581102, 'group': 3.565878884,
  'nuclear': np.linalg.norm(np.reshape(X, (3, 2)), 'nuc'),
}  # fmt: skip
GRADIENTS = {
  'huber': [1, -2 / 3, 1, 1 / 3, -1, 1],
  'logcosh': [0.931110, -0.582783, 0.997457, 0.321513, -0.999997, 0.761594],
  'group': [0.928477, -0.371391, 0.995037, 0.099504, -0.988936, 0.148340],
}
each = pytest.mark.parametrize('name', KERNELS)


def _shaped(name, x):
  """Groups of two for 'group', a matrix for 'nuclear', else one vector."""
  if name in DIMS:
    return x.reshape(3, 2), DIMS[name]
  return x, (0,)


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


@each
def test_fenchel_young_is_an_equality_to_round_off(name):
  """K(x) + K*(grad K(x)) = <x, grad K(x)>, to 2e-15 in float64."""
  with jax.enable_x64(True):
    gradient = _call(name, 'gradient', X)
    tight = _call(name, 'value', X) + _call(name, 'conjugate', gradient)
    z, dims = _shaped(name, np.array(X))
    inner = (z * gradient).sum(dims, keepdims=True)
    np.testing.assert_allclose(tight, inner, rtol=0, atol=2e-15)


@each
@h.settings(max_examples=5, deadline=None, derandomize=True)
@h.given(
  x=hnp.arrays(np.float64, (6,), elements=st.floats(-3, 3).map(
    lambda v: round(v, 3) + 0.0005)),
  y=hnp.arrays(np.float64, (6,), elements=st.floats(-1.5, 1.5)),
)  # fmt: skip
def test_fenchel_young(name, x, y):
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


@pytest.mark.parametrize('name', ['linf', 'topk'])
def test_ties_share_what_one_would_have(name):
  x = np.array([2.0, -2.0, 2.0, 0.1, 1.0, 0.3])
  with jax.enable_x64(True):
    g = _call(name, 'gradient', x)
    assert _call(name, 'conjugate', g) == 0
    assert g @ x == pytest.approx(_call(name, 'value', x).item())


@pytest.mark.parametrize('p', [1.25, 2.0, 8.0])
def test_any_p_by_numpy(p):
  """K is the p-norm, its gradient has q-norm 1; also of tiny numbers."""
  lp, g = KERNELS['lp'], np.array(X)
  q = p / (p - 1)
  with jax.enable_x64(True):
    for x in (g, 1e-300 * g):
      got = np.asarray(lp.gradient(x, p, (0,)))
      np.testing.assert_allclose(np.linalg.norm(got, q), 1)
      np.testing.assert_allclose(lp.value(x, p, (0,)), got @ x, rtol=1e-12)
    np.testing.assert_allclose(
      lp.value(g, p, (0,)), np.linalg.norm(g, p), rtol=1e-12
    )
    assert lp.conjugate(got, p, (0,)) == 0
    assert lp.conjugate(1.01 * got, p, (0,)) == np.inf
    assert not lp.gradient(0 * g, p, (0,)).any()
  with pytest.raises(ValueError, match='epsilon=1.0 must exceed 1 for kernel='):
    lion_k(0.1, kernel='lp')


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
  np.testing.assert_array_equal(
    problem.run(ours, x, grads), problem.run(theirs, x, grads)
  )
  stack = np.stack([grads[0], 100 * grads[1]])
  for name in KERNELS:
    tx = lion_k(0.01, kernel=name, epsilon=3.0 if name == 'lp' else 1.0)
    both = problem.run(tx, np.zeros((2, 3, 4)), [stack])[0]
    for i in (0, 1):
      one = problem.run(tx, np.zeros((3, 4)), [stack[i]])[0]
      np.testing.assert_allclose(both[i], one, atol=1e-12)


@pytest.mark.parametrize(
  ('kernel', 'mode', 'e', 'knobs'),
  [
    ('huber', 'refined', 1.0, {}),
    ('logcosh', 'smooth', 0.2, {'smooth_beta': 5.0}),
  ],
)
def test_the_smooth_modes_of_optax(kernel, mode, e, knobs):
  x, grads = np.ones((3, 4)), problem.normal((3, 4))
  ours = lion_k(0.01, kernel=kernel, epsilon=e, relative=False)
  theirs = optax.chain(
    optax.scale_by_lion(mode=mode, **knobs),
    optax.add_decayed_weights(1.0),
    optax.scale_by_learning_rate(0.01),
  )
  np.testing.assert_allclose(
    problem.run(ours, x, grads), problem.run(theirs, x, grads), atol=1e-14
  )


def test_nuclear_is_the_exact_polar_factor_of_each_matrix():
  """Heads are outputs here; a vector is a matrix of one column."""
  shape = (2, 5, 3, 4)  # layers, embed, heads, head_dim
  axes = roles.Axes(('',) * 4, 'matrix', (1,), (2, 3), (0,))
  g = problem.normal(shape, 1)
  tx = lion_k(1.0, axes, kernel='nuclear')
  moved = -problem.run(tx, np.zeros(shape), g)[0].reshape(2, 5, 12)
  for got, matrix in zip(moved, g[0].reshape(2, 5, 12), strict=True):
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(got, u @ v, atol=1e-12)
  tx = lion_k(1.0, kernel='nuclear')
  moved = problem.run(tx, np.zeros(7), problem.normal((7,), 1))[0]
  np.testing.assert_allclose(np.linalg.norm(moved), 1)


def test_a_momentum_too_short_for_the_theory_is_refused():
  with pytest.raises(ValueError) as e:
    lion_k(0.1, b1=0.99, b2=0.9)
  assert str(e.value) == (
    'b1=0.99 must not exceed b2=0.9: otherwise it is unknown what Lion-K '
    "minimises; optimizer 'lion' takes any two."
  )
  with pytest.raises(ValueError, match=r'b2=0.0 must exceed 0'):
    lion_k(0.1, b1=0.0, b2=0.0)
  with pytest.raises(ValueError, match=r'b2=0.0 must exceed 0'):
    lion(0.1, b2=0.0)
  for b1, b2 in ((-0.5, 0.9), (0.5, 2.0), (-1, np.float32(0.9))):
    with pytest.raises(ValueError, match='must lie between 0 and 1'):
      lion_k(0.1, b1=b1, b2=b2)
  with pytest.raises(ValueError, match='b1=1 must not exceed b2=0.8'):
    lion_k(0.1, b1=1, b2=np.float32(0.9))


@pytest.mark.parametrize('kernel', ['huber', 'logcosh', 'relativistic'])
def test_an_epsilon_that_is_divided_by_is_not_zero(kernel):
  with pytest.raises(ValueError, match='epsilon=0.0 must exceed 0 for kernel='):
    lion_k(0.1, kernel=kernel, epsilon=0.0)
  lion_k(0.1, kernel='soft', epsilon=0.0)


def test_groups_are_the_inputs_of_a_neuron():
  x, g = np.zeros((3, 4)), problem.normal((3, 4), 1)
  moved = problem.run(lion_k(1.0, kernel='group'), x, g)[0]
  np.testing.assert_allclose(np.linalg.norm(moved, axis=0), 1)
  axes = roles.Axes(('', ''), 'matrix', (1,), (0,))
  moved = problem.run(lion_k(1.0, axes, kernel='group'), x, g)[0]
  np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1)


def test_a_relative_epsilon_is_in_units_of_what_is_rounded():
  """huber: u = c / max(|c|, e) with e of the RMS of c, here not of mu."""
  g = np.array([[3.0, -1, 0.5, 0.1]])
  tx = lion_k(1.0, kernel='huber', epsilon=0.7, b1=0.5, b2=0.9, decay='none')
  first, second = problem.run(tx, np.zeros((1, 4)), [g, -2 * g[:, ::-1]])
  c = 0.5 * 0.1 * g - 0.5 * 2 * g[:, ::-1]
  e = 0.7 * np.sqrt((c**2).mean())
  np.testing.assert_allclose(
    first - second, c / np.maximum(abs(c), e), rtol=1e-9
  )
