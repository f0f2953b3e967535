"""Schedule-free AdamW: the mean of the iterates in place of a schedule."""

import optax

from optimizers.parts import schedule_free
from optimizers.parts.decay import check, descend, scheduled


def schedule_free_adamw(
  learning_rate,
  axes=None,
  peak=None,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  decay: str = 'decoupled',
) -> optax.GradientTransformation:
  """Schedule-free AdamW (2405.15682, algorithm 1).

    z moves by AdamW(b1 = 0) with the gradient at the parameters y;
    x is the mean of z;  y = (1 - b1) z + b1 x

  Use a constant learning rate after a warm-up; b1 > 0. A run takes gradients
  at y; what it evaluates, saves and averages is x. Alone, this trains y:
  evaluate `eval_params`. Decay acts at y.
  State: z, weight_sum, max_lr, inner (that of AdamW).
  Differs from the paper: b2 and weight_decay are those of adamw.py, so that the
  two are compared at equal knobs; no warm-up of its own.
  """
  if isinstance(b1, int | float) and b1 <= 0:
    raise ValueError(f'b1={b1} must exceed 0: x is found from y and z by it.')
  if callable(learning_rate):
    check(decay, learning_rate, peak)
    return scheduled(
      lambda lr: schedule_free_adamw(
        lr,
        axes,
        peak,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        decay=decay,
      ),
      learning_rate,
    )
  step = descend(
    optax.scale_by_adam(0.0, b2, eps),
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
  )
  return schedule_free.schedule_free(step, learning_rate, b1)


def eval_params(state, params, *, b1: float):
  """Returns x, the parameters to evaluate, from y, those that are trained."""
  return schedule_free.eval_params(state, params, b1)


def train_params(state, params, *, b1: float):
  """Returns y from x."""
  return schedule_free.train_params(state, params, b1)
