"""AdamW, Lion, Muon and Signum against figures, NumPy and Optax, in float64.

The figures were computed with the authors' published PyTorch code (cautious
decay: microsoft/dion; Muon: KellerJordan/Muon, with the 1e-8 of this project in
place of its 1e-7, which is 1e-8 in the result) or Optax, in float64. If one of
these tests fails after a change, the change altered the method: say so in the
CHANGELOG, or undo it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import spec
from optimizers.adamw import adamw
from optimizers.lion import lion
from optimizers.muon import muon
from optimizers.parts import decay_masks, newton_schulz
from optimizers.signum import signum
from tests import optimizer_problem as problem

X0 = [1.0, -2.0, 3.0, 0.0, -0.5]
G = [[0.5, 0.1, -0.2, 0.3, 0.0], [-1.0, -0.4, -0.1, 0.2, 0.7]]
W0 = [[1.0, -0.5, 0.0], [0.0, 2.0, -1.0]]
M = [[[3.0, 0, 1], [0, 2, -1]], [[-1.0, 2, 0], [0.5, 1, 1]]]
GOLDEN = {
  'adamw_cwd': [
    [0.850000002, -2.09999999, 3.099999995, -0.099999996667, -0.475],
    [
      0.886337396592,
      -1.939659814939,
      3.193929295842,
      -0.197507869584,
      -0.548495998764,
    ],
  ],
  'adamw_std': [
    [0.850000002, -1.99999999, 2.949999995, -0.099999996667, -0.475],
    [
      0.843837396492,
      -1.844659814939,
      2.896429296092,
      -0.192507869751,
      -0.524745998764,
    ],
  ],
  'adamw_none': [
    [0.900000002, -2.09999999, 3.099999995, -0.099999996667, -0.5],
    [
      0.936337396592,
      -2.044659814439,
      3.193929295842,
      -0.197507869584,
      -0.573495998764,
    ],
  ],
  'lion_cwd': [
    [0.85, -2.1, 3.1, -0.1, -0.475],
    [0.95, -1.895, 3.2, -0.2, -0.575],
  ],
  'lion_std': [
    [0.85, -2.0, 2.95, -0.1, -0.475],
    [0.9075, -1.8, 2.9025, -0.195, -0.55125],
  ],
  'muon_keller_flax': [
    [
      [0.972088376868, -0.49861050198, -0.008831956721],
      [0.00058424703, 1.980673074678, -0.990141788329],
    ],
    [
      [0.982033779868, -0.514946091158, -0.001736726603],
      [-0.016676277702, 1.971265658868, -1.001197490733],
    ],
  ],
  'muon_optax': [
    [
      [0.972088377345, -0.498610502048, -0.008831956528],
      [0.000584246927, 1.980673074655, -0.990141788352],
    ],
    [
      [0.977162018979, -0.512785607101, -0.005611048416],
      [-0.01078933593, 1.9687290734, -0.997931265843],
    ],
  ],
  'muon_moonlight': [
    [
      [0.990671086229, -0.498889833324, -0.002498054595],
      [0.000165250015, 1.991664890868, -0.995777362096],
    ],
    [
      [0.992052625044, -0.502794512704, -0.000491220463],
      [-0.004716763619, 1.986141179971, -0.997472941006],
    ],
  ],
}
RUNS = {
  'adamw_cwd': lambda: adamw(0.1, weight_decay=0.5, decay='cautious'),
  'adamw_std': lambda: adamw(0.1, weight_decay=0.5),
  'adamw_none': lambda: adamw(0.1, weight_decay=0.5, decay='none'),
  'lion_cwd': lambda: lion(0.1, weight_decay=0.5, decay='cautious'),
  'lion_std': lambda: lion(0.1, weight_decay=0.5),
  'muon_keller_flax': lambda: muon(0.02),
  'muon_optax': lambda: muon(0.02, bias_correction=True),
  'muon_moonlight': lambda: muon(0.02, scale='moonlight'),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_golden(name):
  x, grads = (W0, M) if 'muon' in name else (X0, G)
  got = problem.run(RUNS[name](), np.array(x), np.array(grads))
  np.testing.assert_allclose(got, GOLDEN[name], rtol=0, atol=1e-11)


def test_golden_decays_of_adamw_with_a_falling_learning_rate():
  """lr 0.1 then 0.05, wd 0.5: Optax's convention, the paper's, AdamC."""
  x, grads = np.array(X0[:3]), np.array([[0.5, 0.1, -0.2], [-1, -0.4, -0.1]])
  schedule = optax.piecewise_constant_schedule(0.1, {1: 0.5})
  plain = [0.8469186992, -1.9223299025, 2.9232146455]
  corrected = [0.8575436993, -1.9473299023, 2.9600895]
  coupled = [0.8885075442, -1.8506973858, 2.8499834383]
  for mode, wd, want in (
    ('decoupled', 0.5, plain),
    ('independent', 0.05, plain),
    ('corrected', 0.5, corrected),
    ('coupled', 0.5, coupled),
  ):
    tx = adamw(schedule, None, 0.1, weight_decay=wd, decay=mode)
    np.testing.assert_allclose(problem.run(tx, x, grads)[1], want, atol=2e-9)


def _numpy_adamw(x, grads, lr, b1, b2, eps, wd):
  m = v = np.zeros_like(x)
  for t, g in enumerate(grads, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    x = x - lr * (u + wd * x)
  return x


def _numpy_lion(x, grads, lr, b1, b2, wd):
  m = np.zeros_like(x)
  for g in grads:
    x = x - lr * (np.sign(b1 * m + (1 - b1) * g) + wd * x)
    m = b2 * m + (1 - b2) * g
  return x


def _numpy_signum(x, grads, lr, b1, wd):
  m = np.zeros_like(x)
  for g in grads:
    m = b1 * m + (1 - b1) * g
    x = x - lr * (np.sign(m) + wd * x)
  return x


def _numpy_muon(x, grads, lr, mu, wd):  # x (in, out)
  m, rows = np.zeros_like(x), newton_schulz.PRESETS['keller'].rows * 5
  for g in grads:
    m = mu * m + (1 - mu) * g
    u, s, v = np.linalg.svd((1 - mu) * g + mu * m, full_matrices=False)
    s = s / (np.linalg.norm(s) + 1e-8)
    for a, b, c in rows:
      s = a * s + b * s**3 + c * s**5
    x = x - lr * (max(1, x.shape[1] / x.shape[0]) ** 0.5 * (u * s) @ v + wd * x)
  return x


def test_numpy_references():
  x, grads = np.linspace(-1, 1, 15).reshape(3, 5), problem.normal((3, 5))
  for tx, want in (
    (adamw(0.1), _numpy_adamw(x, grads, 0.1, 0.9, 0.95, 1e-8, 0.1)),
    (lion(0.1), _numpy_lion(x, grads, 0.1, 0.9, 0.99, 1.0)),
    (signum(0.1), _numpy_signum(x, grads, 0.1, 0.9, 0.1)),
    (muon(0.1), _numpy_muon(x, grads, 0.1, 0.95, 0.1)),
    (muon(0.1, nesterov=False), None),
  ):
    got = problem.run(tx, x, grads)[-1]
    if want is None:  # the references see that Nesterov matters
      assert np.abs(got - _numpy_muon(x, grads, 0.1, 0.95, 0.1)).max() > 1e-3
    else:
      np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize(
  'ours, theirs',
  [
    (
      adamw(0.01, b1=0.8, b2=0.98, eps=1e-6),
      optax.adamw(0.01, 0.8, 0.98, 1e-6, weight_decay=0.1),
    ),
    (lion(0.01), optax.lion(0.01, weight_decay=1.0)),
  ],
)
def test_optax(ours, theirs):
  x = {'a': np.ones((3, 4)), 'b': np.ones(3)}
  grads = [
    {'a': a, 'b': b}
    for a, b in zip(problem.normal((3, 4)), problem.normal((3,)), strict=True)
  ]
  got, want = problem.run(ours, x, grads), problem.run(theirs, x, grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-15), got, want
  )


def test_golden_masks_of_cautious_decay():
  """k of two steps, before the learning rate; of -lr u it would be another.

  k is what 'cautious' and 'none' differ by. Where x = 0 it shows nothing.
  """
  run = lambda mode: problem.run(
    adamw(0.1, weight_decay=0.5, decay=mode), np.array(X0), np.array(G)
  )
  cautious, none = run('cautious'), run('none')
  first = (none[0] - cautious[0]) / (0.05 * np.array([1, -2, 3, 1, -0.5]))
  np.testing.assert_allclose(first, [1, 0, 0, 0, 1], atol=1e-12)
  for sign, want in ((1.0, [1, 0, 0, 1, 1]), (-0.1, [0, 1, 1, 1, 1])):
    x, u = jnp.array(X0).at[3].set(0.0), sign * jnp.array(G[0])
    k = decay_masks.masked('cautious', x, u, u, batch=(), key=None)[0]
    np.testing.assert_array_equal(k, jnp.array(want) * x)


def test_moments_of_bfloat16_parameters_do_not_freeze():
  """1000 steps of b2 = 0.999 from 1 with g^2 = 2: 1.632.

  bfloat16(0.999) is 1, so that a moment of bfloat16 would stay.
  """
  assert jnp.bfloat16(0.999) == 1
  x = jnp.ones((2, 2), jnp.bfloat16)
  tx = adamw(0.0, b2=0.999)
  state = tx.init(x)._replace(nu=jnp.ones((2, 2)))
  g = jnp.full((2, 2), 2**0.5)
  step = lambda state, _: (tx.update(g, state, x)[1], None)
  state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=1000))(state)
  assert tx.init(x).nu.dtype == state.nu.dtype == jnp.float32
  np.testing.assert_allclose(state.nu, 1.632, atol=5e-4)


def test_decay_below_what_bfloat16_resolves_acts_on_float32_parameters():
  """x (1 - lr wd) of 1 is 1 for 1.9e-3 and 0.99609 for 2e-3 in bfloat16.

  Updates are float32 for both, so that float32 parameters keep all of them.
  """
  for shrink, rounded in ((1.9e-3, 1.0), (2e-3, 0.99609375)):
    tx = adamw(shrink, weight_decay=1.0)
    for dtype, want in ((jnp.bfloat16, rounded), (jnp.float32, 1 - shrink)):
      x = jnp.ones((2, 2), dtype)
      updates, _ = tx.update(0 * x, tx.init(x), x)
      assert updates.dtype == jnp.float32
      np.testing.assert_allclose(
        optax.apply_updates(x, updates).astype(jnp.float32), want, rtol=1e-7
      )


# What the papers or their authors' programs say; other knobs are ours.
DEFAULTS = {
  'adafactor': {'decay_rate': 0.8, 'clipping_threshold': 1.0},  # 1804.04235
  'adamuon': {'momentum': 0.95, 'ns_steps': 5},  # 2507.11005
  'ademamix': {'b1': 0.9, 'b2': 0.999, 'b3': 0.9999, 'alpha': 8.0},
  'cautious_adamw': {'normalization': 'mean'},  # 2411.16085
  'cautious_lion': {'normalization': 'sum', 'b1': 0.9, 'b2': 0.99},
  'dion': {'momentum': 0.95, 'scale': 'spectral'},  # 2504.05295
  'lion': {'b1': 0.9, 'b2': 0.99},  # 2302.06675
  'lion_k': {'b1': 0.9, 'b2': 0.99},  # 2310.05898
  'mars': {'gamma': 0.025, 'b1': 0.95, 'b2': 0.99, 'clip': True,
           'weight_decay': 0.1},  # 2411.10438
  'marsm': {'gamma': 0.025, 'momentum': 0.95, 'b1': 0.9, 'b2': 0.95,
            'scale': 'moonlight'},  # 2510.21800
  'muon': {'momentum': 0.95, 'nesterov': True, 'ns_steps': 5,
           'coefficients': 'keller', 'scale': 'keller'},  # Keller Jordan, 2024
  'normuon': {'momentum': 0.95, 'neuron_b2': 0.95},  # 2510.05491
  'prodigy': {'b1': 0.9, 'b2': 0.999, 'd0': 1e-6, 'weight_decay': 0.0},
  'scion': {'momentum': 0.9, 'radius': 50.0, 'head_radius': 3000.0},
  'soap': {'b1': 0.95, 'b2': 0.95, 'nu_b2': 0.95, 'shampoo_b2': 0.95,
           'refresh_every': 10, 'max_dim': 10_000, 'weight_decay': 0.01},
}  # fmt: skip


@pytest.mark.parametrize('name', DEFAULTS)
def test_defaults_are_those_of_the_papers(name):
  assert spec.knobs('optimizers', name).items() >= DEFAULTS[name].items()
