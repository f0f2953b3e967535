"""Phases of a run in integer steps: exact, traceable, float32.

A multiplier computed inside jit from constants must equal, bit for bit, the
one from traced floats and the one from plain Python. Hence three habits here:
steps are subtracted as integers (float32 loses them above 2^24); a denominator
takes part in what XLA cannot know, because it multiplies by the reciprocal of a
constant; no product is added to directly, because XLA fuses that to an FMA.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SLACK = 1e-6  # of warmup + decay > 1: the rounding of float32 knobs


def concrete(x: Any) -> float | None:
  """Returns the value of a number, None for a traced one."""
  try:
    return float(x)
  except jax.errors.ConcretizationTypeError:
    return None


def check_steps(num_steps: int) -> None:
  """Refuses a run without steps."""
  if num_steps < 1:
    raise ValueError(f'num_steps={num_steps} must be at least 1.')


def check_fractions(**knobs: Any) -> None:
  """Refuses concrete knobs outside [0, 1]; traced ones pass."""
  for name, x in knobs.items():
    value = concrete(x)
    if value is not None and not 0 <= value <= 1:
      raise ValueError(f'{name}={value} must be a fraction in [0, 1].')


def check_durations(**knobs: Any) -> None:
  """Refuses durations outside [0, 1] or, together, longer than the run."""
  check_fractions(**knobs)
  values = [concrete(x) for x in knobs.values()]
  if None not in values and sum(values) > 1 + _SLACK:
    terms = ' + '.join(f'{k}={v}' for k, v in zip(knobs, values, strict=True))
    raise ValueError(f'{terms} is longer than the run; the sum is at most 1.')


def to_steps(fraction: Any, num_steps: int) -> Any:
  """Returns round(fraction * num_steps), an int or a traced int32.

  A half is rounded to even, in float32 whether traced or not.
  """
  value = concrete(fraction)
  if value is not None:
    return int(np.rint(np.float32(value) * np.float32(num_steps)))
  steps = jnp.float32(fraction) * jnp.float32(num_steps)
  return jnp.clip(jnp.rint(steps).astype(jnp.int32), 0, num_steps)


def split(num_steps: int, warmup: Any, decay: Any) -> tuple[Any, Any]:
  """Returns the steps of warm-up and of decay, together at most num_steps."""
  num_warmup = to_steps(warmup, num_steps)
  num_decay = to_steps(decay, num_steps)
  left = num_steps - num_warmup
  if isinstance(num_warmup, int) and isinstance(num_decay, int):
    return num_warmup, min(num_decay, left)
  return num_warmup, jnp.minimum(num_decay, left)


def ratio(count: Any, total: Any) -> jax.Array:
  """Returns count / total in float32, integers >= 0; 0 for total = 0."""
  count = jnp.asarray(count, jnp.int32)
  sign = lax.shift_right_logical(count, 31)  # 0, which XLA does not know
  nonzero = jnp.maximum(total, 1) | sign
  x = count.astype(jnp.float32) / nonzero.astype(jnp.float32)
  return jnp.where(jnp.asarray(total) > 0, x, 0.0)


def elapsed(step: Any, start: Any, length: Any) -> jax.Array:
  """Returns the fraction of [start, start + length] gone: 0 before, 1 after.

  An empty phase never begins: 0 for length = 0.
  """
  step = jnp.asarray(step, jnp.int32)
  return ratio(jnp.clip(step - start, 0, length), length)


def warm_up(step: Any, num_warmup: Any) -> jax.Array:
  """Returns (step + 1) / num_warmup, then 1: step 0 is never wasted."""
  step = jnp.asarray(step, jnp.int32)
  done = ratio(jnp.minimum(step, num_warmup - 1) + 1, num_warmup)
  return jnp.where(step < num_warmup, done, 1.0)


def hyperbola(step: Any, start: Any, timescale: Any) -> jax.Array:
  """Returns timescale / (timescale + step - start), 1 before `start`."""
  after = jnp.maximum(jnp.asarray(step, jnp.int32) - start, 0)
  # Past the largest int32 the sum would be negative.
  total = jnp.minimum(after, 2**31 - 1 - timescale) + timescale
  return ratio(timescale, total)


def blend(low: Any, high: Any, x: jax.Array) -> jax.Array:
  """Returns low + (high - low) * x for x in [0, 1]."""
  low = jnp.float32(low)
  span = jnp.float32(high) - low
  part = jnp.clip(span * x, jnp.minimum(span, 0.0), jnp.maximum(span, 0.0))
  return low + part


def floored(shape_value: jax.Array, final: Any) -> jax.Array:
  """Returns final + (1 - final) * shape_value: a decay to a floor."""
  return blend(final, 1.0, shape_value)


def decay(num_steps, num_warmup, num_decay, curve, final):
  """Returns multiplier(step): warm-up, the peak, `curve` down to `final`."""
  start = num_steps - num_decay

  def multiplier(step):
    x = elapsed(step, start, num_decay)
    return jnp.minimum(warm_up(step, num_warmup), floored(curve(x), final))

  return multiplier


def power(x: jax.Array, exponent: Any) -> jax.Array:
  """Returns x^exponent for x in [0, 1] and an exponent > 0.

  By log and exp: XLA rewrites a power with a constant exponent.
  """
  root = jnp.exp(jnp.float32(exponent) * jnp.log(jnp.maximum(x, 1e-38)))
  return jnp.where(x > 0, root, 0.0)
