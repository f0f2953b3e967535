"""Scion: steps of fixed size in a norm that fits each kind of parameter."""

import math

import jax
import jax.numpy as jnp
import optax

from optimizers.muon import scale_by_muon
from optimizers.parts import hybrid, roles
from optimizers.parts.decay import descend


def width_power() -> dict[str, float]:
  """Of the rate over the width (lm/width.py).

  The spectral norm of matrices is constant; the rest is divided by d_model
  below, and logits there again.
  """
  return {'matrix': 0.0, 'embedding': 1.0, 'head': 1.0}


def scion(
  learning_rate,
  axes=None,
  peak=None,
  *,
  momentum: float = 0.9,
  radius: float = 50.0,
  head_radius: float = 3000.0,
  ns_steps: int = 5,
  coefficients: str = 'keller',
  ns_dtype: str = 'float32',
  weight_decay: float = 1.0,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Scion (2502.07529, algorithm 2); weight_decay = 0 is algorithm 1.

    M <- momentum M + (1 - momentum) G;  u by the role:
    matrix           radius sqrt(fan_out / fan_in) NewtonSchulz(M)
    embedding, head  head_radius sign(M) / d_model
    vector           M / RMS(M)

  With weight_decay = 1, radius bounds the norm of x. Learning rates are near
  2^-12. State: count, momentum; ema of the rest.
  Differs from the paper: vectors, of radius 1, do not decay; an embedding has
  the radius of the head also where it is not, as in the authors' example, one
  matrix with it.
  """

  def complete(method, mine):
    return descend(
      method,
      learning_rate,
      mine,
      peak,
      weight_decay=weight_decay,
      decay=decay,
    )

  def matrices(mine):
    direction = scale_by_muon(
      mine,
      momentum=momentum,
      nesterov=False,
      scale='spectral',
      coefficients=coefficients,
      steps=ns_steps,
      dtype=ns_dtype,
    )
    return complete(optax.chain(direction, optax.scale(radius)), mine)

  def rest(mine):
    average = optax.ema(momentum, debias=False)
    lmo = optax.stateless(lambda m, _: _lmo(m, mine, head_radius))
    return complete(optax.chain(average, lmo), mine)

  return hybrid.split(axes, matrices, rest)


def _lmo(momenta, axes, head_radius):
  def one(m, a):
    if a.role != 'vector':
      sides = a.inputs if a.role == 'head' else a.outputs
      return head_radius / math.prod(m.shape[i] for i in sides) * jnp.sign(m)
    dims = tuple(i for i in range(m.ndim) if i not in a.batch)
    square = jnp.mean(m**2, axis=dims, keepdims=True)
    return m / jnp.sqrt(jnp.where(square > 0, square, 1))

  return jax.tree.map(one, momenta, roles.of(momenta, axes))
