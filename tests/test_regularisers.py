"""NaP, the spectral penalty, initialisations and the linearity regulariser."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from lm import initializers, loss, model, state, step
from lm.errors import UserError
from optimizers.adamw import adamw
from optimizers.parts import roles
from optimizers.parts.nap import nap
from optimizers.parts.spectral_penalty import spectral_penalty
from optimizers.sgdw import sgdw
from optimizers.signum import signum
from tests import helpers
from tests import optimizer_problem as problem

TOKENS = jax.random.randint(jax.random.key(1), (8, 33), 0, 256)


def test_golden_nap():
  """diag(3, 4) moves to W and is projected to norm 5 (2407.01800)."""
  x = np.diag([3.0, 4.0])
  moved = np.array([[2.9, -0.2], [0.1, 3.95]])
  got = problem.run(nap(optax.identity(), None), x, [moved - x])[0]
  want = [[2.95595371, -0.20385888], [0.10192944, 4.02621281]]
  np.testing.assert_allclose(got, want, atol=1e-8)


def _invariant(w):
  """Of the direction of w only (1706.05350)."""
  return jnp.sum((w / jnp.linalg.norm(w) - jnp.array([0.6, 0.8, 0])) ** 2)


def test_rates_of_what_does_not_depend_on_a_norm():
  """The rate that counts is lr / |w|^2 of SGD, lr / |w| of signs; NaP fixes it.

  Gradients are orthogonal to w, so a step of SGD enlarges it.
  """
  with jax.enable_x64(True):
    w = jnp.array([1.0, -2.0, 2.0])
    f, g = jax.value_and_grad(_invariant)(w)
    assert f == pytest.approx(2.6666667, abs=1e-7)
    np.testing.assert_allclose(g, [-0.474074, -0.385185, -0.148148], atol=1e-6)
    assert abs(w @ g) < 1e-15
    np.testing.assert_allclose(jax.grad(_invariant)(3 * w), g / 3, rtol=1e-12)

    def after(make, rate, x):
      tx = make(rate, weight_decay=0.0)
      return x + tx.update(jax.grad(_invariant)(x), tx.init(x), x)[0]

    step = after(sgdw, 0.1, w)
    assert step @ step == pytest.approx(9.0039506, abs=1e-7)
    for make, power in ((sgdw, 2), (signum, 1)):
      large = after(make, 0.1 * 3**power, 3 * w)
      np.testing.assert_allclose(large, 3 * after(make, 0.1, w), rtol=1e-12)
    projected = lambda rate, **knobs: nap(sgdw(rate, **knobs), None)
    matrix = lambda rate, x: after(projected, rate, x[None])[0]
    assert jnp.linalg.norm(matrix(0.1, w)) == pytest.approx(3, abs=1e-7)


@pytest.mark.parametrize(
  ('make', 'size', 'wd', 'want'),
  [
    (lambda **k: sgdw(momentum=0.0, **k), lambda n: n**4, 1.0, 0.9950),
    (lambda **k: signum(b1=0.0, **k), lambda n: n, 0.4, 1.581),
  ],
)
def test_where_decay_holds_a_norm_that_does_not_matter(make, size, wd, want):
  """|w|^4 = lr |g|^2 / 2 wd of SGD, |w|^2 = lr d / 2 wd of signs."""
  lr, d = 0.01, 200
  tx = make(learning_rate=lr, weight_decay=wd)

  def body(carry, key):
    w, state = carry
    z = jax.random.normal(key, w.shape)
    g = (z - w * (w @ z) / (w @ w)) / jnp.linalg.norm(w)
    u, state = tx.update(g, state, w)
    return (w + u, state), jnp.linalg.norm(w)

  w = jnp.full(d, 2 / d**0.5)
  keys = jax.random.split(jax.random.key(0), 4000)
  run = jax.jit(lambda w: jax.lax.scan(body, (w, tx.init(w)), keys)[1])
  assert size(run(w)[2000:]).mean() == pytest.approx(want, rel=0.01)


def test_projection_changes_no_function_where_a_normalisation_follows():
  """Queries and keys with qk_norm, from twice and half their norms; not v."""
  knobs = {'num_layers': 1, 'init_std': 0.2, 'qk_norm': True}
  c = helpers.config(**{f'model__{k}': v for k, v in knobs.items()}).model
  net = model.build(c)
  params = net.init(jax.random.key(0))
  tx = nap(optax.identity(), net.axes)
  state_, logits = tx.init(params), jax.jit(lambda p: net.apply(p, TOKENS))
  grown = lambda **factors: jax.tree_util.tree_map_with_path(
    lambda path, x: factors.get(path[-1].key, 1.0) * x, params
  )

  def change(moved):
    zeros = jax.tree.map(jnp.zeros_like, moved)
    back = optax.apply_updates(moved, tx.update(zeros, state_, moved)[0])
    for a, b in zip(
      jax.tree.leaves(back), jax.tree.leaves(params), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-5)
    return jnp.abs(logits(moved) - logits(back)).max()

  assert change(grown(q=2.0, k=0.5)) < 1e-3
  assert change(grown(v=2.0)) > 0.1


def test_nap_keeps_the_norm_of_each_layer_and_leaves_the_rest():
  axes, params = problem.axes(), problem.params()
  params['blocks']['out'] = params['blocks']['out'].at[1].set(0)
  grads = [jax.tree.map(lambda x, i=i: jnp.cos(9 * x + i), params)
           for i in range(100)]  # fmt: skip
  plain = problem.run(adamw(0.05, axes), params, grads)
  kept = problem.run(nap(adamw(0.05, axes), axes), params, grads)
  norm = lambda x: np.sqrt((np.asarray(x, np.float64) ** 2).sum((-3, -2, -1)))
  for name in ('query', 'out'):
    old, new = params['blocks'][name], kept['blocks'][name]
    want = np.broadcast_to(norm(old), (100, 2))
    moves = want > 0  # a matrix that begins with 0 is free
    np.testing.assert_allclose(norm(new)[moves], want[moves], rtol=1e-6)
    assert (norm(new)[-1] > 0.01).all()
    assert (
      np.abs(norm(plain['blocks'][name])[moves] / want[moves] - 1).max() > 0.05
    )
  for path in ('table', 'head'):
    np.testing.assert_array_equal(kept[path], plain[path])


@pytest.mark.parametrize('power, slope', [(1, 2.0), (2, 24.0)])
def test_golden_spectral_penalty(power, slope):
  """W = diag(2, 0.5): the gradient is that at the largest value alone."""
  tx = spectral_penalty(optax.identity(), None, 1.0, power)
  with jax.enable_x64(True):
    w = jnp.diag(jnp.array([2.0, 0.5]))
    state_ = tx.init(w)
    for _ in range(30):
      g, state_ = tx.update(jnp.zeros((2, 2)), state_, w)
  np.testing.assert_allclose(g, [[slope, 0], [0, 0]], atol=1e-6)


def test_power_iterations_that_persist_are_exact_after_a_hundred():
  """Of a 64 x 32 Gaussian matrix; one alone is 20 to 30 % too small."""
  w = jnp.asarray(np.random.default_rng(1).standard_normal((64, 32)), 'float32')
  tx = spectral_penalty(optax.identity(), None, 1.0, 1)
  state_, found = tx.init(w), []
  update = jax.jit(tx.update)
  for _ in range(100):
    g, state_ = update(jnp.zeros_like(w), state_, w)
    found.append(1 + np.linalg.norm(g) / 2)  # the gradient is 2 (s - 1) u v^T
  part = np.array(found) / np.linalg.norm(w, 2)
  assert (np.diff(part) > -1e-6).all() and part[0] < 0.8 < part[4] < part[19]
  assert part[99] == pytest.approx(1, abs=2e-6)


def test_a_matrix_that_began_at_zero_is_found_later():
  tx = spectral_penalty(optax.identity(), None, 1.0, 1)
  x = jnp.zeros((3, 2))
  state_ = tx.init(x)
  g, state_ = tx.update(x, state_, x)
  assert not g.any()
  for _ in range(30):
    g, state_ = tx.update(0 * x, state_, jnp.diag(jnp.ones(3))[:, :2] * 3)
  assert np.linalg.norm(g) == pytest.approx(4, rel=1e-3)


def test_power_iterations_go_on_and_bring_the_largest_value_to_one():
  """A stack of two, one far above 1 and one below, by plain descent."""
  x = np.random.default_rng(0).normal(size=(2, 12, 8)) * [[[0.5]], [[0.02]]]
  tx = optax.chain(spectral_penalty(optax.identity(), None, 1.0),
                   optax.scale(-0.02))  # fmt: skip
  got = problem.run(tx, x, np.zeros((400, 2, 12, 8)))
  top = np.linalg.svd(got, compute_uv=False)[..., 0]
  assert top[0, 0] > 1.5 and top[0, 1] < 0.2
  np.testing.assert_allclose(top[-1], 1, atol=0.02)


def test_a_run_with_both_and_the_step_of_mars_with_two_gradients():
  """The hooks find the optimizer's state inside of the wrappers."""
  config = helpers.config(
    'optimizer=mars', project='nap', spectral_penalty=0.1, learning_rate=0.01
  )
  config.optimizer.form = 'exact'
  net = model.build(config.model)
  s = old = state.init(config, net, jax.random.key(0))
  train_step = jax.jit(step.build_train(config, net))
  for _ in range(3):
    s, _ = train_step(s, TOKENS, step.floats(config))
  before, after = helpers.flat(old.params), helpers.flat(s.params)
  axes = dict(zip(before, jax.tree.leaves(net.axes), strict=True))
  for key, x in after.items():
    ratio = np.linalg.norm(x) / np.linalg.norm(before[key])
    assert (abs(ratio - 1) < 1e-5) == (axes[key].role == 'matrix'), key
    assert (x != before[key]).any()
  for bad, sentence in (
    ({'project': 'napp'}, "project='napp' does not exist. Did you mean 'nap'"),
    (
      {'project': 'nap', 'qk_clip': 2.0},
      'qk_clip=2.0 would not hold: project=',
    ),
    ({'model__init': 'zerO'}, r"model.init='zerO' does not exist. Did you mea"),
  ):
    c = helpers.config(**bad)
    with pytest.raises(UserError, match=sentence):
      state.check(c)
      model.build(c.model)


