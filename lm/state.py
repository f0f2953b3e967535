"""The train state: all that a step reads and writes, and a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm import averages as averages_lib
from lm import spec
from lm.model import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A pytree; every leaf is an array.

  step: int32, updates done so far; the only step counter of a run.
  params, opt_state: of the model and of the optimizer.
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
  config: ConfigDict, model: Model, key: jax.Array, params: Any = None
) -> TrainState:
  """Returns the state at step 0; pure, so that it can be jitted and sharded.

  Args:
    config: of the run.
    model: as `lm.model.build` makes it.
    key: of the initial parameters.
    params: to begin with, in place of random ones; an optimizer may keep them.
  """
  given = params is not None
  params = jax.tree.map(jnp.copy, params) if given else model.init(key)
  rate = config.learning_rate
  tx = spec.build('optimizers', config.optimizer, rate, model.axes, rate)
  zero = jnp.zeros((), jnp.int32)
  # A copy: the same buffer twice in a donated state is an error.
  mean = jax.tree.map(jnp.copy, params) if config.checkpoint.mean else ()
  averages = averages_lib.init(config, params)
  return TrainState(zero, params, tx.init(params), mean, zero, zero, averages)
