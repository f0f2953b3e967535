"""Muon: momentum whose singular values are all set to one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import choices, hybrid, newton_schulz, roles, shape_scale


class MuonState(NamedTuple):
  count: jax.Array
  momentum: Any


def muon(
  learning_rate,
  axes=None,
  peak=None,
  *,
  momentum: float = 0.95,
  nesterov: bool = True,
  ns_steps: int = 5,
  coefficients: str = 'keller',
  ns_dtype: str = 'float32',
  ns_form: str = 'direct',
  scale: str = 'keller',
  heads: str = 'joint',
  bias_correction: bool = False,
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
  adam_lr_ratio: float = 0.2,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """Muon (Jordan 2024) for hidden matrices, AdamW for all other parameters.

    B <- momentum B + (1 - momentum) G
    u = scale * NewtonSchulz((1 - momentum) G + momentum B)   [B if no nesterov]

  Embeddings, heads and vectors: AdamW(b1, b2, eps) at adam_lr_ratio times the
  learning rate. heads='split' treats each head of q, k and v as a matrix.
  bias_correction weighs B and G as optax.contrib.muon does: other directions
  in the first steps. ns_form='gram': fewer flops for wide matrices.
  State: count, momentum; count, mu, nu of AdamW.
  Differs from the paper: decay; the products are float32 unless ns_dtype says;
  what is added to norms is 1e-8, not 1e-7.
  """
  choices.check('heads', heads, ('joint', 'split'))

  def method(axes):
    return scale_by_muon(
      axes,
      momentum=momentum,
      nesterov=nesterov,
      bias_correction=bias_correction,
      scale=scale,
      heads=heads,
      coefficients=coefficients,
      steps=ns_steps,
      dtype=ns_dtype,
      form=ns_form,
    )

  return hybrid.with_adamw(
    method,
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
    adam_lr_ratio=adam_lr_ratio,
    b1=b1,
    b2=b2,
    eps=eps,
  )


def scale_by_muon(
  axes: Any,
  *,
  momentum: float | jax.Array,
  nesterov: bool,
  scale: str,
  bias_correction: bool = False,
  gradient_share: float | jax.Array | None = None,
  heads: str = 'joint',
  sign: bool = False,
  **newton_schulz_knobs: Any,
) -> optax.GradientTransformation:
  """The direction of Muon; every leaf must be a matrix or a stack of them.

  `sign` orthogonalizes the signs of the momentum (AdaMuon); `gradient_share`
  mixes that much gradient into it (MARS-M), as 1 - momentum does with nesterov
  and 0 without. The other knobs
  are those of `muon` and of `newton_schulz.orthogonalize`.
  """
  shape_scale.check(scale)
  newton_schulz.check(**newton_schulz_knobs)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return MuonState(jnp.zeros((), jnp.int32), zeros)

  def update(updates, state, params=None):
    del params
    meaning = roles.of(updates, axes)
    if heads == 'split':
      meaning = jax.tree.map(roles.split_heads, meaning)
    t = state.count + 1
    now, before = 1 - momentum, momentum  # weights of gradient and momentum
    buffer = jax.tree.map(
      lambda g, m: now * g + before * m, updates, state.momentum
    )
    mixed = buffer
    if nesterov:
      if bias_correction:
        now = now / (1 - momentum**t)
        before = before / (1 - momentum ** (t + 1))
    elif gradient_share is not None:
      now, before = gradient_share, 1 - gradient_share
    if nesterov or gradient_share is not None:
      mixed = jax.tree.map(lambda g, m: now * g + before * m, updates, buffer)
    if sign:
      mixed = jax.tree.map(jnp.sign, mixed)
    u = newton_schulz.orthogonalize_tree(mixed, meaning, **newton_schulz_knobs)
    u = jax.tree.map(
      lambda o, a: shape_scale.factor(scale, o.shape, a) * o, u, meaning
    )
    return u, MuonState(t, buffer)

  return optax.GradientTransformation(init, update)
