"""Averages of the iterates in the train state: the interval mean and others.

Each is an item of every checkpoint, sharded like the parameters; none costs
anything when it is off. They are functions of the step alone, so that saving
changes nothing and a resumed run is the same run.

- 'mean' (config.checkpoint.mean): of the iterates after one checkpoint, up to
  the next.
- 'moment' (config.checkpoint.moment): the iterates of the interval, weighted by
  their place in it: sum_j j theta_j / sum_j j. With the interval mean it gives
  every decay that is quadratic inside the intervals exactly.
- 'ema_0.05' (config.checkpoint.ema): the power EMA of Karras et al.
  (2312.02696) of relative width 0.05: the weight of theta_s after step t is
  (s/t)^(g+1) - ((s-1)/t)^(g+1).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.errors import UserError

WIDEST = 0.288  # of the uniform mean since the start: 1/sqrt(12)


def gammas(config: ConfigDict) -> dict[str, float]:
  """Returns {'ema_0.05': exponent g} of the trackers of a config.

  Raises:
    UserError: a width that is not a number or out of range, or repeated.
  """
  found = {}
  for text in filter(None, config.checkpoint.ema.split(',')):
    try:
      width = float(text)
    except ValueError:
      width = 0.0
    name = f'ema_{width}'
    if not 0 < width <= WIDEST or name in found:
      raise UserError(
        f"checkpoint.ema='{config.checkpoint.ema}': '{text}' is repeated or is "
        f'not a relative width; legal: numbers above 0 up to {WIDEST}, by '
        'commas, for example 0.05,0.1.'
      )
    found[name] = gamma(width)
  return found


def gamma(width: float) -> float:
  """Returns g with width^2 = (g+1) / ((g+2)^2 (g+3)) (2312.02696, eq. 126)."""
  t = width**-2
  return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def init(config: ConfigDict, params: Any) -> dict[str, Any]:
  """Returns the averages at step 0; the first update replaces them."""
  if config.checkpoint.moment and not config.checkpoint.mean:
    raise UserError('checkpoint.moment=True needs checkpoint.mean=True.')
  names = ['moment'] * config.checkpoint.moment + [*gammas(config)]
  return {name: jax.tree.map(jnp.copy, params) for name in names}


def interval_mean(
  config: ConfigDict, mean: Any, step: jax.Array, params: Any
) -> Any:
  """Returns the mean of the iterates s < t <= s + n, s a multiple of n steps.

  A function of the step alone: saving a checkpoint does not change the state.

  Args:
    config: of the run.
    mean: that before; an empty tuple if there is none.
    step: updates done before.
    params: the iterate after the next.
  """
  if not config.checkpoint.mean:
    return ()
  n = (step % config.checkpoint.every_steps).astype(jnp.float32)
  average = lambda m, x: jnp.where(n == 0, x, m + (x - m) / (n + 1))
  return jax.tree.map(average, mean, params)


def update(
  config: ConfigDict, old: dict[str, Any], step: jax.Array, params: Any
) -> dict[str, Any]:
  """Returns the averages with `params`, the iterate after `step`, added."""
  weights = {
    name: -jnp.expm1((g + 1) * jnp.log1p(-1 / (step + 1.0)))
    for name, g in gammas(config).items()
  }
  if config.checkpoint.moment:
    place = step % config.checkpoint.every_steps + 1.0
    weights['moment'] = 2 / (place + 1)
  return {
    name: jax.tree.map(
      lambda m, x, w=weights[name]: jnp.where(w == 1, x, m + w * (x - m)),
      tree,
      params,
    )
    for name, tree in old.items()
  }
