"""The train state: all that a step reads and writes, and a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm import averages as averages_lib
from lm import spec
from lm.errors import UserError, did_you_mean, of_code
from lm.model import Model

_PARTS = 'optimizers.parts'
PROJECTIONS = ('', 'nap')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A pytree; every leaf is an array.

  step: int32, updates done so far; the only step counter of a run.
  params, opt_state: of the model and of the optimizer. Of a schedule-free
    method the parameters are x, the mean; gradients are taken elsewhere.
  mean: float32 mean of the iterates since the last multiple of
    `checkpoint.every_steps`; an empty tuple when the config switches it off.
  bad_steps: int32, non-finite steps skipped so far.
  bad_in_a_row: int32, those of them since the last good step.
  averages: more averages of the iterates, by name (lm/averages.py); empty when
    the config switches them off.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  mean: Any
  bad_steps: jax.Array
  bad_in_a_row: jax.Array
  averages: dict[str, Any] = dataclasses.field(default_factory=dict)

  def replace(self, **fields: Any) -> 'TrainState':
    return dataclasses.replace(self, **fields)


def init(
  config: ConfigDict,
  model: Model,
  key: jax.Array,
  params: Any = None,
  *,
  traced: Any = None,
) -> TrainState:
  """Returns the state at step 0; pure, so that it can be jitted and sharded.

  Args:
    config: of the run.
    model: as `lm.model.build` makes it.
    key: of the initial parameters.
    params: to begin with, in place of random ones; an optimizer may keep them.
    traced: see `optimizer`.
  """
  given = params is not None
  params = jax.tree.map(jnp.copy, params) if given else model.init(key)
  rate = (traced or config)['learning_rate']
  tx = optimizer(config, model.axes, rate, traced)
  zero = jnp.zeros((), jnp.int32)
  # A copy: the same buffer twice in a donated state is an error.
  mean = jax.tree.map(jnp.copy, params) if config.checkpoint.mean else ()
  averages = averages_lib.init(config, params)
  return TrainState(zero, params, tx.init(params), mean, zero, zero, averages)


def optimizer(
  config: ConfigDict, axes: Any, rate: Any, traced: Any = None
) -> optax.GradientTransformation:
  """Builds the optimizer of a run and what is wrapped around it.

  Args:
    config: of the run.
    axes: of the model.
    rate: learning rate of this step.
    traced: `step.floats(config)`, or None for the numbers of the config.
  """
  knobs = traced or config
  tx = spec.build(
    'optimizers',
    config.optimizer,
    rate,
    axes,
    knobs['learning_rate'],
    floats=traced and traced['optimizer'],
  )
  tx = _checked(tx, config.optimizer.name)
  if config.spectral_penalty:
    wrap = spec.get(_PARTS, 'spectral_penalty')
    tx = wrap(tx, axes, knobs['spectral_penalty'])
  if config.project:
    tx = spec.get(_PARTS, config.project)(tx, axes)
  return tx


def _checked(tx, name):
  """The same, but its mistakes are sentences that name its file."""
  path = f'optimizers/{name}.py'
  if not isinstance(tx, optax.GradientTransformation):
    raise UserError(
      f'{path}: {name}() must return an optax.GradientTransformation, not '
      f'{tx!r:.40}.'
    )

  def init(params):
    with of_code(path):
      return tx.init(params)

  def update(updates, state, params=None, **extra):
    with of_code(path):
      found = tx.update(updates, state, params, **extra)
    if not isinstance(found, tuple) or len(found) != 2:
      raise UserError(
        f'{path}: update must return (updates, state), not {type(found)}.'
      )
    _check_alike(f'{path}: the updates', found[0], updates)
    _check_alike(f'{path}: the state after an update', found[1], state)
    return found

  return optax.GradientTransformationExtraArgs(init, update)


def _check_alike(what, found, before):
  """Else a shape would be broadcast, or the error be one of `lax.cond`."""
  new, old = (
    {
      jax.tree_util.keystr(k): f'{jnp.result_type(x)}{[*jnp.shape(x)]}'
      for k, x in leaves
    }
    for leaves in map(jax.tree_util.tree_leaves_with_path, (found, before))
  )
  if new == old and jax.tree.structure(found) == jax.tree.structure(before):
    return
  for place in sorted({*new, *old}):
    a, b = new.get(place, 'nothing'), old.get(place, 'nothing')
    if a != b:
      raise UserError(f'{what} must have {b} at {place}, as before, not {a}.')
  raise UserError(f'{what} must have the structure that it had before.')


def unwrapped(config: ConfigDict, opt_state: Any) -> Any:
  """Returns the state of the optimizer alone."""
  for _ in filter(None, (config.spectral_penalty, config.project)):
    opt_state = opt_state.inner
  return opt_state


def check(config: ConfigDict) -> None:
  """Refuses settings that the optimizer would ignore or undo."""
  name = config.optimizer.name
  for field, value, needed in (
    ('normalize_decay', config.normalize_decay, 'weight_decay'),
    ('model.base_width', config.model.base_width, 'axes'),
  ):
    if value and not spec.takes('optimizers', name, needed):
      raise UserError(
        f'{field}={value} would do nothing: optimizers/{name}.py takes no '
        f'{needed}.'
      )
  if config.project not in PROJECTIONS:
    raise UserError(
      f"project='{config.project}' does not exist."
      + did_you_mean(config.project, PROJECTIONS)
    )
  if config.qk_clip and config.model.qk_norm:
    raise UserError(
      f'qk_clip={config.qk_clip} would do nothing: with model.qk_norm=True the '
      'scores do not depend on the size of W_q and W_k; set one of them.'
    )
  if config.qk_clip and config.project:
    raise UserError(
      f"qk_clip={config.qk_clip} would not hold: project='{config.project}' "
      'gives W_q and W_k back the norm that it takes; set one of them.'
    )
  elsewhere = spec.extra('optimizers', name, 'train_params')
  for knob in ('project', 'qk_clip'):
    if config[knob] and elsewhere:
      raise UserError(
        f'{knob}={config[knob]!r} changes parameters after the update, but '
        f'those of {name} are a mean; use another optimizer.'
      )
