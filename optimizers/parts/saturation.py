"""How much of what the decay of Lion and Lion-K asks for has been reached."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import kernels, roles
from optimizers.parts.decay import own

Array = jax.Array


def measure(
  name: str,
  params: Any,
  state: Any,
  axes: Any,
  *,
  weight_decay: Array | float,
  decay: str = 'decoupled',
  epsilon: Array | float = 1.0,
  relative: bool = False,
) -> dict[str, Array]:
  """Measures parameters x by the K* of their kernel, and the gap to it.

  `state` is that of Lion or Lion-K, possibly wrapped, with mu as it was before
  the step; `weight_decay` is `decay.rate` of the mode `decay`. With wd that
  times what is the parameter's own, for each role R that decays:

    lion/saturated/R  share of entries with wd |x| > 0.95
    lion/max/R        largest wd |x|: for 'l1' the bound is 1
    lion/gap/R        sum of K(mu) + K*(wd x) + wd <mu, x>, which is 0 at the
                      least (Fenchel, Young), over the sum of K(mu); where K* is
                      infinite it is left out
    lion/inside/R     share of parameters, each layer one, where K* is finite
  """
  if decay in ('none', 'coupled'):
    return {}
  found: dict[str, list] = {}
  mu = optax.tree_utils.tree_get(state, 'mu')

  def leaf(x, m, a):
    if axes is not None and a.role == 'vector':
      return
    kernel, view, dims = kernels.arrange(name, m, a)
    y = kernels.arrange(name, own(decay, a) * weight_decay * x, a)[1]
    e = kernels.scale(name, m, a, epsilon, relative)
    inner = jnp.sum(view * y, axis=dims, keepdims=True)
    value = kernel.value(view, e, dims)
    gap = value + kernel.conjugate(y, e, dims) + inner
    inside = jnp.isfinite(gap)
    sums = jnp.array([
      jnp.sum(jnp.abs(y) > 0.95), y.size,
      jnp.sum(jnp.where(inside, gap, 0)), jnp.sum(jnp.where(inside, value, 0)),
      jnp.sum(inside), inside.size,
    ])  # fmt: skip
    found.setdefault(a.role, []).append((sums, jnp.max(jnp.abs(y))))

  jax.tree.map(leaf, params, mu, roles.of(params, axes))
  out = {}
  for role, pairs in found.items():
    saturated, size, gap, value, inside, count = sum(s for s, _ in pairs)
    out |= {
      f'lion/saturated/{role}': saturated / size,
      f'lion/max/{role}': jnp.max(jnp.stack([top for _, top in pairs])),
      f'lion/gap/{role}': gap / jnp.where(value > 0, value, 1),
      f'lion/inside/{role}': inside / count,
    }
  return out
