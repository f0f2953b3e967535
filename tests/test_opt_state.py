"""States found by meaning: another optimizer at a branch, changed layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizers.adamw
import optimizers.signum
from lm import checkpoint, loop, opt_state, restore, spec
from lm import run as run_lib
from lm.errors import UserError
from optimizers.adamw import adamw
from optimizers.dion import dion
from optimizers.lion import lion
from optimizers.mars import mars
from optimizers.marsm import marsm
from optimizers.muon import muon
from optimizers.normuon import normuon
from optimizers.signum import signum
from optimizers.soap import soap
from tests import helpers
from tests import optimizer_problem as problem

LR, WD = 0.02, 0.1
PARAMS = problem.params()
AXES = problem.axes()


def _orthogonalized(g, steps=5):
  """Newton-Schulz with Keller Jordan's coefficients, by numpy in float64."""
  x = g / np.linalg.norm(g)
  tall = x.shape[0] > x.shape[1]
  x = x.T if tall else x
  for _ in range(steps):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if tall else x


def _after_five_steps_of_adam():
  """float64: parameters, state and the next gradient."""
  x = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), PARAMS)
  tx = adamw(LR, AXES, weight_decay=WD)
  state, grads = tx.init(x), problem.gradients(6)
  # Large, so that Newton-Schulz's epsilon beside the norm is nothing.
  large = lambda g: 1e4 * jnp.asarray(g, jnp.float64)
  grad = lambda i: jax.tree.map(lambda g: large(g[i]), grads)
  for i in range(5):
    updates, state = jax.jit(tx.update)(grad(i), state, x)
    x = optax.apply_updates(x, updates)
  return x, state, grad(5)


def _switch(old, fresh, params, policy):
  source = opt_state.plan(old, fresh, params, policy).source
  return opt_state.fill(fresh, source, opt_state.by_path(old))


@pytest.mark.parametrize('policy', ['discard', 'keep', 'carry_mu'])
def test_first_update_of_muon_after_adamw(policy):
  """-lr (0.2 sqrt(max) NS(g) + wd x) exactly; with mu: its Nesterov mean."""
  with jax.enable_x64(True):
    x, old, g = _after_five_steps_of_adam()
    tx = muon(
      LR, AXES, scale='moonlight', weight_decay=WD, bias_correction=True
    )
    new = _switch(old, tx.init(x), x, policy)
    updates, _ = jax.jit(tx.update)(g, new, x)
  x, g, m, got = (
    np.asarray(t['blocks']['query']).reshape(2, 8, 8)
    for t in (x, g, old.mu, updates)
  )
  m = 0.95 * m + 0.05 * g
  mean = 0.95 * m / (1 - 0.95**7) + 0.05 * g / (1 - 0.95**6)
  for layer in range(2):
    used = mean[layer] if policy == 'carry_mu' else g[layer]
    u = 0.2 * np.sqrt(8) * _orthogonalized(used)
    want = -LR * (u + WD * x[layer])
    np.testing.assert_allclose(got[layer], want, rtol=0, atol=2e-14)
    # An exact factor has RMS 0.2, as AdamW about; Keller's values are in
    # [0.68, 1.14] for singular values above 0.01 of the norm.
    assert 0.2 * 0.68 < np.sqrt(np.mean(u**2)) < 0.2 * 1.14
  kept = policy != 'discard'
  assert int(new.rest.count) == (5 if kept else 0)
  assert int(new.matrices.count) == (5 if policy == 'carry_mu' else 0)
  table = np.asarray(old.nu['table']) if kept else 0
  np.testing.assert_array_equal(np.asarray(new.rest.nu['table']), table * 1.0)


def _plan(old, new, policy=''):
  shapes = (jax.eval_shape(tx.init, PARAMS) for tx in (old, new))
  return opt_state.plan(*shapes, PARAMS, policy)


