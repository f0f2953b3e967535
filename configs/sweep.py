r"""How sensitive is the loss to the learning rate? For launch.sweep.

python -m launch.sweep --workdir=runs/sweep
"""

from typing import Any

from configs import compare

get_config = compare.get_config


def sweep(arg: str = '') -> dict[str, dict[str, Any]]:
  """Returns {name of a run: its choices and fields}."""
  del arg  # is that of get_config
  return {
    f'{name}-lr{rate:g}': {'optimizer': name, 'learning_rate': rate}
    for name in ('adamw', 'muon')
    for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
  }
