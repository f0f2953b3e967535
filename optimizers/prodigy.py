"""Prodigy: AdamW that estimates its own learning rate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts.decay import check, descend, scaled, scheduled


class ProdigyState(NamedTuple):
  count: jax.Array
  scaled_mu: Any  # of d g: no mean of gradients, for a branch to carry over
  scaled_nu: Any
  start: Any  # x0
  gradient_sum: Any  # s
  numerator: jax.Array  # r
  d: jax.Array


def prodigy(
  learning_rate=1.0,
  axes=None,
  peak=None,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  d0: float = 1e-6,
  safeguard_warmup: bool = False,
  weight_decay: float = 0.0,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Prodigy (2306.06101, algorithm 4): Adam with step lr d; use lr = 1.

    r <- b3 r + lr' d^2 <g, x0 - x>;  s <- b3 s + lr' d^2 g,  b3 = sqrt(b2)
    d_new = max(d, r / |s|_1);  mu, nu as Adam's, of d g
    x <- x - lr' d mu / (sqrt(nu) + d_new eps);  d <- d_new
    lr' = lr sqrt(1 - b2^t) / (1 - b1^t)

  safeguard_warmup: s without lr', for a learning rate that starts near 0.
  Decay is lr d weight_decay x. State: count, scaled_mu, scaled_nu, start,
  gradient_sum, numerator, d.
  Differs from the paper: the bias correction, as in Optax; no d without s.
  """
  check(decay, learning_rate, peak)
  if callable(learning_rate):
    knobs = {'b1': b1, 'b2': b2, 'eps': eps, 'd0': d0, 'decay': decay}
    knobs |= {'safeguard_warmup': safeguard_warmup}
    return scheduled(
      lambda lr: prodigy(lr, axes, peak, weight_decay=weight_decay, **knobs),
      learning_rate,
    )
  method = _direction(learning_rate, b1, b2, eps, d0, safeguard_warmup)

  def complete(d):
    return descend(
      method,
      scaled(learning_rate, d),
      axes,
      scaled(peak, d),
      weight_decay=weight_decay,
      decay=decay,
    )

  def update(updates, state, params=None):
    inner = getattr(state, 'inner', state)  # of a decay masked at random
    return complete(inner.d).update(updates, state, params)

  return optax.GradientTransformation(complete(d0).init, update)


def _direction(lr, b1, b2, eps, d0, safeguard_warmup):
  """Maps gradients to u, of which the step is lr d u with the old d."""
  b3 = b2**0.5

  def init(params):
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(3)]
    zero = jnp.zeros((), jnp.result_type(float))
    start = jax.tree.map(jnp.array, params)
    d = jnp.asarray(d0, zero.dtype)
    count = jnp.zeros((), jnp.int32)
    return ProdigyState(count, *zeros[:2], start, zeros[2], zero, d)

  def update(g, state, x):
    t, d = state.count + 1, state.d
    correction = (1 - b2**t) ** 0.5 / (1 - b1**t)
    # Divided by d0^2, which keeps them in the range of float32.
    weight = (d / d0) ** 2
    rate = lr * correction
    own = weight if safeguard_warmup else weight * rate
    ema = lambda b, power: lambda m, g: b * m + (1 - b) * (d * g) ** power
    mu = jax.tree.map(ema(b1, 1), state.scaled_mu, g)
    nu = jax.tree.map(ema(b2, 2), state.scaled_nu, g)
    s = jax.tree.map(lambda s, g: b3 * s + own * g, state.gradient_sum, g)
    away = jax.tree.map(jnp.subtract, state.start, x)
    r = b3 * state.numerator + weight * rate * optax.tree.vdot(g, away)
    total = optax.tree.norm(s, ord=1)
    new = jnp.maximum(d, r / jnp.where(total > 0, total, jnp.inf))
    u = jax.tree.map(
      lambda m, v: correction * m / (jnp.sqrt(v) + new * eps), mu, nu
    )
    cast = lambda new, old: jnp.asarray(new, old.dtype)
    return u, ProdigyState(
      t, mu, nu, state.start, s, cast(r, state.numerator), cast(new, d)
    )

  return optax.GradientTransformation(init, update)