def test_the_penalty_beside_gradients_at_two_places():
  """MARS's exact form, 2 g - g': the same penalty is in both, so once in it."""
  x = {'w': np.diag([3.0, 0.5, 0.2])}
  g, before = ({'w': np.full((3, 3), a)} for a in (0.2, 0.3))
  both = optax.GradientTransformationExtraArgs(
    lambda _: (),
    lambda u, s, p, previous_grads: (
      jax.tree.map(lambda a, b: 2 * a - b, u, previous_grads),
      s,
    ),
  )
  after = lambda method, **more: (
    lambda tx: tx.update(g, tx.init(x), x, **more)[0]['w']
  )(spectral_penalty(method, None, 0.1))
  penalty = after(optax.identity()) - g['w']
  assert np.abs(penalty).max() > 1
  want = 2 * g['w'] - before['w'] + penalty
  got = after(both, previous_grads=before)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_golden_zero():
  """4 x 2 and 3 x 2 in the paper's layout, (outputs, inputs)."""
  four = [[0.5, 0.5], [0.5, -0.5], [0.5, 0.5], [0.5, -0.5]]
  np.testing.assert_allclose(initializers.zero(2, 4).T, four)
  np.testing.assert_allclose(initializers.zero(2, 3).T, four[:3])
  np.testing.assert_array_equal(initializers.zero(4, 2).T, np.eye(2, 4))
  hadamard = scipy.linalg.hadamard(64) / 8
  np.testing.assert_allclose(initializers.zero(48, 64), hadamard[:48])


