"""MARS with two gradients: variance, identities, and what the step provides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from lm import loop, loss, model, spec, state, step
from lm.errors import UserError
from optimizers.adamw import adamw
from optimizers.mars import mars
from optimizers.marsm import marsm
from optimizers.muon import muon
from optimizers.parts import mars as part
from tests import helpers
from tests import optimizer_problem as problem

SIGMA, BETA, RATE, GAMMAS = 0.5, 0.95, 0.02, (0.0, 0.025, 0.5, 1.0)
CURVATURE = np.array([1.0, 0.5])


def _errors_of_momentum(form):
  """E|m - grad f|^2 on a quadratic in 2-D with additive noise, float64.

  For each of GAMMAS, on the same noise.
  """

  def chain(gamma, key):
    average = optax.chain(optax.ema(BETA, debias=False), optax.scale(-RATE))
    correct = None, gamma, BETA, False
    if form == 'exact':
      tx = part.exact(average, *correct)
    else:
      tx = optax.chain(part.correct_gradient(*correct), average)

    def body(carry, noise):
      x, s = carry
      extra = {}
      if form == 'exact':
        extra = {'previous_grads': CURVATURE * s.iterate + noise}
      u, s = tx.update(CURVATURE * x + noise, s, x, **extra)
      return (x + u, s), jnp.sum((-u / RATE - CURVATURE * x) ** 2)

    noise = SIGMA * jax.random.normal(key, (700, 2))
    x = jnp.zeros(2)
    return jax.lax.scan(body, (x, tx.init(x)), noise)[1][400:].mean()

  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), 800)
    mean = lambda gamma: jax.vmap(lambda key: chain(gamma, key))(keys).mean()
    return np.asarray(jax.jit(jax.vmap(mean))(jnp.array(GAMMAS)))


def _stationary_error(form, gamma):
  """The same by linear algebra: a covariance S = M S M' + noise, per axis."""
  total, b, k = 0.0, BETA, gamma * BETA / (1 - BETA)
  for a in CURVATURE:  # of m, x, and the x or the gradient of before
    old = a if form == 'exact' else 1.0
    n = 1 - b if form == 'exact' else (1 - b) * (1 + k)  # m gets n times noise
    m = np.array([b, (1 - b) * (1 + k) * a, -(1 - b) * k * old])
    last = [0, 1, 0] if form == 'exact' else [0, a, 0]
    step = np.array([m, [0, 1, 0] - RATE * m, last])
    push = np.array([n, -RATE * n, form != 'exact'])
    s = scipy.linalg.solve_discrete_lyapunov(step, np.outer(push, push))
    error = m - [0, a, 0]
    total += SIGMA**2 * (error @ s @ error + n**2)
  return total


def test_variance_falls_if_exact_and_rises_if_approximate():
  """g - g' has no noise if exact, so m is a mean of noise; with gamma = 1 the
  approximate m is the gradient itself. The published shape to 7 %: those
  figures are of one chain, and so are exact[3] and approximate[3] (0.0128 and
  0.5 in any quadratic)."""
  exact, approximate = _errors_of_momentum('exact'), _errors_of_momentum('')
  for form, got, one_chain in (
    ('exact', exact, [0.01704, 0.01693, 0.01512, 0.01366]),
    ('', approximate, [0.01704, 0.01782, 0.143, 0.504]),
  ):
    want = [_stationary_error(form, g) for g in GAMMAS]
    np.testing.assert_allclose(got, want, rtol=0.02)
    np.testing.assert_allclose(want, one_chain, rtol=0.07)
  assert (np.diff(exact) < 0).all() and (np.diff(approximate) > 0).all()
  noise = 2 * SIGMA**2
  np.testing.assert_allclose(
    exact[-1], noise * (1 - BETA) / (1 + BETA), rtol=0.02
  )
  np.testing.assert_allclose(approximate[-1], noise, rtol=0.01)
  np.testing.assert_allclose(exact[0], approximate[0], rtol=1e-9)


