"""The contract of every file in optimizers/; a new file is tested as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from lm import axes as lm_axes
from lm import spec
from lm.errors import UserError
from optimizers.parts import decay, roles
from tests import optimizer_problem as problem

NAMES = spec.names('optimizers')
LR = 0.02
each = pytest.mark.parametrize('name', NAMES)


def _close(a, b, rtol=2e-5, atol=2e-6):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
  )


def _differ(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return any((np.asarray(x) != np.asarray(y)).any() for x, y in pairs)


def _steps(tx, params, grads):
  """Returns parameters and state after one update per row of `grads`."""

  def body(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(body, (params, tx.init(params)), grads)[0]


def _stack(*trees):
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@functools.cache
def _runner(name, with_axes=True, **knobs):
  """Jits three updates: learning rate and float knobs traced, as in a run."""
  config = spec.spec('optimizers', name, **knobs)
  axes = problem.axes() if with_axes else None

  def run(learning_rate, floats, params, grads):
    tx = spec.build(
      'optimizers', config, learning_rate, axes, 2 * LR, floats=floats
    )
    return _steps(tx, params, grads)

  return jax.jit(run)


def _floats(name):
  return spec.floats('optimizers', spec.spec('optimizers', name))


def test_axes_are_those_of_the_model():
  fields = [f.name for f in dataclasses.fields(roles.Axes)]
  assert fields == [f.name for f in dataclasses.fields(lm_axes.Axes)]


@each
def test_names_of_the_knobs_and_the_docstring(name):
  knobs = spec.knobs('optimizers', name)
  assert isinstance(knobs['weight_decay'], float)
  assert knobs['decay'] in decay.MODES
  doc = spec.get('optimizers', name).__doc__
  assert doc and len(doc.splitlines()) <= 15


@each
def test_floats_are_traced_once_and_equal_python_numbers(name):
  run = _runner(name)
  params, grads = problem.params(), problem.gradients(3)
  floats = _floats(name)
  got = run(jnp.float32(LR), jax.tree.map(jnp.float32, floats), params, grads)
  other = run(
    jnp.float32(LR / 2), jax.tree.map(jnp.float32, floats), params, grads
  )
  assert run._cache_size() == 1
  assert _differ(got[0], other[0])
  tx = spec.get('optimizers', name)(LR, problem.axes(), 2 * LR)
  _close(got, jax.jit(functools.partial(_steps, tx))(params, grads))
  assert jax.tree.structure(tx.init(params)) == jax.tree.structure(got[1])


@each
def test_every_float_knob_does_something_and_vmaps(name):
  floats = {'learning_rate': LR, **_floats(name)}
  rows = [floats] + [{**floats, k: 0.6 * v + 0.07} for k, v in floats.items()]
  stacked = {k: jnp.array([row[k] for row in rows]) for k in floats}
  params, grads = problem.params(), problem.gradients(3)

  def one(floats):
    rest = {k: v for k, v in floats.items() if k != 'learning_rate'}
    return _runner(name)(floats['learning_rate'], rest, params, grads)[0]

  got = jax.jit(jax.vmap(one))(stacked)
  for i, knob in enumerate(floats, start=1):
    row = lambda j: jax.tree.map(lambda x: x[j], got)  # noqa: B023
    assert _differ(row(i), row(0)), f'{knob} has no effect'
  _close(row(1), one(rows[1]))


@each
def test_a_schedule_is_its_value_at_each_step(name):
  params, grads = problem.params(), problem.gradients(3)
  schedule = optax.piecewise_constant_schedule(LR, {1: 0.5})
  make = spec.get('optimizers', name)
  got, _ = jax.jit(
    lambda p: _steps(make(schedule, None, LR, decay='corrected'), p, grads)
  )(params)

  @jax.jit
  def step(lr, params, state, g):
    tx = make(lr, None, LR, decay='corrected')
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  state = make(LR, None, LR, decay='corrected').init(params)
  expected = params
  for i in range(3):
    g = jax.tree.map(lambda x, i=i: x[i], grads)
    expected, state = step(schedule(i), expected, state, g)
  _close(got, expected)
  with pytest.raises(ValueError, match='needs peak'):
    make(schedule, decay='independent')


@each
def test_jit_equals_no_jit_without_axes(name):
  params = {'a': problem.params()['table'], 'b': jnp.ones(3)}
  grads = _stack(params, jax.tree.map(jnp.cos, params))
  tx = spec.get('optimizers', name)(LR)
  with jax.disable_jit():
    slow = _steps(tx, params, grads)
  _close(slow, jax.jit(functools.partial(_steps, tx))(params, grads))


@each
def test_state_keeps_its_types_also_for_bfloat16(name):
  tx = spec.get('optimizers', name)(LR, problem.axes())
  params = problem.params(dtype=jnp.bfloat16)
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert after == state
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
  for leaf in jax.tree.leaves(state):
    assert leaf.dtype != jnp.bfloat16
  new, _ = jax.jit(functools.partial(_steps, tx))(params, _stack(params))
  assert _differ(new, params)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(new))


@each
@pytest.mark.parametrize('params', [{}, {'a': {}}, jnp.float32(2.0)])
def test_strange_trees(name, params):
  tx = spec.get('optimizers', name)(LR)
  updates, _ = tx.update(params, tx.init(params), params)
  new = optax.apply_updates(params, updates)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


@each
@pytest.mark.parametrize('mode', decay.MODES)
def test_a_zero_gradient_shows_the_decay(name, mode):
  """The table of parts/decay.py; roles and ratios of the learning rate too."""
  params, wd, peak = problem.params(), 0.3, 4 * LR
  zeros = jax.tree.map(jnp.zeros_like, params)
  make = spec.get('optimizers', name)
  knobs = {'weight_decay': wd, 'decay': mode}
  tx = make(LR, problem.axes(), peak, **knobs)
  updates, _ = jax.jit(lambda p: tx.update(zeros, tx.init(p), p))(params)
  shrink = {
    'decoupled': LR * wd,
    'independent': LR / peak * wd,
    'corrected': LR * wd * LR / peak,
    'cautious': LR * wd,  # an update of 0 is aligned with anything
    'none': 0.0,
  }
  ratio = spec.knobs('optimizers', name).get('adam_lr_ratio', 1.0)

  def expected(x, a):
    if a.role == 'vector':
      return jnp.zeros_like(x)
    scale = 1.0 if a.role == 'matrix' or mode == 'independent' else ratio
    return -shrink[mode] * scale * x

  if mode == 'coupled':
    none = make(LR, problem.axes(), peak, weight_decay=wd, decay='none')
    g = jax.tree.map(
      lambda x, a: 0 * x if a.role == 'vector' else wd * x,
      params,
      problem.axes(),
    )
    want, _ = jax.jit(lambda p: none.update(g, none.init(p), p))(params)
  else:
    want = jax.tree.map(expected, params, problem.axes())
  _close(updates, want, rtol=1e-5, atol=1e-7 if mode == 'coupled' else 1e-10)


@each
def test_without_axes_all_leaves_decay(name):
  params = problem.params()
  zeros = jax.tree.map(jnp.zeros_like, params)
  tx = spec.get('optimizers', name)(LR, weight_decay=0.5, decay='decoupled')
  updates, _ = jax.jit(lambda p: tx.update(zeros, tx.init(p), p))(params)
  assert all((u != 0).all() for u in jax.tree.leaves(updates))


@each
def test_it_trains_a_toy(name):
  axes = problem.axes()
  make = spec.get('optimizers', name)

  def run(params):
    tx = make(LR, axes)

    def body(carry, _):
      params, state = carry
      value, g = jax.value_and_grad(problem.loss)(params)
      updates, state = tx.update(g, state, params)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(body, (params, tx.init(params)), length=60)[1]

  losses = np.asarray(jax.jit(run)(problem.params()))
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0] - 0.5, losses[::10]


@each
def test_mistakes_are_one_sentence(name):
  for knob, value in spec.knobs('optimizers', name).items():
    if not isinstance(value, str):
      continue
    config = spec.spec('optimizers', name, **{knob: 'nonsense'})
    with pytest.raises(UserError, match="='nonsense' does not exist; legal: '"):
      spec.build('optimizers', config, LR)
  tx = spec.get('optimizers', name)(LR)
  params = problem.params()
  with pytest.raises(ValueError, match='needs the parameters'):
    tx.update(params, tx.init(params))


@each
def test_sharded_equals_single(name):
  axes = problem.axes()
  params, grads = problem.params(), problem.gradients(2)
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'),
                       axis_types=(AxisType.Auto,) * 3)  # fmt: skip
  place = lambda p: NamedSharding(mesh, p)
  specs = jax.tree.map(place, lm_axes.partition_specs(axes))
  tx = spec.get('optimizers', name)(LR, axes)
  abstract = jax.eval_shape(tx.init, params)
  replicated = place(jax.sharding.PartitionSpec())
  of_state = lm_axes.like_params(abstract, params, specs, replicated)
  update = jax.jit(tx.update, out_shardings=(specs, of_state))
  p = jax.device_put(params, specs)
  state = jax.jit(tx.init, out_shardings=of_state)(p)
  for i in range(2):
    g = jax.tree.map(lambda x, i=i: x[i], grads)
    updates, state = update(jax.device_put(g, specs), state, p)
    p = optax.apply_updates(p, updates)
  single, single_state = jax.jit(functools.partial(_steps, tx))(params, grads)
  _close((p, state), (single, single_state))
  shapes = {x.sharding.shard_shape(x.shape) != x.shape
            for x in jax.tree.leaves(state)}  # fmt: skip
  assert True in shapes, 'nothing of the state is sharded'
