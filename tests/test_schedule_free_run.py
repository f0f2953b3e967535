"""A schedule-free run: gradients at y, everything else sees x.

Of a run the parameters are x and z is in the optimizer's state, so resume,
evaluation, merges and branches need no case of their own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import loop, loss, spec, step
from lm import run as run_lib
from tests import helpers

CHOICE = 'optimizer=schedule_free_adamw,schedule=constant'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs') / 'whole'
  assert loop.train(helpers.config(CHOICE), path) == 'done'
  return path


def _optax(config, built, num_steps):
  """The same steps with optax.contrib.schedule_free; y and x after each."""
  c = config.optimizer
  mask = jax.tree.map(lambda a: a.role != 'vector', built.model.axes)
  adam = optax.adamw(
    config.learning_rate, 0.0, c.b2, weight_decay=c.weight_decay, mask=mask
  )
  tx = optax.contrib.schedule_free(adam, config.learning_rate, c.b1)
  tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)

  @jax.jit
  def one(y, state, tokens):
    g = jax.grad(lambda p: loss.next_token(built.model, p, tokens).loss)(y)
    updates, state = tx.update(g, state, y)
    y = optax.apply_updates(y, updates)
    return y, state, optax.contrib.schedule_free_eval_params(state[1], y)

  y = jax.device_get(built.init().params)
  state, found = tx.init(y), []
  for n in range(num_steps):
    y, state, x = one(y, state, built.data.train.batch(n))
    found.append((y, x))
  return found


def _hook(config, name, state, params):
  return spec.hook(
    'optimizers', config.optimizer, name, state.opt_state, params
  )


def test_step_for_step_as_optax(whole):
  config = helpers.config(CHOICE)
  built = loop.build(config)
  train_step = jax.jit(step.build_train(config, built.model))
  state = jax.device_get(built.init())
  for n, (y, x) in enumerate(_optax(config, built, 4)):
    tokens = built.data.train.batch(n)
    state, _ = train_step(state, tokens, step.floats(config))
    ours = _hook(config, 'train_params', state, state.params)
    for mine, theirs in ((state.params, x), (ours, y)):
      for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    back = _hook(config, 'eval_params', state, ours)
    for a, b in zip(*map(jax.tree.leaves, (back, x)), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-6)
  gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), ours, state.params)
  assert max(jax.tree.leaves(gap)) > 1e-4, 'y and x are two'
  saved = helpers.leaves(whole, 4, 'params')  # on 8 devices
  for key, value in helpers.flat(x).items():
    np.testing.assert_allclose(saved[key], value, atol=1e-5, err_msg=key)


def test_the_run_evaluates_and_averages_x(whole, tmp_path):
  run = run_lib.Run(whole)
  logged = run.metrics['eval/loss'].value
  for i, at in enumerate(run.steps):
    got = run.losses(run.params(at)).mean()
    np.testing.assert_allclose(got, logged[i], rtol=1e-5)
  every = tmp_path / 'every'
  loop.train(
    helpers.config(CHOICE, checkpoint__every_steps=1, num_steps=4), every
  )
  iterates = [helpers.leaves(every, s, 'params') for s in range(1, 5)]
  for key, mean in helpers.leaves(whole, 4, 'mean').items():
    want = np.mean([x[key] for x in iterates], axis=0, dtype=np.float64)
    np.testing.assert_allclose(mean, want, atol=1e-6)


def test_resume_and_branch_are_the_run_bit_for_bit(whole, tmp_path):
  loop.train(helpers.config(CHOICE, num_steps=8), tmp_path / 'resumed')
  loop.train(helpers.config(CHOICE), tmp_path / 'resumed')
  helpers.assert_same_run(whole, tmp_path / 'resumed')
  branch = helpers.config(CHOICE, branch=f'{whole}@4')
  loop.train(branch, tmp_path / 'branch')
  for name in ('params', 'train', 'mean'):
    a, b = (helpers.leaves(r, 12, name) for r in (whole, tmp_path / 'branch'))
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_init_starts_z_at_the_parameters(whole, tmp_path):
  loop.train(helpers.config(CHOICE, init=f'{whole}@12', num_steps=1), tmp_path)
  train = helpers.leaves(tmp_path, 0, 'train')
  for key, value in helpers.leaves(whole, 12, 'params').items():
    z = f"['opt_state']['z']{key}"
    np.testing.assert_array_equal(train[z], value)
