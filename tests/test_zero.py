"""ZeRO: states spread over the data axis change the memory and no number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lm import axes as lm_axes
from lm import loop, mesh, spec, step
from lm import run as run_lib
from lm.errors import UserError
from lm.state import TrainState
from optimizers.adamw import adamw
from tests import helpers
from tests import optimizer_problem as problem


def _float64(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def _state(name, scan, **knobs):
  """A small state with factored or masked moments, and three updates of it."""
  config = spec.spec('optimizers', name, **knobs)
  tx = spec.build('optimizers', config, 0.02, problem.axes(scan))
  grads = _float64(problem.gradients(3, scan))

  def init():
    params = _float64(problem.params(scan))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), params, zero, zero)

  @jax.jit
  def three(state):
    def one(state, g):
      updates, new = tx.update(g, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      return state.replace(params=params, opt_state=new), None

    return jax.lax.scan(one, state, grads)[0]

  return init, three


@pytest.mark.parametrize(
  ('name', 'scan', 'knobs', 'pieces'),
  [
    ('adamw', True, {}, {('mu', 'table'): (4, 4), ('nu', 'head'): (1, 16)}),
    ('adamw', False, {}, {('mu', 'table'): (4, 4), ('nu', 'head'): (1, 16)}),
    ('muon', True, {}, {('matrices', 'momentum', 'query'): (1, 2, 4)}),
    ('adafactor', True, {'min_dim_size_to_factor': 4},
     {('v_col', 'table'): (2,)}),
    ('soap', True, {}, {('matrices', 'factors', 'query', 'nu'): (2, 8)}),
    ('normuon', True, {}, {('matrices', 'nu', 'query'): (1, 2, 1)}),
    ('dion', True, {'rank': 4}, {('matrices', 'buffer', 'query'): (1, 2, 4)}),
  ],
)  # fmt: skip
def test_any_state_spread_over_data_gives_the_same_numbers(
  name, scan, knobs, pieces
):
  """In float64, but optax has some factors of Adafactor in float32."""
  devices = mesh.make(ConfigDict({'data': 4, 'fsdp': 2, 'tensor': 1}))
  with jax.enable_x64(True):
    init, three = _state(name, scan, **knobs)
    shapes = jax.eval_shape(init)
    place = mesh.state_shardings(devices, problem.axes(scan), shapes, 3)
    want = three(init())
    got = jax.jit(three, out_shardings=place)(jax.device_put(init(), place))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
  found = {}
  for path, x in jax.tree_util.tree_leaves_with_path(got.opt_state):
    names = [str(getattr(k, 'key', getattr(k, 'name', ''))) for k in path]
    shard = x.sharding.shard_shape(x.shape)
    assert x.ndim == 0 or x.size < 2 or shard != x.shape or max(x.shape) < 4
    found[tuple(n for n in names if n and not n.startswith('block'))] = shard
  for key, shard in pieces.items():
    assert found[key][-len(shard) :] == shard, (key, found[key])


@pytest.mark.parametrize('name', spec.names('optimizers'))
def test_states_are_sharded_like_their_parameters(name):
  """A device of eight has an eighth of them, factors and bases among them.

  Norm scales and counters are everywhere, in states as in parameters.
  """
  arg = f'optimizer={name}'
  built = loop.build(helpers.config(arg, mesh__fsdp=8, mesh__data=1)).abstract
  for tree in (built.params, built.mean, built.opt_state):
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert 8 * mesh.device_bytes(tree) < 1.04 * whole


def test_golden_shards_of_two_matrices():
  """On 4 x 2 devices, mu of (64, 128) and (128, 64); AdamW, which
  in float32 would enlarge what is round-off in gradients of 1e-8.

  In P(tensor, data) data comes last: the moments are parts of what a device
  holds of the parameter, where (data, tensor) would move them.
  """
  devices = mesh.make(ConfigDict({'data': 4, 'fsdp': 1, 'tensor': 2}))
  names = {'w1': ('embed', 'mlp'), 'w2': ('mlp', 'embed')}
  axes = {k: lm_axes.from_names(v) for k, v in names.items()}
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape)
  params = {'w1': draw(64, 128) / 8, 'w2': draw(128, 64) / 11}
  x, y, tx = draw(32, 64), draw(32, 64), adamw(1e-2, axes)

  def init():
    zero = jnp.zeros((), jnp.int32)
    p = _float64(params)
    return TrainState(zero, p, tx.init(p), p, zero, zero)

  def loss(p):
    return jnp.mean((jnp.tanh(x @ p['w1']) @ p['w2'] - y) ** 2)

  @jax.jit
  def one(state):
    g = jax.grad(loss)(state.params)
    updates, new = tx.update(g, state.opt_state, state.params)
    moved = optax.apply_updates(state.params, updates)
    return state.replace(params=moved, opt_state=new)

  with jax.enable_x64(True):
    shapes = jax.eval_shape(init)
    place = mesh.state_shardings(devices, axes, shapes, zero=1)
    spread = jax.jit(one, out_shardings=place)
    got, want = jax.device_put(init(), place), init()
    for _ in range(5):
      got, want = spread(got), one(want)
  shard = got.opt_state.mu['w2'].addressable_shards[0].data
  assert shard.shape == (16, 64)
  for k in names:
    a, b = jax.device_get((got.params[k], want.params[k]))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    assert np.abs(b - params[k]).max() > 0.02
  mu = place.opt_state.mu
  assert place.params['w1'].spec == P('fsdp', 'tensor')
  assert mu['w1'].spec == P(('fsdp', 'data'), 'tensor')
  assert mu['w2'].spec == P(('tensor', 'data'), 'fsdp')
  assert mu['w1'].shard_shape((64, 128)) == (16, 64)
  assert mu['w2'].shard_shape((128, 64)) == (16, 64)
  assert place.opt_state.count.is_fully_replicated


def _built(zero, **more):
  return loop.build(helpers.config(mesh__zero=zero, mesh__data=8, **more))


@pytest.fixture(scope='module')
def losses():
  """Of four steps, for each stage."""
  found = {}
  for zero in range(4):
    built = _built(zero)
    state, config = built.init(), helpers.config()
    found[zero] = []
    with jax.set_mesh(built.mesh):
      for n in range(4):
        tokens = built.data.train.batch(n)
        state, metrics = built.train_step(state, tokens, step.floats(config))
        found[zero].append(float(metrics['train/loss']))
    for x, like in zip(
      jax.tree.leaves(state), jax.tree.leaves(built.abstract), strict=True
    ):
      assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
  return found


def test_each_stage_trains_alike(losses):
  for zero in (1, 2, 3):
    np.testing.assert_allclose(losses[zero], losses[0], rtol=1e-5)
  assert losses[0][-1] < losses[0][0]


def test_each_stage_spreads_what_it_says():
  """By the sizes on a device, and by the constraints on gradients."""
  built = {zero: _built(zero) for zero in range(4)}
  size = {
    field: [
      mesh.device_bytes(getattr(built[zero].abstract, field))
      for zero in range(4)
    ]
    for field in ('params', 'opt_state', 'mean')
  }
  one = size['params'][0]
  assert size['params'] == [one, one, one, one // 8]
  assert size['mean'] == [one, one // 8, one // 8, one // 8]
  adam = 2 * one + 4  # mu, nu and a counter
  assert size['opt_state'] == [adam] + 3 * [2 * one // 8 + 4]
  count = []
  for zero in (1, 2):
    b, config = built[zero], helpers.config()
    tokens = jax.ShapeDtypeStruct((8, 33), jnp.int32)
    with jax.set_mesh(b.mesh):
      text = b.train_step.lower(b.abstract, tokens, step.floats(config))
    count.append(text.as_text().count('sharding_constraint'))
  params = len(jax.tree.leaves(built[0].abstract.params))
  assert count[1] - count[0] == params


def test_a_spread_checkpoint_goes_on_elsewhere(tmp_path):
  """Muon in stage 3 on data x tensor, then on fsdp, against never stopping."""
  arg = 'optimizer=muon,schedule=constant'
  spread = {'mesh__zero': 3, 'mesh__tensor': 2, 'mesh__data': 4}
  small = {'eval__every_steps': 0}
  loop.train(
    helpers.config(arg, num_steps=4, **spread, **small), tmp_path / 'a'
  )
  other = {'mesh__fsdp': 8, 'mesh__data': 1, 'num_steps': 6}
  loop.train(helpers.config(arg, **other, **small), tmp_path / 'a')
  loop.train(helpers.config(arg, **other, **small), tmp_path / 'b')
  a, b = (
    run_lib.Run(tmp_path / r).metrics['train/loss'].value for r in ('a', 'b')
  )
  np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize('zero', [-1, 4])
def test_an_unknown_stage_is_refused(zero):
  with pytest.raises(UserError, match=f'mesh.zero={zero} is no stage'):
    _built(zero)
