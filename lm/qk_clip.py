"""QK-clip: a bound of the attention scores, kept by rescaling W_q and W_k."""

from typing import Any

import jax
import jax.numpy as jnp


def clip(params: Any, max_logits: Any, tau: float | jax.Array) -> Any:
  """Rescales the heads whose scores exceeded tau (2507.20534, algorithm 1).

  With S the largest score of a head in the batch before the update, the head's
  scores are multiplied by gamma = min(1, tau / S): W_q and W_k each by
  sqrt(gamma), or, if several heads share a key, their W_q by gamma, which
  leaves the other heads of the group as they are. But for what the update
  itself changed, the first layer's scores of the same batch are then at most
  tau; those of later layers also change with what the layers before give.

  Args:
    params: of the model, after the update.
    max_logits: a tree with S in place of each attention layer, from
      `Model.probe`: (H,), or (N, H) of scanned layers.
    tau: positive.
  """
  if 'max_logits' in max_logits:
    return {**params, **_scaled(params, max_logits['max_logits'], tau)}
  below = {k: clip(params[k], v, tau) for k, v in max_logits.items()}
  return {**params, **below}


def largest(max_logits: Any) -> jax.Array:
  """Returns the largest score of all heads and layers."""
  return jnp.stack([x.max() for x in jax.tree.leaves(max_logits)]).max()


def _scaled(attention, s_H, tau):
  gamma_H = jnp.where(s_H > tau, tau / s_H, 1.0)
  q_DHK, k_DGK = attention['q'], attention['k']  # perhaps after N layers
  if q_DHK.shape != k_DGK.shape:
    return {'q': q_DHK * gamma_H[..., None, :, None]}
  factor = jnp.sqrt(gamma_H)[..., None, :, None]
  return {'q': q_DHK * factor, 'k': k_DGK * factor}
