"""Lion-K: Lion with any convex function in place of the absolute value."""

import numbers

import jax
import jax.numpy as jnp
import optax

from optimizers.lion import LionState
from optimizers.parts import choices, kernels, roles, saturation
from optimizers.parts.decay import descend, rate

_DIVIDE = 'huber', 'logcosh', 'relativistic'
# Of matrices, embedding and head, for kernels whose gradients have no entries
# of one size.
_WIDTH_POWERS = {
  'l2': (0.0, 0.5, 0.5),
  'group': (-0.5, 0.0, 0.5),
  'linf': (0.0, 0.5, 0.5),
  'quadratic': (0.0, 0.0, 0.0),
  'nuclear': (0.0, 0.5, 0.5),
}


def width_power(*, kernel: str, epsilon: float) -> dict[str, float]:
  """Of the rate over the width (lm/width.py), by K's gradient.

  For gradients of low rank, as those of networks are (of 'nuclear' for all), it
  keeps the spectral norm of the update of matrices, and lets that of embedding
  and head grow as m^1/2, as with the sign; 'quadratic' is as SGD.
  """
  found = _WIDTH_POWERS.get(kernel, (-1.0, 0.0, 0.0))
  if kernel == 'lp':  # entries go as (their number)^(1 / p - 1)
    small = 1 - 1 / max(epsilon, 1.0)  # smaller ones are refused
    found = 2 * small - 1, small, small
  return dict(zip(('matrix', 'embedding', 'head'), found, strict=True))


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
  units of the RMS of c if relative ('topk': a fraction of the entries; 'lp':
  the p). The minimum that parts/kernels.py states needs 0 < b1 <= b2 < 1.
  State: mu.
  Differs from the paper: the relative epsilon; the authors choose a decay for
  each task. Where c rounds to 0 its sign can differ from optax.lion's.
  """
  choices.check('kernel', kernel, kernels.KERNELS)
  known = lambda *knobs: all(isinstance(x, numbers.Real) for x in knobs)
  if known(b1, b2) and b1 > b2:
    raise ValueError(
      f'b1={b1} must not exceed b2={b2}: otherwise it is unknown what Lion-K '
      "minimises; optimizer 'lion' takes any two."
    )
  if known(b2) and b2 <= 0:
    raise ValueError(f'b2={b2} must exceed 0: see the algebra of Lion.')
  if known(b1, b2) and not 0 <= b1 <= b2 <= 1:
    raise ValueError(f'b1={b1} and b2={b2} must lie between 0 and 1.')
  if kernel in _DIVIDE and known(epsilon) and epsilon <= 0:
    raise ValueError(
      f"epsilon={epsilon} must exceed 0 for kernel='{kernel}', which divides "
      "by it; its limit is 'l1'."
    )
  if kernel == 'lp' and known(epsilon) and epsilon <= 1:
    raise ValueError(
      f"epsilon={epsilon} must exceed 1 for kernel='lp', whose p it is, for "
      "example 3; p = 1 is 'l1', p = 2 'l2'."
    )

  def direction(g, mu, a):
    c = (1 - b1 / b2) * g + b1 / b2 * mu  # with the new mu, as in lion.py
    e = kernels.scale(kernel, c, a, epsilon, relative)
    k, view, dims = kernels.arrange(kernel, c, a)
    u = k.gradient(view, e, dims)
    if k is kernels.KERNELS['nuclear']:
      return roles.from_matrices(u, a, c.shape)
    return u

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


def diagnostics(
  params, opt_state, axes, learning_rate, peak, *, weight_decay, decay,
  kernel, epsilon, relative,
):  # fmt: skip
  """What a run may log: see parts/saturation.py; e is in units of mu."""
  return saturation.measure(
    kernel,
    params,
    opt_state,
    axes,
    weight_decay=rate(decay, weight_decay, learning_rate, peak),
    decay=decay,
    epsilon=epsilon,
    relative=relative,
  )
