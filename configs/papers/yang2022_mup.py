r"""Does the best learning rate of one width hold for others, as muP says?

Claim of arXiv 2203.03466 (section 4, figure 1): with the rates, initial values
and multipliers of muP, the best learning rate does not move with the width;
without, it falls. Here on a byte-level transformer of two layers, d_model 64 to
256, with heads and d_ff in proportion.

  python -m launch.sweep --config=configs/papers/yang2022_mup.py \
      --workdir=runs/mup

30 runs, 13 minutes beside other work. Measured, one seed: with muP the best of
six rates is 3e-3 at all three widths; without, 3e-3, 1.5e-3 and 7.5e-4, the
lowest. Not seen: that wider is better at the transferred rate; at 256 it is
2.150, and at 7.5e-4 without a rule 1.966 (300 steps of 1,024 tokens).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import compare

BASE = 64
WIDTHS = (64, 128, 256)
RATES = tuple(7.5e-4 * 2**i for i in range(6))


def get_config(arg: str = '') -> ConfigDict:
  c = compare.get_config(arg)
  c.num_steps, c.batch_size = 300, 8
  c.eval.every_steps = 0
  return c


def sweep(arg: str = '') -> dict[str, dict[str, Any]]:
  """Returns {name of a run: its fields}; at BASE both rules are one."""
  del arg  # is that of get_config
  model = lambda width, base: {
    'model.d_model': width,
    'model.num_heads': width // 16,
    'model.num_kv_heads': width // 16,
    'model.d_ff': 11 * width // 4,
    'model.base_width': base,
  }
  return {
    f'{"mup" if base else "none"}-d{width}-lr{rate:g}': {
      **model(width, base),
      'learning_rate': rate,
    }
    for base in (0, BASE)
    for width in (WIDTHS[1:] if base else WIDTHS)
    for rate in RATES
  }
