"""One training step and one evaluation step: pure functions, no I/O."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lm import averages, diagnostics, follow, loss, norms, spec
from lm.model import Model
from lm.state import TrainState

Metrics = dict[str, jax.Array]


def floats(config: ConfigDict) -> dict[str, Any]:
  """Returns the traced numbers of a run: settings that share a compilation."""
  return {
    'learning_rate': config.learning_rate,
    'clip_norm': config.clip_norm,
    'z_loss': config.z_loss,
    'optimizer': spec.floats('optimizers', config.optimizer),
    'schedule': spec.floats('schedules', config.schedule),
  }


def multiplier(config: ConfigDict, step: Any, traced: dict[str, Any]) -> Any:
  """Returns the schedule's multiplier for the update that follows `step`."""
  schedule = spec.build(
    'schedules', config.schedule, config.num_steps, floats=traced
  )
  return schedule(step)


def multipliers(config: ConfigDict) -> np.ndarray:
  """Returns the multiplier of every update, float64 (num_steps,)."""
  traced = floats(config)['schedule']
  steps = np.arange(config.num_steps, dtype=np.int32)
  one = lambda s: multiplier(config, s, traced)
  return np.asarray(jax.jit(jax.vmap(one))(steps), np.float64)


def knobs(
  config: ConfigDict, step: Any, traced: dict[str, Any]
) -> dict[str, Any]:
  """Returns the floats of the optimizer for the update that follows `step`."""
  found = {**traced['optimizer'], **follow.floats(config, step, traced)}
  if config.normalize_decay:
    found['weight_decay'] = found['weight_decay'] / config.num_steps**0.5
  return found


def build_train(
  config: ConfigDict, model: Model, grad_shardings: Any = None
) -> Callable[..., Any]:
  """Returns `train_step(state, tokens_BS, floats) -> (state, metrics)`.

  The optimizer is built inside the step from traced numbers: the schedule lives
  in no state, and one compilation serves all settings with equal statics. All
  metrics describe the state before the update; `train/bad_steps` counts it.
  """

  def train_step(state, tokens_BS, traced):
    grads, cross_entropy = _gradient(
      config, model, state.params, tokens_BS, traced, grad_shardings
    )
    l2 = optax.tree.norm(grads)
    rate = traced['learning_rate'] * multiplier(
      config, state.step, traced['schedule']
    )
    traced = {**traced, 'optimizer': knobs(config, state.step, traced)}
    good = jnp.isfinite(cross_entropy) & jnp.isfinite(l2)
    update = lambda: _update(config, model, state, grads, l2, rate, traced)
    keep = lambda: (state.params, state.opt_state)
    params, opt_state = jax.lax.cond(good, update, keep)
    in_a_row = jnp.where(good, 0, state.bad_in_a_row + 1)
    new = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      mean=_running_mean(config, state, params),
      bad_steps=state.bad_steps + jnp.where(good, 0, 1),
      bad_in_a_row=in_a_row,
      averages=averages.update(config, state.averages, state.step, params),
    )
    metrics = {
      'train/loss': cross_entropy,
      'train/bad_steps': new.bad_steps,
      'train/bad_in_a_row': in_a_row,
      'grad/l2': l2,
      'grad/l1': optax.tree.norm(grads, ord=1),
      'optim/lr': rate,
      'param/l2': optax.tree.norm(state.params),
      **{f'optim/{k}': traced['optimizer'][k] for k in follow.parse(config)},
    }
    if config.log_nuclear_norm:
      metrics['grad/nuclear'] = norms.nuclear(grads, model.axes)
    if config.diagnostics:
      metrics |= _diagnostics(config, model, state, grads, l2, rate, traced)
    return new, metrics

  return train_step


def build_eval(config: ConfigDict, model: Model) -> Callable[..., jax.Array]:
  """Returns `eval_step(params, tokens_BS) -> mean cross-entropy in nats`."""

  def eval_step(params, tokens_BS):
    return _loss(config, model, params, tokens_BS, 0.0).cross_entropy

  return eval_step


def _loss(config, model, params, tokens_BS, z_loss):
  return loss.next_token(
    model,
    params,
    tokens_BS,
    z_loss=z_loss,
    softcap=config.model.logit_softcap,
    chunk=config.model.loss_chunk,
  )


def _gradient(config, model, params, tokens_BS, traced, shardings):
  """Returns the mean gradient over the batch and the mean cross-entropy."""

  def objective(params, tokens):
    out = _loss(config, model, params, tokens, traced['z_loss'])
    return out.loss, out.cross_entropy

  def gradient(params, tokens):
    grads, aux = jax.grad(objective, has_aux=True)(params, tokens)
    if shardings is not None:
      grads = jax.lax.with_sharding_constraint(grads, shardings)
    return grads, aux

  slices = config.grad_accum_steps
  if slices == 1:
    return gradient(params, tokens_BS)
  # Slices are strided, so that each has rows of every device.
  rows = tokens_BS.shape[0] // slices
  tokens = tokens_BS.reshape(rows, slices, -1).swapaxes(0, 1)

  def add(total, tokens):
    return jax.tree.map(jnp.add, total, gradient(params, tokens)), None

  zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
  total, _ = jax.lax.scan(add, zero, tokens)
  return jax.tree.map(lambda x: x / slices, total)


def _update(config, model, state, grads, l2, rate, traced):
  updates, opt_state = _transform(config, model, state, grads, l2, rate, traced)
  return optax.apply_updates(state.params, updates), opt_state


def _transform(config, model, state, grads, l2, rate, traced):
  clip = traced['clip_norm']
  scale = jnp.where(clip > 0, jnp.minimum(1.0, clip / (l2 + 1e-6)), 1.0)
  grads = jax.tree.map(lambda g: g * scale, grads)
  tx = spec.build(
    'optimizers',
    config.optimizer,
    rate,
    model.axes,
    traced['learning_rate'],
    floats=traced['optimizer'],
  )
  return tx.update(grads, state.opt_state, state.params)


def _diagnostics(config, model, state, grads, l2, rate, traced):
  def update(floats):
    changed = {**traced, 'optimizer': floats}
    return _transform(config, model, state, grads, l2, rate, changed)[0]

  return diagnostics.measure(
    config,
    model.axes,
    state.params,
    state.opt_state,
    update,
    (rate, traced['learning_rate']),
    traced['optimizer'],
  )


def _running_mean(config, state, params):
  """Averages the iterates s < t <= s + every_steps, s a multiple of it.

  A function of the step alone: saving a checkpoint does not change the state.
  """
  if not config.checkpoint.mean:
    return ()
  n = (state.step % config.checkpoint.every_steps).astype(jnp.float32)
  average = lambda m, x: jnp.where(n == 0, x, m + (x - m) / (n + 1))
  return jax.tree.map(average, state.mean, params)