@pytest.mark.parametrize(
  ('out', 'inputs', 'least'),
  [(1024, 256, 1.0), (768, 256, 0.8660254), (3072, 768, 0.8660254),
   (192, 64, 0.8660254)],
)  # fmt: skip
def test_singular_values_of_zero(out, inputs, least):
  def values(**knobs):  # by the Gram matrix: faster than the SVD
    w = np.asarray(initializers.zero(inputs, out, **knobs))
    return np.linalg.eigvalsh(w @ w.T) ** 0.5

  np.testing.assert_allclose(values(), least, rtol=1e-5)
  np.testing.assert_allclose(values(isometric=True), 1, rtol=1e-5)


@pytest.mark.parametrize('kind', ['orthogonal', 'zero', 'isometric'])
def test_initial_models(kind):
  """Scanned and not; roles, residual outputs, and a finite gradient."""
  c = helpers.config(model__init=kind, model__num_layers=2).model
  for c.scan_layers in (True, False):
    net = model.build(c)
    params = net.init(jax.random.key(0))
    block = params['blocks'] if c.scan_layers else params['block_1']
    axes = net.axes['blocks'] if c.scan_layers else net.axes['block_1']
    for part, name in (('attn', 'q'), ('attn', 'o'), ('mlp', 'up'),
                       ('mlp', 'down')):  # fmt: skip
      w = roles.to_matrices(block[part][name], axes[part][name])
      top = np.linalg.svd(w, compute_uv=False)
      want = 1.0
      if name in ('o', 'down'):
        want = 0.5 if kind == 'orthogonal' else 0.0  # two layers
      np.testing.assert_allclose(top, want, atol=1e-5, err_msg=name)
    assert 0.01 < params['embedding'].std() < 0.03
    of = lambda p, net=net: loss.next_token(net, p, TOKENS).loss
    g = jax.jit(jax.grad(of))(params)
    assert np.isfinite(optax.tree.norm(g))
  other = helpers.flat(net.init(jax.random.key(1)))
  same = [(other[k] == v).all() for k, v in helpers.flat(params).items()
          if k.endswith("['q']")]  # fmt: skip
  assert all(same) == (kind != 'orthogonal')


