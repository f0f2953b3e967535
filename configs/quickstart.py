r"""A first loss curve in seconds, and material to emulate any decay from it.

  make demo            or, by hand:
  python -m launch.train --workdir=runs/quickstart
  python -m launch.emulate --run=runs/quickstart

A byte-level transformer on the Python standard library's own source code, at
constant learning rate, with a checkpoint and an interval mean every 50 steps.
"""

from ml_collections import ConfigDict

from configs import base
from lm import spec


def get_config(arg: str = '') -> ConfigDict:
  choice = spec.parse(arg, size='nano', optimizer='adamw', schedule='constant')
  c = base.get_config(','.join(f'{k}={v}' for k, v in choice.items()))
  c.num_steps = 1000
  if choice['schedule'] == 'constant':
    c.schedule.warmup_steps = 50
  c.eval.every_steps = 100
  c.eval.num_sequences = 256
  c.checkpoint.every_steps = 50
  return c