@pytest.mark.parametrize('make', [mars, marsm])
@pytest.mark.parametrize('clip', [True, False])
def test_the_exact_correction_is_clipped_as_the_other(make, clip):
  """c has norm 1 at most, so gradients a thousand times larger do the same."""
  with jax.enable_x64(True):
    x = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))}
    moves = []
    for scale in (1.0, 1000.0):
      tx = make(0.1, form='exact', clip=clip, decay='none')
      held, params = tx.init(x), x
      for g in (x['w'], x['w'] ** 2):
        now, old = {'w': scale * g}, {'w': scale * jnp.cos(g)}
        u, held = tx.update(now, held, params, previous_grads=old)
        params = optax.apply_updates(params, u)
      field = 'momentum' if make is marsm else 'mu'
      found = optax.tree_utils.tree_get_all_with_path(held.inner, field)
      moves.append(jax.tree.leaves([x for _, x in found])[0])
  ratio = np.linalg.norm(moves[1]) / np.linalg.norm(moves[0])
  assert ratio == pytest.approx(1 if clip else 1000, rel=0.2)


def _momenta(gamma, clip, grads):
  """c and m of the approximate form, float64."""
  with jax.enable_x64(True):
    correct = part.correct_gradient(None, gamma, BETA, clip)
    ema = optax.ema(BETA, debias=False)
    x = jnp.zeros(np.shape(grads)[1:])
    state, mean, rows = correct.init(x), ema.init(x), []
    for g in grads:
      c, state = correct.update(jnp.asarray(g), state)
      m, mean = ema.update(c, mean)
      rows.append((c, m))
    return np.array(rows).swapaxes(0, 1)


def test_golden_corrected_gradients():
  """The first is 1 + 0.025 0.95 / 0.05 = 1.475 times the gradient."""
  c, m = _momenta(0.025, False, [[1.0], [0.5], [-0.25]])
  np.testing.assert_allclose(c[:, 0], [1.475, 0.2625, -0.60625], atol=1e-15)
  np.testing.assert_allclose(m[:, 0], [0.07375, 0.0831875, 0.048715625],
                             atol=1e-15)  # fmt: skip
  c, m = _momenta(0.025, True, [[1.0], [0.5], [-0.25]])
  np.testing.assert_allclose(c[:, 0], [1, 0.2625, -0.60625], atol=1e-15)
  np.testing.assert_allclose(m[:, 0], [0.05, 0.060625, 0.02728125], atol=1e-15)


@pytest.mark.parametrize('gamma', [0.0, 0.025, 0.3])
def test_the_momentum_is_a_recursion_in_two_gradients(gamma):
  """m <- b m + (1 - b + gamma b) g - gamma b g'; gamma = 0 is a plain mean."""
  grads = problem.normal((3, 5))
  _, got = _momenta(gamma, False, grads)
  m, old = np.zeros((3, 5)), np.zeros((3, 5))
  for g, one in zip(grads, got, strict=True):
    m = BETA * m + (1 - BETA + gamma * BETA) * g - gamma * BETA * old
    old = g
    np.testing.assert_allclose(one, m, atol=1e-14)


def test_gamma_one_minus_b1_is_nesterov():
  """The momentum of MARS-AdamW, and one buffer of MARS-M at every gamma."""
  grads, b = problem.normal((3, 5)), 0.95
  tx = optax.chain(
    part.correct_gradient(None, 1 - b, b, False), optax.ema(b, debias=False)
  )
  got = problem.run(optax.chain(tx, optax.scale(-1.0)), np.zeros((3, 5)), grads)
  mean, want = 0, []
  for g in grads:
    mean = b * mean + (1 - b) * g
    want.append((1 - b) * g + b * mean)
  np.testing.assert_allclose(got, -np.cumsum(want, 0), atol=1e-12)
  x = np.ones((3, 5))
  run = lambda form, gamma: problem.run(
    marsm(0.02, form=form, gamma=gamma, clip=False), x, grads
  )
  for gamma in (0.025, 0.3):
    one, two = run('one_buffer', gamma), run('approximate', gamma)
    np.testing.assert_allclose(one, two, atol=1e-9)
  nesterov = problem.run(muon(0.02, scale='moonlight'), x, grads)
  np.testing.assert_allclose(run('one_buffer', 1 - b), nesterov, atol=1e-9)
  state = marsm(0.02, form='one_buffer', clip=False).init(jnp.ones((3, 5)))
  assert [x.size for x in jax.tree.leaves(state)] == [1, 15, 1]