@pytest.mark.parametrize(
  ('old', 'new', 'policy', 'lines'),
  [
    (adamw, muon, 'keep', [
      'kept rest.count <- count',
      'kept rest.mu <- mu of blocks/norm, head, table',
      'kept rest.nu <- nu of blocks/norm, head, table',
      'initialised matrices.count',
      'initialised matrices.momentum of blocks/out, blocks/query',
      'dropped mu of blocks/out, blocks/query',
      'dropped nu of blocks/out, blocks/query',
    ]),
    # mu of the rest exists, of the matrices not: count cannot fit both.
    (muon, adamw, 'keep', [
      "branch_state='keep' finds nothing to keep",
      'initialised count',
      'initialised mu of all parameters',
      'initialised nu of all parameters',
      'dropped matrices.count',
      'dropped matrices.momentum of blocks/out, blocks/query',
      'dropped rest.count',
      'dropped rest.mu of blocks/norm, head, table',
      'dropped rest.nu of blocks/norm, head, table',
    ]),
    (adamw, lion, 'keep', [
      'kept mu of all parameters',
      'dropped count',
      'dropped nu of all parameters',
    ]),
    (muon, normuon, 'keep', [
      'kept matrices.count',
      'kept matrices.momentum of blocks/out, blocks/query',
      'kept rest.count',
      'kept rest.mu of blocks/norm, head, table',
      'kept rest.nu of blocks/norm, head, table',
      'initialised matrices.nu of blocks/out, blocks/query',
    ]),
    (adamw, adamw, 'discard', [
      'initialised count',
      'initialised mu of all parameters',
      'initialised nu of all parameters',
      'dropped count',
      'dropped mu of all parameters',
      'dropped nu of all parameters',
    ]),
  ],
)  # fmt: skip
def test_what_is_kept_initialised_and_dropped(old, new, policy, lines):
  make = lambda f: f(LR, AXES)
  found = _plan(make(old), make(new), policy).lines
  assert [' '.join(line.split()) for line in found] == lines


@pytest.mark.parametrize('name', spec.names('optimizers'))
def test_a_field_of_means_is_a_mean_of_gradients(name):
  """Of equal gradients it becomes that gradient, or a branch would not fit."""
  tx = spec.get('optimizers', name)(1e-3, AXES)
  g = jax.tree.map(lambda x: jnp.cos(9 * x), PARAMS)
  g = jax.tree.map(lambda x: x / (9 * optax.tree.norm(g)), g)  # not clipped
  step = lambda _, s: tx.update(g, s, PARAMS)[1]
  run = lambda: jax.lax.fori_loop(0, 1000, step, tx.init(PARAMS))
  state = jax.jit(run)()
  want = opt_state.by_path(g)
  for unit in opt_state._units(state, PARAMS):
    for leaf, path in unit.leaves.items():
      if leaf.param and leaf.field in opt_state.MEANS:
        got, right = opt_state.by_path(state)[path], want[leaf.param]
        np.testing.assert_allclose(got, right, atol=1e-3 * np.abs(right).max())


def test_a_state_that_cannot_be_completed_is_not_begun():
  """SOAP has no eigenvectors yet: a count of 5 would divide by zero."""
  found = _plan(adamw(LR, AXES), soap(LR, AXES), 'carry_mu')
  assert not [path for path in found.source if path[0] == 'matrices']


_ADAM, _TRACE = optax.scale_by_adam(), optax.trace(0.9)
_EMA, _SLOW = optax.ema(0.9), optax.ema(0.999)
_PLAIN = optax.clip(1.0)  # has no state


