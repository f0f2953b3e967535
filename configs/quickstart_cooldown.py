"""The last 200 steps of the quickstart again, with a real linear cooldown.

A branch: it begins with the parameters and the optimizer state of step 800 of
`runs/quickstart` and takes the same batches, at a decaying learning rate.

  python -m launch.train --config=configs/quickstart_cooldown.py \\
      --workdir=runs/quickstart-cooldown
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(arg: str = '') -> ConfigDict:
  c = quickstart.get_config(f'schedule=wsd,{arg}' if arg else 'schedule=wsd')
  c.branch = 'runs/quickstart@800'
  c.schedule.decay = 0.2
  return c
