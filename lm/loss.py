"""Next-token cross-entropy, in slices that never hold all logits."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from lm import model as model_lib


class Loss(NamedTuple):
  """Means over all predicted tokens, float32 scalars, in nats.

  loss: cross_entropy + z_loss * z, what is minimised.
  cross_entropy: -log p(token).
  z: logsumexp(logits)^2 (PaLM, Chowdhery et al. 2022, section 5).
  """

  loss: jax.Array
  cross_entropy: jax.Array
  z: jax.Array


def next_token(
  model: model_lib.Model,
  params: Any,
  tokens_BS: jax.Array,
  *,
  z_loss: float | jax.Array = 0.0,
  softcap: float = 0.0,
  chunk: int = 0,
) -> Loss:
  """Predicts columns 1.. of `tokens_BS` from those before them.

  Args:
    tokens_BS: S = T + 1 tokens per sequence.
    z_loss: weight of z; may be traced.
    softcap: bound of the logits, 0 for none.
    chunk: tokens per slice (all devices together) for which logits exist at
      one time, forward and backward; 0 = all.
  """
  h_BTD = model.hidden(params, tokens_BS[:, :-1])
  kernel_DV = model.head(params)
  targets_BT = tokens_BS[:, 1:]
  batch, time, dim = h_BTD.shape
  if not chunk or chunk >= batch * time:
    ce, z = _sums(h_BTD, kernel_DV, targets_BT, jnp.ones(()), softcap)
  else:
    steps = max(1, chunk // batch)  # slices in time: the batch stays sharded
    num = -(-time // steps)
    pad = num * steps - time

    def slices(x):
      x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
      return x.reshape(batch, num, steps, *x.shape[2:]).swapaxes(0, 1)

    xs = slices(h_BTD), slices(targets_BT), slices(jnp.ones((batch, time)))
    one = jax.checkpoint(
      lambda h, t, w: _sums(h, kernel_DV, t, w, softcap), prevent_cse=False
    )
    init = jnp.zeros(()), jnp.zeros(())
    (ce, z), _ = jax.lax.scan(
      lambda s, x: (jax.tree.map(jnp.add, s, one(*x)), None), init, xs
    )
  ce, z = ce / (batch * time), z / (batch * time)
  return Loss(ce + z_loss * z, ce, z)


def _sums(h_BTD, kernel_DV, targets_BT, weights_BT, softcap):
  logits_BTV = model_lib.logits(h_BTD, kernel_DV, softcap=softcap)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  # A comparison, not a gather: its gradient is no scatter, and the vocabulary
  # may be sharded.
  hit_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
  right_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)
  return (
    jnp.sum(weights_BT * (lse_BT - right_BT)),
    jnp.sum(weights_BT * lse_BT**2),
  )
