"""The contract of every file in optimizers/; a new file is tested as it is."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from lm import axes as lm_axes
from lm import mesh as lm_mesh
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


def _statics(name):
  """What happens every so many steps shall happen within three."""
  knobs = spec.knobs('optimizers', name)
  return {k: 1 for k in knobs if k.endswith('_every')}


@functools.cache
def _runner(name):
  """Jits three updates as in a run: built inside from traced numbers."""
  config = spec.spec('optimizers', name, decay='corrected', **_statics(name))

  def run(learning_rates, floats, params, grads):
    def make(lr):
      axes = problem.axes()
      return spec.build('optimizers', config, lr, axes, LR, floats=floats)

    def body(carry, x):
      params, state = carry
      updates, state = make(x[0]).update(x[1], state, params)
      return (optax.apply_updates(params, updates), state), None

    state = make(LR).init(params)
    return jax.lax.scan(body, (params, state), (learning_rates, grads))[0]

  return jax.jit(run)


def _floats(name):
  return spec.floats('optimizers', spec.spec('optimizers', name))


def _float64(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@each
def test_every_int_and_bool_knob_changes_the_program(name):
  axes, params = problem.axes(), problem.params()
  grads = problem.gradients(3)

  def program(**knobs):
    tx = spec.get('optimizers', name)(LR, axes, **knobs)
    return str(jax.make_jaxpr(functools.partial(_steps, tx))(params, grads))

  default = program()
  for knob, value in spec.knobs('optimizers', name).items():
    if isinstance(value, int):
      other = not value if isinstance(value, bool) else 1 + (value == 1)
      assert program(**{knob: other}) != default, f'{knob} has no effect'


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
def test_traced_numbers_equal_python_numbers_and_a_schedule(name):
  """In float64; and one compilation serves all values."""
  schedule = optax.piecewise_constant_schedule(LR, {1: 0.5})
  make = spec.get('optimizers', name)
  with jax.enable_x64(True):
    params, grads = _float64((problem.params(), problem.gradients(3)))
    lrs = jnp.stack([jnp.asarray(schedule(i), jnp.float64) for i in range(3)])
    floats = _float64(_floats(name))
    got, state = _runner(name)(lrs, floats, params, grads)
    half, _ = _runner(name)(lrs / 2, floats, params, grads)
    assert _runner(name)._cache_size() == 1
    assert _differ(got, half)
    knobs = {'decay': 'corrected', **_statics(name)}
    tx = make(schedule, problem.axes(), LR, **knobs)
    want, scheduled = jax.jit(functools.partial(_steps, tx))(params, grads)
    _close(got, want, 1e-7, 1e-9)
    count = jax.tree.structure(scheduled).num_leaves
    assert count >= jax.tree.structure(state).num_leaves
  with pytest.raises(ValueError, match='needs peak'):
    make(schedule, decay='independent')


@each
def test_every_float_knob_does_something_and_vmaps(name):
  floats = {'learning_rate': LR, **_floats(name)}
  rows = [floats] + [{**floats, k: 0.6 * v + 0.07} for k, v in floats.items()]
  with jax.enable_x64(True):
    stacked = {k: jnp.array([row[k] for row in rows]) for k in floats}
    params, grads = _float64((problem.params(), problem.gradients(3)))

    def one(floats):
      lrs = jnp.full(3, floats['learning_rate'])
      rest = {k: v for k, v in floats.items() if k != 'learning_rate'}
      return _runner(name)(lrs, rest, params, grads)[0]

    got = jax.jit(jax.vmap(one))(stacked)
    for i, knob in enumerate(floats, start=1):
      row = lambda j: jax.tree.map(lambda x: x[j], got)  # noqa: B023
      assert _differ(row(i), row(0)), f'{knob} has no effect'
    _close(row(1), one(_float64(rows[1])), 1e-7, 1e-9)


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
  new = jax.eval_shape(optax.apply_updates, params, updates)
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
def test_it_trains_a_toy(name):
  """At one of three learning rates: the units of methods differ."""
  axes = problem.axes()
  make = spec.get('optimizers', name)

  def run(lr, params):
    tx = make(lr, axes)

    def body(carry, _):
      params, state = carry
      value, g = jax.value_and_grad(problem.loss)(params)
      updates, state = tx.update(g, state, params)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(body, (params, tx.init(params)), length=60)[1]

  lrs = jnp.array([LR / 200, LR, 20 * LR])
  losses = jax.jit(jax.vmap(run, (0, None)))(lrs, problem.params())
  first, last = np.asarray(losses)[:, [0, -1]].T
  assert np.nanmin(last) < first[0] - 0.5, (first, last)


@pytest.mark.parametrize(
  ('name', 'knob', 'value', 'message'),
  [
    ('dion', 'rank', 0, 'rank=0 must be at least 1'),
    ('dion', 'rank', 2**31, 'is beyond int32'),
    ('ademamix', 'warmup_steps', -1, 'warmup_steps=-1 must be at least 0'),
    ('soap', 'refresh_every', 0, 'refresh_every=0 must be at least 1'),
    ('soap', 'max_dim', -5, 'max_dim=-5 must be at least 0'),
  ],
)
def test_integers_out_of_range(name, knob, value, message):
  config = spec.spec('optimizers', name, **{knob: value})
  with pytest.raises(UserError, match=message):
    spec.build('optimizers', config, LR)


@each
def test_mistakes_are_one_sentence(name):
  for knob, value in spec.knobs('optimizers', name).items():
    if not isinstance(value, str):
      continue
    config = spec.spec('optimizers', name, **{knob: 'nonsense'})
    said = f"{knob}='nonsense' does not exist; legal: '"
    with pytest.raises(UserError, match=re.escape(said)):
      spec.build('optimizers', config, LR)
      pytest.fail(f"{knob}='nonsense' is accepted: see parts/choices.py")
  tx = spec.get('optimizers', name)(LR)
  params = problem.params()
  with pytest.raises(ValueError, match='needs the parameters'):
    tx.update(params, tx.init(params))


@each
def test_sharded_equals_single(name):
  """Three steps on a 2 x 2 x 2 mesh, the state sharded like its parameters."""
  axes = problem.axes()
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'),
                       axis_types=(AxisType.Auto,) * 3)  # fmt: skip
  place = lambda p: NamedSharding(mesh, p)
  specs = jax.tree.map(place, lm_axes.partition_specs(axes))
  run = _runner(name)
  with jax.enable_x64(True):
    params, grads = _float64((problem.params(), problem.gradients(3)))
    knobs = jnp.full(3, LR), _float64(_floats(name))
    single = run(*knobs, params, grads)
    replicated = place(jax.sharding.PartitionSpec())
    of_state = lm_axes.like_params(
      single[1], params, specs, replicated, lm_mesh.factor_sharding
    )
    sharded = jax.jit(run.__wrapped__, out_shardings=(specs, of_state))(
      *knobs, jax.device_put(params, specs), grads
    )
    _close(sharded, single, 1e-7, 1e-9)
  cut = lambda x: x.sharding.shard_shape(x.shape) != x.shape
  must = lm_axes.like_params(
    sharded[1], params, jax.tree.map(cut, sharded[0]), False,
    lambda cut, leaf: cut and any(n and n % 2 == 0 for n in leaf.shape),
  )  # fmt: skip
  for x, wanted in zip(*map(jax.tree.leaves, (sharded[1], must)), strict=True):
    assert cut(x) or not wanted, f'a part {x.shape} of the state is not sharded'
