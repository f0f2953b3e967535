"""Lion-K: Lion with any convex function in place of the absolute value."""

import jax
import jax.numpy as jnp
import optax

from optimizers.lion import LionState
from optimizers.parts import choices, kernels, roles
from optimizers.parts.decay import descend


def lion_k(
  learning_rate,
  axes=None,
  peak=None,
  *,
  kernel: str = 'huber',
  epsilon: float = 1.0,
  relative: bool = True,
  b1: float = 0.9,
  b2: float = 0.99,
  weight_decay: float = 1.0,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Lion-K (2310.05898, equation 4), in the sign of gradient descent.

    c = b1 mu + (1 - b1) g;  u = grad K(c);  mu <- b2 mu + (1 - b2) g

  kernel: see parts/kernels.py; 'l1' is Lion. epsilon is the e of a kernel, in
  units of the RMS of c if relative ('topk': a fraction of the entries). Bounds
  on x hold for 0 < b1 <= b2 < 1. State: mu.
  Differs from the paper: the relative epsilon.
  """
  choices.check('kernel', kernel, kernels.KERNELS)
  gradient = kernels.KERNELS[kernel].gradient

  def direction(g, mu, a):
    c = (1 - b1 / b2) * g + b1 / b2 * mu  # with the new mu, as in lion.py
    whole = tuple(i for i in range(g.ndim) if i not in a.batch)
    e = epsilon
    if relative and kernel != 'topk':
      rms = jnp.sqrt(jnp.mean(c**2, axis=whole, keepdims=True))
      e = epsilon * jnp.where(rms > 0, rms, 1)
    grouped = kernel == 'group' and a.role != 'vector'
    return gradient(c, e, tuple(a.inputs) if grouped else whole)

  def init(params):
    return LionState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    mu = jax.tree.map(lambda g, m: (1 - b2) * g + b2 * m, updates, state.mu)
    u = jax.tree.map(direction, updates, mu, roles.of(updates, axes))
    return u, LionState(mu)

  return descend(
    optax.GradientTransformation(init, update),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