@pytest.mark.parametrize(
  ('old', 'new', 'initialised', 'dropped'),
  [
    ([_ADAM, _EMA], [_EMA, _ADAM], [], []),
    ([_ADAM, _EMA], [_PLAIN, _EMA, _PLAIN, _ADAM], [], []),
    ([_ADAM], [_TRACE, _ADAM], ['trace'], []),
    ([_TRACE, _ADAM], [_ADAM], [], ['trace']),
    ([_EMA, _ADAM, _SLOW], [_TRACE, _EMA, _SLOW, _ADAM], ['trace'], []),
    ([_ADAM], [_ADAM, lion(1.0)], ['mu'], []),  # another mu
    ([_ADAM], [optax.scale_by_amsgrad(), _TRACE], ['nu_max', 'trace'], []),
  ],
)
def test_a_changed_chain_keeps_its_state(old, new, initialised, dropped):
  old, new = optax.chain(*old), optax.chain(*new)
  found = _plan(old, new)
  title = lambda kind: [
    line.split()[1] for line in found.lines if line.startswith(kind)
  ]
  assert title('initialised') == initialised
  assert title('dropped') == dropped
  # With values: each leaf has its own, found again under the same name.
  mark = iter(range(1000))
  state = jax.tree.map(lambda x: jnp.full_like(x, next(mark)), old.init(PARAMS))
  moved = _switch(state, new.init(PARAMS), PARAMS, '')
  before, after = opt_state.by_path(state), opt_state.by_path(moved)
  for to, source in found.source.items():
    assert to[1:] == source[1:]  # all but the place in the chain
    assert (after[to] == before[source]).all()
  used = list(found.source.values())
  assert len(used) == len(set(used))


def test_alike_means_keep_their_order():
  old, new = optax.chain(_EMA, _SLOW), optax.chain(_TRACE, _EMA, _PLAIN, _SLOW)
  source = _plan(old, new).source
  assert {(k[0], v[0]) for k, v in source.items()} == {('1', '0'), ('3', '1')}


@pytest.mark.parametrize(
  ('old', 'new', 'policy', 'sentence'),
  [
    ([_EMA, _SLOW], [_SLOW], '', '2 transformations .* fit 1 of the new one'),
    ([_EMA], [_EMA, _SLOW], '', '1 transformations .* fit 2 of the new one'),
    ([_TRACE], [_EMA], '', 'now has .*ema in place of trace.*would be lost'),
    ([_EMA], [_EMA], 'carry', "'carry' does not exist. Did you mean 'carry_mu"),
  ],
)
def test_what_cannot_be_told_is_refused(old, new, policy, sentence):
  with pytest.raises(UserError, match=sentence):
    _plan(optax.chain(*old), optax.chain(*new), policy)


def test_another_shape_is_told_by_its_shape():
  old, new = (dion(LR, AXES, rank=r) for r in (2, 1))
  sentence = (
    r'now has basis \(2, \d+, 1\) in place of basis \(2, \d+, 2\).*undo'
  )
  with pytest.raises(UserError, match=sentence):
    _plan(old, new)


@pytest.mark.parametrize('policy', ['keep', 'carry_mu'])
@pytest.mark.parametrize('old', [mars, marsm])
@pytest.mark.parametrize('new', [mars, marsm])
def test_parameters_are_not_kept_as_a_gradient(old, new, policy):
  """MARS remembers a gradient in one form, parameters in the other."""
  before, after = old(LR, AXES, form='exact'), new(LR, AXES)
  for a, b in ((before, after), (after, before)):
    found = _plan(a, b, policy).source.items()
    kept = {where[-1] for pair in found for where in _fields(pair)}
    assert not kept & {'iterate', 'previous'}, kept


def _fields(paths):
  known = opt_state.by_path(PARAMS)
  return [p[:-n] for p in paths for n in (1, 2, 3) if p[-n:] in known]


@pytest.mark.parametrize('policy', ['keep', 'carry_mu'])
def test_counters_that_cannot_be_told_start_afresh(policy):
  old, new = (f(LR, AXES, decay='random-matched') for f in (adamw, muon))
  found = _plan(old, new, policy)
  lines = [' '.join(line.split()) for line in found.lines]
  mu = 'kept rest.inner.mu <- inner.mu of blocks/norm, head, table'
  counters = 'initialised matrices.count', 'initialised rest.count'
  assert {mu, *counters, 'dropped count'} <= {*lines}
  with pytest.raises(UserError, match='which is meant cannot be told'):
    _plan(old, new)


