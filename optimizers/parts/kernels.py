"""The convex functions K of Lion-K, their gradients and convex conjugates.

Lion-K with decay wd minimises f(x) + K*(wd x) / wd: the kernel is chosen by
what K* makes of the parameters (2310.05898, table 2).

  kernel          K(m)                          K*(wd x) / wd asks for
  'l1'            sum |m|           (Lion)      max |x| <= 1 / wd
  'l2', 'group'   norm(m)                       norm(x) <= 1 / wd
  'lp'            p-norm, p = e > 1             norm(x) <= 1 / wd, of p/(p-1)
  'linf'          max |m|                       sum |x| <= 1 / wd
  'quadratic'     sum m^2 / 2       (momentum)  wd/2 sum x^2
  'soft'          sum max(|m| - e, 0)           e sum |x|, in the box of 'l1'
  'topk'          sum of the k largest |m|      sum |x| <= k / wd, in the box
  'huber'         m^2 / 2e, |m| - e/2 beyond e  e wd/2 sum x^2, in the box
  'relativistic'  sum sqrt(m^2 + e^2)           -e/wd sum sqrt(1 - (wd x)^2)
  'logcosh'       e sum log cosh(m / e)         an entropy, in the box
  'nuclear'       sum of singular values        spectral norm of x <= 1 / wd

'group' is 'l2' for the inputs of each output neuron; all others act on a whole
parameter, each layer of a stack by itself. For 'topk' k is e times the size.
'nuclear' is Muon with an exact polar factor (2506.15054), and 'l2' for vectors.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from optimizers.parts import roles

Dims = tuple[int, ...]
Array = jax.Array
_SLACK = 1 + 1e-6  # of the boundary of a domain, for round-off


class Kernel(NamedTuple):
  """Functions of (array, e, dims): `dims` are reduced and kept with size 1."""

  value: Callable[[Array, Array | float, Dims], Array]
  gradient: Callable[[Array, Array | float, Dims], Array]
  conjugate: Callable[[Array, Array | float, Dims], Array]


def _sum(x, dims):
  return jnp.sum(x, axis=dims, keepdims=True)


def _max(x, dims):
  return jnp.max(jnp.abs(x), axis=dims, keepdims=True)


def _norm(x, dims):
  return jnp.sqrt(_sum(x**2, dims))


def _p_norm(x, dims, p):  # powers of small numbers would be zero in float32
  largest = _max(x, dims)
  return largest * _sum(_over(jnp.abs(x), largest) ** p, dims) ** (1 / p)


def _inside(condition, value):
  """`value` where the condition holds, infinity elsewhere."""
  return jnp.where(condition, value, jnp.inf)


def _box(y, value, dims):
  return _inside(_max(y, dims) <= _SLACK, value)


def _max_gradient(x, e, dims):
  largest = jnp.abs(x) == _max(x, dims)
  return jnp.sign(x) * largest / _sum(largest, dims)


def _over(x, norm):
  return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1), 0)


def _largest(x, e, dims):
  """Returns |x|, how many are chosen and the smallest that is chosen."""
  size = jnp.abs(x)
  last = tuple(range(-len(dims), 0))
  flat = jnp.moveaxis(size, dims, last)
  flat = flat.reshape(*flat.shape[: x.ndim - len(dims)], -1)
  n = flat.shape[-1]
  k = jnp.clip(jnp.round(e * n).astype(jnp.int32), 1, n)
  least = jnp.take(jnp.sort(flat, axis=-1), n - k, axis=-1)
  return size, k, jnp.expand_dims(least, dims)


def _topk_value(x, e, dims):
  size, k, least = _largest(x, e, dims)
  above = jnp.maximum(size - least, 0)
  return _sum(above, dims) + k * least


def _topk_gradient(x, e, dims):
  size, k, least = _largest(x, e, dims)
  above, equal = size > least, size == least
  share = (k - _sum(above, dims)) / _sum(equal, dims)  # of those that tie
  return jnp.sign(x) * jnp.where(above, 1, jnp.where(equal, share, 0))


def _topk_conjugate(y, e, dims):
  _, k, _ = _largest(y, e, dims)
  total = _sum(jnp.abs(y), dims)
  return _box(y, _inside(total <= k * _SLACK, 0.0), dims)


def _singular(x, dims):
  """Returns the decomposition of a stack of matrices in the last two dims."""
  if len(dims) != 2:
    raise ValueError(f"kernel='nuclear' needs 2 dimensions, not {len(dims)}.")
  u, s, v = jnp.linalg.svd(x, full_matrices=False)
  return u, s, v


def _polar(x, e, dims):
  u, s, v = _singular(x, dims)
  return (u * (s > 1e-7 * s[..., :1])[..., None, :]) @ v


_L2 = Kernel(
  lambda x, e, d: _norm(x, d),
  lambda x, e, d: _over(x, _norm(x, d)),
  lambda y, e, d: _inside(_norm(y, d) <= _SLACK, 0.0),
)


def _entropy(y):
  half = (1 + y) / 2
  return xlogy(half, half) + xlogy(1 - half, 1 - half) + jnp.log(2.0)


KERNELS = {
  'l1': Kernel(
    lambda x, e, d: _sum(jnp.abs(x), d),
    lambda x, e, d: jnp.sign(x),
    lambda y, e, d: _box(y, 0.0, d),
  ),
  'l2': _L2,
  'group': _L2,
  'lp': Kernel(
    lambda x, e, d: _p_norm(x, d, e),
    lambda x, e, d: (
      jnp.sign(x) * _over(jnp.abs(x), _p_norm(x, d, e)) ** (e - 1)
    ),
    lambda y, e, d: _inside(_p_norm(y, d, e / (e - 1)) <= _SLACK, 0.0),
  ),
  'linf': Kernel(
    lambda x, e, d: _max(x, d),
    _max_gradient,
    lambda y, e, d: _inside(_sum(jnp.abs(y), d) <= _SLACK, 0.0),
  ),
  'quadratic': Kernel(
    lambda x, e, d: _sum(x**2, d) / 2,
    lambda x, e, d: x,
    lambda y, e, d: _sum(y**2, d) / 2,
  ),
  'soft': Kernel(
    lambda x, e, d: _sum(jnp.maximum(jnp.abs(x) - e, 0), d),
    lambda x, e, d: jnp.where(jnp.abs(x) > e, jnp.sign(x), 0),
    lambda y, e, d: _box(y, e * _sum(jnp.abs(y), d), d),
  ),
  'topk': Kernel(_topk_value, _topk_gradient, _topk_conjugate),
  'huber': Kernel(
    lambda x, e, d: _sum(
      jnp.where(jnp.abs(x) <= e, x**2 / (2 * e), jnp.abs(x) - e / 2), d
    ),
    lambda x, e, d: jnp.clip(x / e, -1, 1),
    lambda y, e, d: _box(y, e / 2 * _sum(y**2, d), d),
  ),
  'relativistic': Kernel(
    lambda x, e, d: _sum(jnp.sqrt(x**2 + e**2), d),
    lambda x, e, d: x / jnp.sqrt(x**2 + e**2),
    lambda y, e, d: _box(
      y, -e * _sum(jnp.sqrt(jnp.maximum(1 - y**2, 0)), d), d
    ),
  ),
  'logcosh': Kernel(
    lambda x, e, d: e * _sum(jnp.logaddexp(x / e, -x / e) - jnp.log(2.0), d),
    lambda x, e, d: jnp.tanh(x / e),
    lambda y, e, d: _box(y, e * _sum(_entropy(jnp.clip(y, -1, 1)), d), d),
  ),
  'nuclear': Kernel(
    lambda x, e, d: _singular(x, d)[1].sum(-1)[..., None, None],
    _polar,
    lambda y, e, d: _inside(
      _singular(y, d)[1].max(-1)[..., None, None] <= _SLACK, 0.0
    ),
  ),
}


def arrange(
  name: str, m: Array, axes: roles.Axes
) -> tuple[Kernel, Array, Dims]:
  """Returns the kernel for a parameter, m as it wants it, and what to reduce.

  Only 'nuclear' wants another shape, that of `roles.to_matrices`.
  """
  whole = tuple(i for i in range(m.ndim) if i not in axes.batch)
  if name == 'nuclear' and axes.role == 'vector':
    return KERNELS['l2'], m, whole
  if name == 'nuclear':
    return KERNELS[name], roles.to_matrices(m, axes), (1, 2)
  if name == 'group' and axes.role != 'vector':
    return KERNELS[name], m, tuple(axes.inputs)
  return KERNELS[name], m, whole


def scale(
  name: str,
  m: Array,
  axes: roles.Axes,
  epsilon: Array | float,
  relative: bool,
) -> Array | float:
  """Returns e: epsilon, or epsilon times the RMS of each matrix of m."""
  if not relative or name in ('topk', 'lp'):
    return epsilon
  whole = tuple(i for i in range(m.ndim) if i not in axes.batch)
  rms = jnp.sqrt(jnp.mean(m**2, axis=whole, keepdims=True))
  return epsilon * jnp.where(rms > 0, rms, 1)
