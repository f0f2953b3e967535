r"""A trial of a method in seconds, for launch.compare.

  python -m launch.compare --workdir=runs/compare --method=adamw --method=muon

Long enough that the order of methods is not that of the first steps: 1.0M
bytes of the Python standard library's source code, a linear decay to zero. Only
the last checkpoint is kept, and no interval means.
"""

from ml_collections import ConfigDict

from configs import base
from lm import spec


def get_config(arg: str = '') -> ConfigDict:
  choice = spec.parse(arg, size='nano', optimizer='adamw', schedule='linear')
  c = base.get_config(','.join(f'{k}={v}' for k, v in choice.items()))
  c.num_steps = 500
  if 'warmup' in c.schedule:
    c.schedule.warmup = 0.05
  c.eval.every_steps = 50
  c.eval.num_sequences = 256
  c.checkpoint.every_steps = 100
  c.checkpoint.keep_latest = 1
  c.checkpoint.mean = False
  return c
