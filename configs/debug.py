"""A run of seconds, for tests and for a first look at a new optimizer.

python -m launch.train --config=configs/debug.py:optimizer=lion --workdir=runs/a
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = '') -> ConfigDict:
  c = base.get_config(arg, size='debug')
  c.num_steps = 40
  c.eval.every_steps = 20
  c.eval.num_sequences = 16
  c.eval.batch_size = 8
  c.checkpoint.every_steps = 10
  return c
