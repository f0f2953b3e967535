"""What a run logs about weight decay, per role of parameters, if asked to.

Tags end in a role R: matrix, embedding, head or vector. With x the parameters
of the logged step and dx the change that follows:

  param/rms/R        root of the mean of x^2
  update/relative/R  norm(dx) / norm(x), the rotation per step
  decay/active/R     share of the entries that decay: of 'cautious', its mask
  decay/ratio/R      norm(the part of dx that is decay) / norm(dx)

For AdamW and gradients that are noise they tend to sqrt(lr / (2 wd)) and
sqrt(2 lr wd (1 - b1) / (1 + b1)) (2305.17212): the check of a long run that
decay is wired as meant. What is decay is measured, by the same update without
it, whatever the mode and the optimizer. An optimizer's file may add its own
tags in a function `diagnostics`, as lion.py does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm import spec


def measure(
  config: ConfigDict,
  axes: Any,
  params: Any,
  opt_state: Any,
  update: Callable[[dict[str, Any]], Any],
  rates: tuple[Any, Any],
  floats: dict[str, Any],
) -> dict[str, jax.Array]:
  """Returns the metrics above.

  Args:
    config: of the run.
    axes: of the parameters.
    params: before the update.
    opt_state: before the update.
    update: maps floats of the optimizer to dx.
    rates: the learning rate of the step, and the peak.
    floats: the optimizer's, for this step.
  """
  dx = update(floats)
  none = {'weight_decay': jnp.zeros(())} if 'weight_decay' in floats else {}
  plain = update({**floats, **none})
  sums: dict[str, list] = {}

  def leaf(a, x, dx, plain):
    part = plain - dx
    squares = [jnp.sum(y.astype(jnp.float32) ** 2) for y in (x, dx, part)]
    noise = 2 * jnp.finfo(dx.dtype).eps * jnp.abs(plain)  # of fused products
    row = jnp.stack([*squares, jnp.sum(jnp.abs(part) > noise), x.size])
    sums.setdefault(a.role, []).append(row)

  jax.tree.map(leaf, axes, params, dx, plain)
  found = {}
  for role, rows in sums.items():
    x2, dx2, part2, active, size = sum(rows)
    found |= {
      f'param/rms/{role}': jnp.sqrt(x2 / size),
      f'update/relative/{role}': _ratio(dx2, x2),
      f'decay/active/{role}': active / size,
      f'decay/ratio/{role}': _ratio(part2, dx2),
    }
  own = spec.hook(
    'optimizers', config.optimizer, 'diagnostics', params, opt_state, axes,
    *rates, floats=floats,
  )  # fmt: skip
  return {**found, **(own or {})}


def _ratio(a, b):
  """Root of a / b; 0 where nothing moves."""
  return jnp.sqrt(a / jnp.where(b > 0, b, 1))