def test_linearity_adds_one_minus_the_mean_cosine():
  """By the outputs of models of 0 to 2 layers, which are the prefixes."""
  c = helpers.config(model__init_std=0.3, model__num_layers=2).model
  net = model.build(c)
  params = net.init(jax.random.key(0))
  plain = loss.next_token(net, params, TOKENS)
  out = loss.next_token(net, params, TOKENS, linearity=0.25)
  c.scan_layers = True
  scanned = model.build(c)
  stack = jax.tree.map(lambda *x: jnp.stack(x),
                       params['block_0'], params['block_1'])  # fmt: skip
  rest = {k: v for k, v in params.items() if k[:5] != 'block'}
  again = loss.next_token(
    scanned, {**rest, 'blocks': stack}, TOKENS, linearity=0.25
  )
  cosines = _cosines(c, params, stack, rest)
  want = plain.loss + 0.25 * (1 - np.mean(cosines))
  assert 1 - np.mean(cosines) > 0.01
  for got in (out, again):
    np.testing.assert_allclose(got.loss, want, rtol=1e-5)
    np.testing.assert_allclose(got.cross_entropy, plain.cross_entropy)
  with_ = lambda w: jax.grad(
    lambda p: loss.next_token(net, p, TOKENS, linearity=w).loss
  )(params)
  gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), with_(0.0), with_(0.5))
  assert gap['block_1']['mlp']['down'] > 1e-4


def _cosines(c, params, stack, rest):
  """Before the last norm, which keeps the direction if its scale is 1."""
  vectors = [params['embedding'][TOKENS[:, :-1]]]
  for c.num_layers in (1, 2):
    first = jax.tree.map(lambda x: x[: c.num_layers], stack)
    prefix = model.build(c)
    vectors.append(prefix.hidden({**rest, 'blocks': first}, TOKENS[:, :-1]))
  unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in vectors]
  return [float((a * b).sum(-1).mean()) for a, b in itertools.pairwise(unit)]
