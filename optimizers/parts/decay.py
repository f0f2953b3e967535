"""Weight decay: what it means, stated and implemented here and nowhere else.

Every optimizer ends in `descend`. With u the descent direction of the method
(u -> x - lr u), lr the learning rate of this step, peak the largest one of the
run and wd the knob `weight_decay`, one step subtracts from a parameter x

  decay           lr u plus                   changes with
  'decoupled'     lr wd x                     lr (AdamW of Optax and PyTorch)
  'independent'   (lr / peak) wd x            the schedule's shape, not its peak
  'corrected'     lr wd (lr / peak) x         lr^2: AdamC, 2506.02285
  'coupled'       0; the gradient gets wd x   whatever the method makes of it
  'none'          0
  'cautious', ... lr wd x in some entries     lr: see decay_masks.py

wd may follow a schedule in each mode, in a run by `follow`: 'decoupled' and wd
times lr / peak is 'corrected', 'cautious' and wd times lr / peak its cautious
form. Decay acts on matrices, embeddings and heads, not on vectors (norm
scales). If no axes are given, an optimizer treats all leaves alike and decays
them all. Axes may give a leaf a learning rate, with the same peak / lr, and wd
of its own: lr_scale lr and decay_scale wd.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimizers.parts import choices, decay_masks, roles

PyTree = Any
Rate = float | jax.Array | optax.Schedule

MODES = (
  'decoupled',
  'independent',
  'corrected',
  'coupled',
  'none',
  *decay_masks.MODES,
)


class ScheduledState(NamedTuple):
  """Wraps the state when the learning rate is a schedule of the own count."""

  count: jax.Array
  inner: optax.OptState


def descend(
  method: optax.GradientTransformation,
  learning_rate: Rate,
  axes: PyTree | None = None,
  peak: float | jax.Array | None = None,
  *,
  weight_decay: float | jax.Array,
  decay: str,
) -> optax.GradientTransformation:
  """Completes a method: decay, then the learning rate and the sign.

  Args:
    method: maps gradients to u, the direction to subtract (`scale_by_...`).
    learning_rate: a number, a traced scalar or an Optax schedule.
    axes: tree of axes like the parameters (`parts/roles.py`), or None.
    peak: largest learning rate of the run; None stands for `learning_rate`.
    weight_decay: wd of the table above, a number or a traced scalar.
    decay: one of MODES; 'random:0.5' stands for any probability.

  Returns:
    A transformation whose updates are added to the parameters. Its state is
    that of `method`, inside a RandomState if the decay is masked at random.
    Moments are float32 or wider also for bfloat16 parameters, because
    bfloat16(0.999) is 1.

  Raises:
    ValueError: an unknown mode, or a schedule without `peak` where it matters.
  """
  check(decay, learning_rate, peak)
  if callable(learning_rate):
    return scheduled(
      lambda lr: descend(
        method, lr, axes, peak, weight_decay=weight_decay, decay=decay
      ),
      learning_rate,
    )

  shrink = rate(decay, weight_decay, learning_rate, peak)
  mode = decay_masks.canonical(decay)

  def before(g, x, a):
    decays = mode == 'coupled' and _decays(axes, a)
    return g + _times(a.decay_scale, weight_decay) * x if decays else g

  def after(path, u, x, g, a, count):
    lr = _times(a.lr_scale, learning_rate)
    if mode in ('coupled', 'none') or not _decays(axes, a):
      return -lr * u
    if mode in decay_masks.MODES:
      key = decay_masks.key(count, path)
      x, u = decay_masks.masked(decay, x, u, g, batch=a.batch, key=key)
    return -lr * (u + _times(own(decay, a), shrink) * x)

  def update(updates, state, params=None):
    if params is None and jax.tree.leaves(updates):
      raise ValueError('update() needs the parameters, for the weight decay.')
    meaning = roles.of(params, axes)
    count = state.count if mode in decay_masks.RANDOM else None
    inner = state if count is None else state.inner
    x = widen(params)
    g = jax.tree.map(before, widen(updates), x, meaning)
    u, inner = method.update(g, inner, x)
    updates = jax.tree_util.tree_map_with_path(
      lambda path, *leaf: after(path, *leaf, count), u, x, g, meaning
    )
    if count is None:
      return updates, inner
    return updates, decay_masks.RandomState(optax.safe_increment(count), inner)

  def init(params):
    state = method.init(widen(params))
    if mode not in decay_masks.RANDOM:
      return state
    return decay_masks.RandomState(jnp.zeros((), jnp.int32), state)

  return optax.GradientTransformation(init, update)


def own(decay: str, axes: roles.Axes) -> float:
  """Returns the factor of `rate` that is a leaf's own."""
  if decay == 'independent':
    return axes.decay_scale / axes.lr_scale  # of the leaf's own peak
  return axes.decay_scale


def _times(factor, x):
  return x if factor == 1 else factor * x


def _decays(axes, leaf):
  return axes is None or leaf.role != 'vector'


def check(decay: str, learning_rate: Rate, peak: float | None) -> None:
  """Raises ValueError, one sentence, for what `descend` refuses."""
  choices.check('decay', decay_masks.canonical(decay), MODES)
  needs_peak = decay in ('independent', 'corrected')
  if callable(learning_rate) and peak is None and needs_peak:
    raise ValueError(
      f"decay='{decay}' needs peak, the largest learning rate, because "
      'learning_rate is a schedule.'
    )


def scheduled(
  make: Callable[[jax.Array], optax.GradientTransformation],
  schedule: optax.Schedule,
) -> optax.GradientTransformation:
  """Builds `make(schedule(count))` at each step, by a count of its own."""

  def init(params):
    count = jnp.zeros((), jnp.int32)
    return ScheduledState(count, make(schedule(count)).init(params))

  def update(updates, state, params=None):
    lr = schedule(state.count)
    updates, inner = make(lr).update(updates, state.inner, params)
    count = optax.safe_increment(state.count)
    return updates, ScheduledState(count, inner)

  return optax.GradientTransformation(init, update)


def widen(tree: PyTree) -> PyTree:
  """Casts leaves below float32 to float32."""
  return jax.tree.map(
    lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), tree
  )


def scaled(learning_rate: Rate | None, ratio: float | jax.Array) -> Rate | None:
  """Returns ratio * learning_rate for a number, tracer, schedule or None."""
  if learning_rate is None:
    return None
  if callable(learning_rate):
    return lambda count: ratio * learning_rate(count)
  return ratio * learning_rate


def rate(
  decay: str,
  weight_decay: float | jax.Array,
  learning_rate: float | jax.Array,
  peak: float | jax.Array | None,
) -> float | jax.Array:
  """Returns what multiplies x in u + ... x, before the learning rate does."""
  peak = jnp.asarray(learning_rate if peak is None else peak)
  safe = jnp.where(peak == 0, 1, peak)  # a peak of 0 never moves anything
  if decay == 'independent':
    return jnp.where(peak == 0, 0, weight_decay / safe)
  if decay == 'corrected':
    return weight_decay * learning_rate / safe
  return weight_decay
