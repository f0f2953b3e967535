"""SOAP: a NumPy reference, Adam as a special case, rotations, layers."""

import numpy as np
import pytest

from optimizers.adamw import adamw
from optimizers.soap import soap
from tests import helpers
from tests import optimizer_problem as problem

SHAPE = (4, 3)


def _numpy_soap(x, grads, lr, every, b=0.95, nu_b=0.95, gram_b=0.95, eps=1e-8):
  m, v, L, R = 0, 0, 0, 0
  for t, g in enumerate(grads):
    if t == 0:
      p, q = (np.linalg.eigh(a)[1][:, ::-1] for a in (g @ g.T, g.T @ g))
    else:
      m = b * m + (1 - b) * g
      v = nu_b * v + (1 - nu_b) * (p.T @ g @ q) ** 2
      n = p.T @ m @ q / (1 - b**t) / (np.sqrt(v / (1 - nu_b**t)) + eps)
      x = x - lr * p @ n @ q.T
    L = gram_b * L + (1 - gram_b) * g @ g.T
    R = gram_b * R + (1 - gram_b) * g.T @ g
    if t and t % every == 0:
      i, j = (np.argsort(-np.diag(a)) for a in (p.T @ L @ p, q.T @ R @ q))
      v, p, q = v[i][:, j], p[:, i], q[:, j]
      p, q = np.linalg.qr(L @ p)[0], np.linalg.qr(R @ q)[0]
  return x


@pytest.mark.parametrize('every', [1, 2, 10])
def test_numpy_reference(every):
  x, grads = np.ones(SHAPE), problem.normal(SHAPE, 7)
  tx = soap(0.1, refresh_every=every, decay='none')
  got = problem.run(tx, x, grads)[-1]
  np.testing.assert_allclose(got, _numpy_soap(x, grads, 0.1, every), atol=1e-9)
  other = _numpy_soap(x, grads, 0.1, 3)
  assert np.abs(got - other).max() > 1e-4, 'the refresh does nothing'


def test_without_rotation_it_is_adam():
  x, grads = np.ones(SHAPE), problem.normal(SHAPE)
  a = problem.run(soap(0.1, max_dim=2, weight_decay=0.1), x, grads)
  np.testing.assert_allclose(a[0], 0.99 * x, err_msg='the first only decays')
  b = adamw(0.1, b1=0.95, b2=0.95)
  np.testing.assert_allclose(
    a[1:], problem.run(b, 0.99 * x, grads[1:]), atol=1e-12
  )


def test_rotated_gradients_give_rotated_updates():
  """Unlike Adam's: what the eigenbasis is for."""
  p = np.linalg.qr(problem.normal((3, 3), 1, seed=5)[0])[0]
  q = np.linalg.qr(problem.normal((3, 3), 1, seed=6)[0])[0]
  grads, x = problem.normal((3, 3), 6), np.zeros((3, 3))
  tx = soap(0.1, refresh_every=2, decay='none')
  got = problem.run(tx, x, [p @ g @ q for g in grads])
  want = np.stack([p @ y @ q for y in problem.run(tx, x, grads)])
  np.testing.assert_allclose(got, want, atol=1e-7)


def test_a_side_above_max_dim_is_not_rotated():
  p = np.linalg.qr(problem.normal((3, 3), 1, seed=5)[0])[0]
  q = np.linalg.qr(problem.normal((5, 5), 1, seed=6)[0])[0]
  grads, x = problem.normal((3, 5), 6), np.zeros((3, 5))
  tx = soap(0.1, refresh_every=2, max_dim=3, decay='none')
  want = problem.run(tx, x, grads)
  left = problem.run(tx, x, [p @ g for g in grads])
  np.testing.assert_allclose(left, np.stack([p @ y for y in want]), atol=1e-7)
  right = problem.run(tx, x, [g @ q for g in grads])
  assert np.abs(right - np.stack([y @ q for y in want])).max() > 1e-2


def test_each_layer_of_a_stack_is_on_its_own():
  grads = problem.normal((2, *SHAPE), 4) * np.array([1, 50])[:, None, None]
  tx = soap(0.02, refresh_every=2)
  both = problem.run(tx, np.ones((2, *SHAPE)), grads)
  for i in (0, 1):
    one = problem.run(tx, np.ones(SHAPE), grads[:, i])
    np.testing.assert_allclose(both[:, i], one, atol=1e-9)


def test_each_mean_has_its_own_rate():
  x, grads = np.ones(SHAPE), problem.normal(SHAPE, 7)
  tx = soap(
    0.1, refresh_every=2, decay='none', momentum=0.8, nu_b2=0.9, shampoo_b2=0.7
  )
  want = _numpy_soap(x, grads, 0.1, 2, 0.8, 0.9, 0.7)
  np.testing.assert_allclose(problem.run(tx, x, grads)[-1], want, atol=1e-9)


def test_stacks_of_layers_do_not_wait_for_each_other_for_ever(tmp_path):
  last = []
  for devices in (1, 8):
    helpers.command(
      'launch.train',
      f'--config={helpers.ROOT}/configs/debug.py:optimizer=soap',
      f'--workdir={tmp_path}/{devices}',
      '--config.model.scan_layers',
      '--config.num_steps=12',
      devices=devices,
    )
    last.append(helpers.lines(tmp_path / str(devices))[-1]['eval/loss'])
  np.testing.assert_allclose(last[1], last[0], rtol=5e-3)
