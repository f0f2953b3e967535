"""Validation loss on the fixed set of sequences."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import mesh as mesh_lib
from lm import step as step_lib
from lm.data import Data
from lm.errors import UserError
from lm.model import Model


def build(
  config: ConfigDict, model: Model, data: Data, mesh: jax.sharding.Mesh
) -> Callable[[Any], dict[str, jax.Array]]:
  """Returns `evaluate(params) -> {'eval/loss': nats per token, ...}`.

  The values are device arrays that may not be computed yet. Every evaluation of
  every run with the same data and eval settings sees the same tokens.
  """
  losses = build_losses(config, model, data, mesh)

  def evaluate(params):
    loss = losses(params).mean()
    metrics = {'eval/loss': loss}
    if data.bytes_per_token is not None:
      metrics['eval/bits_per_byte'] = loss / math.log(2) / data.bytes_per_token
    return metrics

  return evaluate


def build_losses(
  config: ConfigDict, model: Model, data: Data, mesh: jax.sharding.Mesh
) -> Callable[[Any], jax.Array]:
  """Returns `losses(params)`: the mean loss of each validation batch."""
  size = config.eval.batch_size
  mesh_lib.check_batch(mesh, 'eval.batch_size', size)
  if len(data.eval_tokens_ES) % size:
    raise UserError(
      f'eval.num_sequences={len(data.eval_tokens_ES)} must be a multiple of '
      f'eval.batch_size={size}.'
    )
  sharding = mesh_lib.batch_sharding(mesh)
  batches = []
  for tokens_BS in np.split(
    data.eval_tokens_ES, len(data.eval_tokens_ES) // size
  ):
    read = tokens_BS.__getitem__
    batches.append(
      jax.make_array_from_callback(tokens_BS.shape, sharding, read)
    )
  eval_step = jax.jit(step_lib.build_eval(config, model))

  def losses(params):
    with jax.set_mesh(mesh):
      return jax.numpy.stack([eval_step(params, b) for b in batches])

  return losses
