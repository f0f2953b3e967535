r"""Does a refined schedule beat the linear decay? Made to refute it.

Claim of arXiv 2310.07831 (algorithm 1, sections 4 and 5): the schedule that the
gradient norms of a run ask for trains better than a linear decay.

  python -m launch.train --config=configs/debug.py:schedule=linear \
      --workdir=runs/a
  python -m launch.refine --run=runs/a
  python -m launch.sweep --config=runs/a/schedules/refute.py \
      --workdir=runs/a-refute

Both schedules get the same learning rates (1/2 to 8 times that of the run: a
refined schedule has less area, so that its best peak is higher), steps and
seeds. Compare the best of each over the rates, in the mean over the seeds. If
the best is at an end of the rates, the comparison is not finished.

Measured with --config.num_steps=400 --config.eval.num_sequences=512 and two
seeds, best validation loss over the five rates: linear 2.322 (2.319, 2.325) at
3e-3, refined 2.359 (2.275, 2.443) at 1.2e-2. Linear won in the mean, within the
spread of the seeds; at the same rate of 3e-3 it won clearly (2.322 to 2.479).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import debug, resolved
from lm import spec
from lm.errors import UserError, did_you_mean

FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)  # of the run's learning rate


def get_config(arg: str = '') -> ConfigDict:
  """Takes 'run=DIRECTORY,schedule=linear' or 'schedule=refined'.

  Without a run, the first one is trained: configs/debug.py.
  """
  choice = spec.parse(arg, run='', schedule='linear')
  names = {'linear': 'linear', 'refined': 'table'}
  if choice['schedule'] not in names:
    hint = did_you_mean(choice['schedule'], names)
    raise UserError(f"schedule='{choice['schedule']}' is not compared.{hint}")
  run, name = choice['run'], names[choice['schedule']]
  if not run:
    return debug.get_config(f'schedule={name}')
  c = resolved.get_config(f'{run}/config.json:schedule={name}')
  if name == 'table':
    c.schedule.path = f'{run}/schedules/refined.npz'
  c.branch = ''
  return c


def sweep(arg: str = '', num_seeds: int = 3) -> dict[str, dict[str, Any]]:
  """Returns all runs; both schedules have equal numbers of them."""
  peak = get_config(arg).learning_rate
  return {
    f'{schedule}-lr{peak * factor:.3g}-seed{seed}': {
      'schedule': schedule,
      'learning_rate': peak * factor,
      'seed': seed,
    }
    for schedule in ('linear', 'refined')
    for factor in FACTORS
    for seed in range(num_seeds)
  }
