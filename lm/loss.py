"""Next-token cross-entropy, in slices that never hold all logits."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from lm import linear, sharding
from lm.model import Model


class Loss(NamedTuple):
  """Means over all predicted tokens, float32 scalars, in nats.

  loss: cross_entropy + z_loss * z + linearity * (1 - mean cosine), minimised.
  cross_entropy: -log p(token).
  z: logsumexp(logits)^2 (PaLM, Chowdhery et al. 2022, section 5).
  probes: what `Model.probe` found, {} if nothing was asked for.
  """

  loss: jax.Array
  cross_entropy: jax.Array
  z: jax.Array
  probes: Any = None


def next_token(
  model: Model,
  params: Any,
  tokens_BS: jax.Array,
  *,
  z_loss: float | jax.Array = 0.0,
  linearity: float | jax.Array | None = None,
  probes: tuple[str, ...] = (),
  softcap: float = 0.0,
  chunk: int = 0,
) -> Loss:
  """Predicts columns 1.. of `tokens_BS` from those before them.

  Args:
    tokens_BS: S = T + 1 tokens per sequence.
    z_loss: weight of z; may be traced.
    linearity: weight of 1 - the mean cosine between a block's input and output
      (2405.12250, section 6: makes layers less linear); may be traced.
    probes: names of `lm.model.PROBES` to return.
    softcap: bound of the logits, 0 = none; static.
    chunk: tokens, per device, whose logits exist at one time, forward and
      backward (at least one per sequence); 0 = all.
  """
  if linearity is not None:
    probes = (*probes, 'cosine')
  h_BTD, found = model.probe(params, tokens_BS[:, :-1], probes)
  kernel_DV, targets_BT = model.head(params), tokens_BS[:, 1:]
  batch, time = targets_BT.shape
  steps = chunk * sharding.num_shards('batch') // batch
  if not chunk or steps >= time:
    sums = _sums(h_BTD, kernel_DV, targets_BT, jnp.ones(time), softcap)
  else:
    kernel_DV = sharding.constrain(kernel_DV, None, 'vocab')  # gathered once
    sums = _in_slices(h_BTD, kernel_DV, targets_BT, max(1, steps), softcap)
  cross_entropy, z = (x / (batch * time) for x in sums)
  total = cross_entropy + z_loss * z
  if linearity is not None:
    cosines = jnp.stack([x.mean() for x in jax.tree.leaves(found['cosine'])])
    total += linearity * (1 - cosines.mean())
  return Loss(total, cross_entropy, z, found)


def _in_slices(h_BTD, kernel_DV, targets_BT, steps, softcap):
  """Slices of the time, not of the flat tokens: each has rows of all devices.

  Backward computes the logits of a slice again.
  """
  time = targets_BT.shape[1]
  num = -(-time // steps)

  def split(x, axis):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, num * steps - time)
    shape = (*x.shape[:axis], num, steps, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis, 0)

  @jax.checkpoint
  def add(totals, slices):
    h, targets, weights = slices
    sums = _sums(h, kernel_DV, targets, weights, softcap)
    return jax.tree.map(jnp.add, totals, sums), None

  slices = split(h_BTD, 1), split(targets_BT, 1), split(jnp.ones(time), 0)
  return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), slices)[0]


def _sums(h_BTD, kernel_DV, targets_BT, weights_T, softcap):
  h_LD = h_BTD.reshape(-1, h_BTD.shape[-1])
  logits_LV = linear.logits(h_LD, kernel_DV, softcap=softcap)
  lse_L = jax.nn.logsumexp(logits_LV, axis=-1)
  # A comparison, not a gather: its gradient is no scatter, and the vocabulary
  # may be sharded.
  hit_LV = targets_BT.reshape(-1, 1) == jnp.arange(logits_LV.shape[-1])
  right_L = jnp.sum(jnp.where(hit_LV, logits_LV, 0.0), axis=-1)
  weights_L = jnp.broadcast_to(weights_T, targets_BT.shape).reshape(-1)
  nll = jnp.sum(weights_L * (lse_L - right_L))
  return nll, jnp.sum(weights_L * lse_L**2)
