r"""A first loss curve in seconds, and material to emulate any decay from it.

  make demo            or, by hand:
  python -m launch.train --workdir=runs/quickstart
  python -m launch.emulate --run=runs/quickstart

A byte-level transformer on the Python standard library's own source code, at
constant learning rate, with a checkpoint and an interval mean every 50 steps.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = '') -> ConfigDict:
  c = base.get_config(arg, size='nano', schedule='constant')
  c.num_steps = 1000
  if c.schedule.name == 'constant':
    c.schedule.warmup_steps = 50
  c.eval.every_steps = 100
  c.eval.num_sequences = 256
  c.checkpoint.every_steps = 50
  return c