def _loop_by_hand(config, net, tokens):
  """x_t and x_{t-1}: two gradients of the batch, clipped, c into AdamW."""
  c = config.optimizer
  grad = jax.jit(jax.grad(lambda p, t: loss.next_token(net, p, t).loss))
  clip = optax.clip_by_global_norm(config.clip_norm)
  clipped = lambda p, t: clip.update(grad(p, t), clip.init(p))[0]
  tx = adamw(config.learning_rate, net.axes, b1=c.b1, b2=c.b2)
  x = net.init(jax.random.key(config.seed))
  before, adam = x, tx.init(x)

  def corrected(g, old):
    c_ = g + c.gamma * c.b1 / (1 - c.b1) * (g - old)
    return c_ / jnp.maximum(1, jnp.linalg.norm(c_.ravel()))

  for t in tokens:
    g, old = clipped(x, t), clipped(before, t)
    u, adam = tx.update(jax.tree.map(corrected, g, old), adam, x)
    before, x = x, optax.apply_updates(x, u)
  return x


def test_the_step_gives_the_gradient_at_the_parameters_of_before():
  config = helpers.config('optimizer=mars,schedule=constant', clip_norm=0.5)
  config.optimizer.form = 'exact'
  config.optimizer.gamma = 0.3
  net = model.build(config.model)
  tokens = jax.random.randint(jax.random.key(1), (4, 8, 33), 0, 256)
  train_step = jax.jit(step.build_train(config, net))
  s = state.init(config, net, jax.random.key(config.seed))
  for t in tokens:
    s, _ = train_step(s, t, step.floats(config))
  want = helpers.flat(_loop_by_hand(config, net, tokens))
  start = helpers.flat(net.init(jax.random.key(config.seed)))
  for key, x in helpers.flat(s.params).items():
    np.testing.assert_allclose(x, want[key], atol=3e-5, err_msg=key)
    assert np.abs(x - start[key]).max() > 1e-3
  # The state is as large as the approximate form's.
  sizes = lambda tx: sorted(x.size for x in jax.tree.leaves(tx.init(s.params)))
  assert sizes(mars(0.1, form='exact')) == sizes(mars(0.1))


def test_exact_marsm_corrects_matrices_only():
  params, axes = problem.params(), problem.axes()
  tx = marsm(0.1, axes, form='exact', decay='none')
  grads = jax.tree.map(jnp.cos, params)
  run = jax.jit(
    lambda previous: tx.update(
      grads, tx.init(params), params, previous_grads=previous
    )[0]
  )
  same, other = run(grads), run(jax.tree.map(jnp.sin, params))
  for path, role in (('table', 'embedding'), ('head', 'head')):
    assert axes[path].role == role
    np.testing.assert_array_equal(same[path], other[path])
  assert (same['blocks']['query'] != other['blocks']['query']).any()


def test_mistakes_are_one_sentence():
  x = jnp.ones(3)
  tx = mars(0.1, form='exact')
  with pytest.raises(ValueError, match=r'needs update\(..., previous_grads=\)'):
    tx.update(x, tx.init(x), x)
  config = spec.spec('optimizers', 'marsm', form='one_buffer')
  with pytest.raises(UserError, match='cannot clip.* set clip=False'):
    spec.build('optimizers', config, 0.1)
  with pytest.raises(UserError, match="form='two' does not exist; legal: 'app"):
    spec.build('optimizers', spec.spec('optimizers', 'mars', form='two'), 0.1)


def test_a_second_gradient_that_is_not_finite_is_a_bad_step():
  c = helpers.config('optimizer=mars')
  c.optimizer.form = 'exact'
  built = loop.build(c)
  start = built.init()
  nan = jax.tree.map(
    lambda x: jnp.full_like(x, jnp.nan), start.opt_state.iterate
  )
  start = start.replace(opt_state=start.opt_state._replace(iterate=nan))
  before = jax.device_get(start.params)
  after, _ = built.train_step(start, built.data.train.batch(0), step.floats(c))
  assert int(after.bad_steps) == 1
  jax.tree.map(np.testing.assert_array_equal, after.params, before)