@pytest.mark.parametrize('policy', ['discard', 'keep', 'carry_mu'])
def test_it_is_said_when_nothing_is_kept(policy):
  found = _plan(optax.scale_by_sign(), adamw(LR, AXES), policy)
  said = [line for line in found.lines if 'finds nothing to keep' in line]
  assert len(said) == (policy != 'discard')
  assert not found.source


@pytest.mark.parametrize('policy', ['keep', 'carry_mu'])
@pytest.mark.parametrize('new', [muon, soap])
def test_it_is_said_when_no_mean_is_handed_on(policy, new):
  found = _plan(adamw(LR, AXES), new(LR, AXES), policy)
  said = any('finds no mean of another name' in line for line in found.lines)
  assert found.source and said == (policy == 'carry_mu' and new is soap)


# --- runs

_NO_EVAL = {'eval__every_steps': 0}


@pytest.fixture(scope='module')
def parent(tmp_path_factory):
  """AdamW at a constant rate, in shards: the stable phase."""
  path = tmp_path_factory.mktemp('parent')
  config = helpers.config('schedule=constant', num_steps=5, mesh__fsdp=8,
                          mesh__data=1, **_NO_EVAL)  # fmt: skip
  assert loop.train(config, path) == 'done'
  return path


def _arm(parent, path, optimizer, policy):
  arg = f'optimizer={optimizer},schedule=wsd'
  config = helpers.config(arg, num_steps=6, **_NO_EVAL)
  config.branch, config.branch_state = f'{parent}@4', policy
  config.schedule.decay = 0.5
  config.learning_rate = 1e-3
  assert loop.train(config, path) == 'done'
  return helpers.leaves(path, 4, 'train'), run_lib.Run(path).metrics


def test_four_arms_from_one_stable_checkpoint(parent, tmp_path, capsys):
  """On another mesh than the parent's."""
  old = helpers.leaves(parent, 4, 'train')
  arms = {
    'continue': ('adamw', ''),
    'reset': ('adamw', 'discard'),
    'muon-reset': ('muon', 'discard'),
    'muon-carry': ('muon', 'carry_mu'),
  }
  states, losses = {}, {}
  for name, arm in arms.items():
    states[name], metrics = _arm(parent, tmp_path / name, *arm)
    losses[name] = metrics['train/loss'].value
    # The schedule goes on: steps 4 and 5 of a decay from 3 to 6.
    np.testing.assert_allclose(
      metrics['optim/lr'].value[-2:], [2e-3 / 3, 1e-3 / 3], rtol=1e-6
    )
    assert states[name]["['step']"] == 4
  _arm(parent, tmp_path / name, *arm)  # resumes, and is done
  for key, value in states['continue'].items():
    np.testing.assert_array_equal(value, old[key])
  for name in ('reset', 'muon-reset'):
    for key, value in states[name].items():
      assert not value.any() or key == "['step']"
  q = "['block_0']['attn']['q']"
  carried = states['muon-carry'][f"['opt_state']['matrices']['momentum']{q}"]
  np.testing.assert_array_equal(carried, old[f"['opt_state']['mu']{q}"])
  assert old[f"['opt_state']['mu']{q}"].any()
  first = {round(float(x[0]), 6) for x in losses.values()}
  assert len(first) == 1, 'the parameters are those of the parent'
  assert len({float(x[1]) for x in losses.values()}) == 4
  text = ' '.join(capsys.readouterr().out.split())
  assert 'kept matrices.momentum <- mu of block_*/attn/k, block_*' in text


def test_another_optimizer_needs_a_word(parent, tmp_path):
  for policy, sentence in (
    ('', "used adamw; to go on with muon, say .*branch_state='discard'"),
    ('cary_mu', "Did you mean 'carry_mu'"),
  ):
    with pytest.raises(UserError, match=sentence):
      _arm(parent, tmp_path, 'muon', policy)
  assert not list(tmp_path.iterdir())


