"""The size of an orthogonal update, from fan-in and fan-out."""

import math

from optimizers.parts import choices, roles

SCALES = {
  # Keller Jordan's: tall updates are enlarged, wide ones left alone.
  'keller': lambda fan_in, fan_out: math.sqrt(max(1, fan_out / fan_in)),
  # Moonlight, 2502.16982, equation 4: entries have the RMS of AdamW's, 0.2.
  'moonlight': lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
  # Bernstein: the update changes RMS norms of activations by at most lr.
  'spectral': lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
}


def check(scale: str) -> None:
  """Raises ValueError, one sentence, for a scale that does not exist."""
  choices.check('scale', scale, SCALES)


def factor(scale: str, shape: tuple[int, ...], axes: roles.Axes) -> float:
  """Returns what multiplies the update of a parameter with these axes."""
  fan_in = math.prod(shape[i] for i in axes.inputs)
  fan_out = math.prod(shape[i] for i in axes.outputs)
  return SCALES[scale](fan_in, fan_out)
