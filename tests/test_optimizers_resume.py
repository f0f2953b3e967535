"""Every optimizer survives save, restore and continue, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np

from lm import checkpoint, spec
from lm.state import TrainState
from tests import optimizer_problem as problem

LR = 0.02


def _make(name):
  knobs = spec.knobs('optimizers', name)
  changed = {k: 2 for k in knobs if k.endswith('_every')}
  if 'd0' in knobs:  # Prodigy's own first step, which no float32 would show
    changed['d0'] = 1.0
  return spec.get('optimizers', name)(LR, problem.axes(), LR, **changed)


def _step(params, state, tx):
  grads = jax.tree.map(lambda x: jnp.sin(100 * x), params)
  updates, state = tx.update(grads, state, params)
  return jax.tree.map(jnp.add, params, updates), state


def test_a_restored_state_continues_as_if_nothing_had_happened(tmp_path):
  """All methods side by side, through one checkpoint: one compilation."""
  methods = {name: _make(name) for name in spec.names('optimizers')}
  soap = spec.get('optimizers', 'soap')
  methods['soap, not rotated'] = soap(LR, problem.axes(), LR, max_dim=4)

  @jax.jit
  def step(state):
    new = {
      name: _step(state.params[name], state.opt_state[name], tx)
      for name, tx in methods.items()
    }
    return state.replace(
      step=state.step + 1,
      params={k: p for k, (p, _) in new.items()},
      opt_state={k: s for k, (_, s) in new.items()},
    )

  params, zero = problem.params(), jnp.zeros((), jnp.int32)
  init = jax.jit(lambda: {k: tx.init(params) for k, tx in methods.items()})
  first = TrainState(
    zero, dict.fromkeys(methods, params), init(), (), zero, zero
  )
  saved = step(step(first))
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.save(saved, 2, {'step': 2})
  checkpoints.close()
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
  )
  restored = checkpoint.restore(tmp_path, 2, abstract)
  want, got = step(step(saved)), step(step(restored))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  forgotten = step(saved.replace(opt_state=first.opt_state)).params
  for name in methods:
    pick = lambda state: (state.params[name], state.opt_state[name])  # noqa: B023
    jax.tree.map(np.testing.assert_array_equal, pick(got), pick(want))
    assert _differ(want.params[name], saved.params[name]), name
    if jax.tree.leaves(saved.opt_state[name]):
      assert _differ(forgotten[name], step(saved).params[name]), name


def _differ(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return any((np.asarray(x) != np.asarray(y)).any() for x, y in pairs)