def _with_trace(*args, **knobs):
  return optax.chain(optax.trace(0.5), adamw(*args, **knobs))


def test_a_run_resumes_with_one_transformation_more(
  parent, monkeypatch, capsys
):
  changed = functools.wraps(adamw)(_with_trace)
  monkeypatch.setattr(optimizers.adamw, 'adamw', changed)
  arg, more = 'schedule=constant', {**_NO_EVAL, 'num_steps': 5}
  config = helpers.config(arg, mesh__fsdp=2, **more)
  built = loop.build(config)
  with jax.set_mesh(built.mesh):
    state, origin = restore.restore_or_init(
      config, checkpoint.Checkpoints(parent), built.abstract, built.init
    )
  assert origin == f'resumed from {parent}@5'
  old = helpers.leaves(parent, 5, 'train')
  trace, adam = state.opt_state
  for key, value in helpers.flat({'mu': adam.mu, 'nu': adam.nu}).items():
    np.testing.assert_array_equal(value, old[f"['opt_state']{key}"])
  assert int(adam.count) == int(state.step) == 5
  assert not any(x.any() for x in jax.tree.leaves(trace))
  for x, want in zip(
    jax.tree.leaves(state), jax.tree.leaves(built.abstract), strict=True
  ):
    assert x.sharding.is_equivalent_to(want.sharding, x.ndim)
  assert 'initialised  trace of all parameters' in capsys.readouterr().out


def _signum_in_halves(learning_rate, *_, b1=0.9, weight_decay=0.1, decay=''):
  return optax.chain(
    optax.chain(
      optax.ema(b1, debias=False, accumulator_dtype='bfloat16'),
      optax.scale_by_sign(),
      optax.identity(),
    ),
    optax.scale_by_learning_rate(learning_rate),
  )


def _signum(learning_rate, *_, b1=0.9, weight_decay=0.1, decay=''):
  return optax.chain(
    optax.chain(optax.ema(b1, debias=False), optax.scale_by_sign()),
    optax.scale_by_learning_rate(learning_rate),
  )


@pytest.mark.parametrize(
  'makes', [(_signum, _signum_in_halves), (_signum_in_halves, _signum)]
)
def test_states_of_other_dtypes_or_transformations_without_one_are_found(
  makes, tmp_path, monkeypatch, capsys
):
  for num_steps, make in zip((2, 3), makes, strict=True):
    changed = functools.wraps(signum)(make)
    monkeypatch.setattr(optimizers.signum, 'signum', changed)
    config = helpers.config('optimizer=signum,schedule=constant',
                            num_steps=num_steps, **_NO_EVAL)  # fmt: skip
    assert loop.train(config, tmp_path) == 'done'
  printed = capsys.readouterr().out
  assert f'resumed from {tmp_path}@2' in printed
  dtypes = ('float32', 'bfloat16')[:: 1 if makes[0] is _signum else -1]
  assert f'Cast from {dtypes[0]} to {dtypes[1]}, of {tmp_path}@2' in printed
  assert not (tmp_path / 'damaged').exists()
  found = helpers.leaves(tmp_path, 3, 'train').items()
  ema = [x for key, x in found if 'ema' in key]
  assert ema and all(str(x.dtype) == dtypes[1] and x.any() for x in ema)


def test_init_gives_the_optimizer_the_parameters_it_begins_with(parent):
  """z of schedule-free learning begins at the parameters."""
  params = jax.device_get(run_lib.Run(parent).params(4))
  config = helpers.config('optimizer=schedule_free_adamw', **_NO_EVAL)
  state = loop.build(config).init(params)
  for tree in (state.params, state.opt_state.z, state.mean):
    for a, b in zip(
      jax.tree.leaves(tree), jax.tree.leaves(params), strict=True
    ):
      np.testing.assert_array_equal(a, b)
