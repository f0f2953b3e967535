r"""A trial of a method in 20 seconds, for launch.compare.

  python -m launch.compare --workdir=runs/compare --method=adamw --method=muon

2M bytes of the Python standard library's source code, a linear decay to zero.
With half of the steps some seeds end on a plateau (benchmarks/RESULTS.md). Only
the last checkpoint is kept, and no means.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = '') -> ConfigDict:
  c = base.get_config(arg, size='nano', schedule='linear')
  c.num_steps = 1000
  if 'warmup' in c.schedule:
    c.schedule.warmup = 0.05
  c.eval.every_steps = 50
  c.eval.num_sequences = 256
  c.checkpoint.every_steps = 100
  c.checkpoint.keep_latest = 1
  c.checkpoint.mean = False
  return c
