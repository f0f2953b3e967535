r"""What each option of configs/base.py does to the loss. For launch.sweep.

  python -m launch.sweep --config=configs/options.py --workdir=runs/options

AdamW, three rates around its best (README), three seeds, an option at a time;
each has its own best rate. NaP stands instead of weight decay, as in its paper,
with the norms of both initial values. 126 runs of 22 s on one core; see
benchmarks/RESULTS.md.
"""

from typing import Any

from configs import compare

get_config = compare.get_config

_NAP = {'project': 'nap', 'optimizer.weight_decay': 0.0}
_TWO = {'model.gated': False, 'model.d_ff': 264}
OPTIONS = {
  'none': {},
  'no-decay': {'optimizer.weight_decay': 0.0},
  'nap': _NAP,
  'nap-orthogonal': {**_NAP, 'model.init': 'orthogonal'},
  'spectral': {'spectral_penalty': 1e-3},
  'linearity': {'linearity': 0.1},
  'qk-clip': {'qk_clip': 10.0},
  'z-loss': {'z_loss': 1e-4},
  'orthogonal': {'model.init': 'orthogonal'},
  'zero': {'model.init': 'zero'},
  'isometric': {'model.init': 'isometric'},
  # Two matrices of 1.5 times the width: as many parameters.
  'gelu': {**_TWO, 'model.activation': 'gelu'},
  'relu2': {**_TWO, 'model.activation': 'relu2'},
  'geglu': {'model.activation': 'gelu'},
}


def sweep(arg: str = '') -> dict[str, dict[str, Any]]:
  """Returns {name of a run: its choices and fields}."""
  del arg  # is that of get_config
  return {
    f'{name}-lr{rate:g}-seed{seed}': {
      **option,
      'learning_rate': rate,
      'seed': seed,
    }
    for name, option in OPTIONS.items()
    for rate in (3e-3, 6e-3, 1.2e-2)
    for seed in range(3)
  }
