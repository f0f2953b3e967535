"""One training step and one evaluation step: pure functions, no I/O."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lm import (
  averages,
  diagnostics,
  follow,
  loss,
  norms,
  qk_clip,
  sharding,
  spec,
)
from lm import state as state_lib
from lm.errors import UserError, of_code
from lm.model import Model
from lm.state import TrainState

OPTIONAL = ('linearity', 'qk_clip', 'spectral_penalty')


def floats(config: ConfigDict) -> dict[str, Any]:
  """Returns the traced numbers of a run: settings that share a compilation."""
  return {
    'learning_rate': config.learning_rate,
    'clip_norm': config.clip_norm,
    'z_loss': config.z_loss,
    # Off is another program, which costs nothing.
    **{k: config[k] for k in OPTIONAL if config[k]},
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
  """Returns the multiplier of every update, float64 (num_steps,).

  Raises:
    UserError: a schedule that is not traceable, or leaves [0, 1].
  """
  traced = floats(config)['schedule']
  one = lambda s: multiplier(config, s, traced)
  return values(one, config.num_steps, config.schedule.name)


def check_schedules(config: ConfigDict) -> None:
  """Raises UserError for schedules that refuse their knobs; runs nothing."""
  check_schedule(config.schedule, config.num_steps)
  for _, schedule in follow.parse(config).values():
    if schedule is not config.schedule:
      check_schedule(schedule, config.num_steps)


def check_schedule(schedule: Mapping[str, Any], num_steps: int) -> None:
  """Traces a schedule as a run does: of the step and its float knobs.

  Raises:
    UserError: what it raises, or it returns anything but one number.
  """

  def one(step, traced):
    found = spec.build('schedules', schedule, num_steps, floats=traced)
    if not callable(found):
      raise UserError(f'{file} must return a function, not {found}.')
    return found(step)

  file = f'schedules/{schedule["name"]}.py'
  with of_code(file):
    found = jax.eval_shape(one, 0, spec.floats('schedules', schedule))
  if getattr(found, 'shape', None) != ():
    raise UserError(f'{file}: the multiplier must be one number, not {found}.')


def values(schedule: Callable[..., Any], num_steps: int, name: str) -> Any:
  """Returns schedule(0), ..., schedule(num_steps - 1), checked, float64."""
  steps = np.arange(num_steps, dtype=np.int32)
  with of_code(f'schedules/{name}.py'):
    found = np.asarray(jax.jit(jax.vmap(schedule))(steps), np.float64)
  bad = np.flatnonzero(~((found >= 0) & (found <= 1 + 1e-6)))
  if bad.size or not found.any():
    at = f'at step {bad[0]} is {found[bad[0]]:g}' if bad.size else 'is always 0'
    raise UserError(
      f'schedules/{name}.py: the multiplier {at}; legal: 0 to 1, as the peak '
      'is the largest rate.'
    )
  return found


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
  train/ and grad/ are those where the gradient is taken (`_hook`).
  """

  def train_step(state, tokens_BS, traced):
    traced = {**traced, 'optimizer': knobs(config, state.step, traced)}
    params = _hook(
      config, traced, 'train_params', state.opt_state, state.params
    )
    gradient = functools.partial(
      _gradient, config, model, grad_shardings, traced, tokens_BS
    )
    grads, cross_entropy, max_logits = gradient(params)
    l2 = optax.tree.norm(grads)
    extra = _previous_grads(config, gradient, state, traced)
    rate = traced['learning_rate'] * multiplier(
      config, state.step, traced['schedule']
    )
    good = jnp.isfinite(cross_entropy) & jnp.isfinite(l2)
    for norm in map(optax.tree.norm, extra.values()):
      good &= jnp.isfinite(norm)

    def transform(traced):
      tx = state_lib.optimizer(config, model.axes, rate, traced)
      clipped = _clipped(grads, l2, traced)
      return tx.update(clipped, state.opt_state, params, **extra)

    def update():
      updates, opt_state = transform(traced)
      new = optax.apply_updates(params, updates)
      if config.qk_clip:
        new = qk_clip.clip(new, max_logits, traced['qk_clip'])
      return _hook(config, traced, 'eval_params', opt_state, new), opt_state

    keep = lambda: (state.params, state.opt_state)
    after, opt_state = jax.lax.cond(good, update, keep)
    in_a_row = jnp.where(good, 0, state.bad_in_a_row + 1)
    new = TrainState(
      step=state.step + 1,
      params=after,
      opt_state=opt_state,
      mean=averages.interval_mean(config, state.mean, state.step, after),
      bad_steps=state.bad_steps + jnp.where(good, 0, 1),
      bad_in_a_row=in_a_row,
      averages=averages.update(config, state.averages, state.step, after),
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
    if config.qk_clip:
      metrics['optim/max_logit'] = qk_clip.largest(max_logits)
    if config.log_nuclear_norm:
      metrics['grad/nuclear'] = norms.nuclear(grads, model.axes)
    if config.diagnostics:
      metrics |= _diagnostics(
        config, model, state, params, transform, rate, traced
      )
    return new, metrics

  return train_step


def build_eval(config: ConfigDict, model: Model) -> Callable[..., jax.Array]:
  """Returns `eval_step(params, tokens_BS) -> mean cross-entropy in nats`."""

  def eval_step(params, tokens_BS):
    return _loss(config, model, params, tokens_BS).cross_entropy

  return eval_step


def _loss(config, model, params, tokens_BS, **knobs):
  return loss.next_token(
    model,
    params,
    tokens_BS,
    **knobs,
    softcap=config.model.logit_softcap,
    chunk=config.model.loss_chunk,
  )


def _gradient(config, model, shardings, traced, tokens_BS, params):
  """Means over the batch: gradient, cross-entropy; maxima: attention scores."""
  knobs = {'z_loss': traced['z_loss']}
  if config.linearity:
    knobs['linearity'] = traced['linearity']
  if config.qk_clip:
    knobs['probes'] = ('max_logits',)

  def objective(params, tokens):
    out = _loss(config, model, params, tokens, **knobs)
    return out.loss, (out.cross_entropy, out.probes.get('max_logits', {}))

  def gradient(params, tokens):
    grads, aux = jax.grad(objective, has_aux=True)(params, tokens)
    if shardings is not None:
      grads = jax.lax.with_sharding_constraint(grads, shardings)
    return grads, aux

  slices = config.grad_accum_steps or sharding.fitting_slices(*tokens_BS.shape)
  if slices == 1:
    grads, (cross_entropy, max_logits) = gradient(params, tokens_BS)
    return grads, cross_entropy, max_logits
  # Slices are strided, so that each has rows of every device.
  rows = tokens_BS.shape[0] // slices
  tokens = tokens_BS.reshape(rows, slices, -1).swapaxes(0, 1)

  def add(total, tokens):
    grads, (cross_entropy, max_logits) = gradient(params, tokens)
    total = jax.tree.map(jnp.add, total, (grads, cross_entropy))
    return total, max_logits

  zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
  total, max_logits = jax.lax.scan(add, zero, tokens)
  mean = jax.tree.map(lambda x: x / slices, total)
  return *mean, jax.tree.map(lambda x: x.max(0), max_logits)


def _previous_grads(config, gradient, state, traced):
  """The gradient of this batch elsewhere, for methods that ask for it.

  They define `previous_params(opt_state, *, knobs)`, and their `update` takes
  previous_grads. It is clipped by its own norm, as the authors of MARS do.
  """
  opt_state = state_lib.unwrapped(config, state.opt_state)
  params = spec.hook(
    'optimizers', config.optimizer, 'previous_params', opt_state
  )
  if params is None:
    return {}
  grads, *_ = gradient(params)
  return {'previous_grads': _clipped(grads, optax.tree.norm(grads), traced)}


def _hook(config, traced, function, opt_state, params):
  """Calls a function of the optimizer's file, if there is one, on `params`.

  `train_params` gives the parameters at which to take the gradient, and
  `eval_params` its inverse, with the optimizer's state after the update. So a
  schedule-free run trains y, and all that is not the step sees x.
  """
  found = spec.hook(
    'optimizers',
    config.optimizer,
    function,
    state_lib.unwrapped(config, opt_state),
    params,
    floats=traced['optimizer'],
  )
  return params if found is None else found


def _clipped(grads, l2, traced):
  clip = traced['clip_norm']
  scale = jnp.where(clip > 0, jnp.minimum(1.0, clip / (l2 + 1e-6)), 1.0)
  return jax.tree.map(lambda g: g * scale, grads)


def _diagnostics(config, model, state, params, transform, rate, traced):
  update = lambda floats: transform({**traced, 'optimizer': floats})[0]

  return diagnostics.measure(
    config,
    model.axes,
    params,
    state_lib.unwrapped(config, state.opt_state),
    update,
    (rate, traced['learning_rate']),
    traced['optimizer'],
  )
