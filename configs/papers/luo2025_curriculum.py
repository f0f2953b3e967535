r"""Does learning-rate decay waste the best data? CMA and CDMA.

Claim of arXiv 2511.18903: with data sorted by ascending quality, a constant (or
moderately decayed, to a third of the peak) learning rate and an average of the
last six checkpoints beats a shuffled order with a full decay; with a full decay
the order hardly helps, since the best data come at the smallest rate.

  at='--config=configs/papers/luo2025_curriculum.py'
  python -m launch.train $at:order=ascend,schedule=constant --workdir=runs/cma
  python -m launch.merge --run=runs/cma --window=300 --method=uniform
  python -m launch.merge --run=runs/cma --window=300 --method=ema:alpha=0.2
  python -m launch.train $at:order=ascend,schedule=moderate --workdir=runs/cdma
  python -m launch.merge --run=runs/cdma --window=300 --method=from_run
  python -m launch.train $at:order=shuffled,schedule=wsd --workdir=runs/uniform

CMA: `uniform` (SMA) or `ema` in the renormalised form; the recursive form gives
the oldest of six checkpoints .328. CDMA: `from_run` divides by the learning
rates that were used. Any data with scores: --config.data.source=bin,
--config.data.train, --config.data.eval, --config.data.score=file (an array of
rows (tokens of a document, score) in FILE.score.npy beside each training file).

Differs from the paper: bytes and 0.13M parameters, not 1.5B; the score is
compressibility, not a classifier of quality, so that the above needs no
download; it says little of quality. `python -m benchmarks.curriculum` is the
experiment whose quality is known (corrupted text); its result is in
benchmarks/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import base
from lm import spec
from lm.errors import UserError, did_you_mean

SCHEDULES = {
  'constant': 'constant',
  'moderate': 'wsd',  # to a third of the peak
  'wsd': 'wsd',  # to zero
}
WARMUP = 50  # steps


def get_config(arg: str = '') -> ConfigDict:
  """Takes 'order=ascend,schedule=moderate'; order=shuffled is the control."""
  choice = spec.parse(arg, order='ascend', schedule='constant', size='nano')
  name = choice['schedule']
  if name not in SCHEDULES:
    hint = did_you_mean(name, SCHEDULES)
    raise UserError(f"schedule='{name}' is not compared.{hint}")
  c = base.get_config(f'size={choice["size"]},schedule={SCHEDULES[name]}')
  c.num_steps = 1000
  c.learning_rate = 3e-3
  if name == 'constant':
    c.schedule.warmup_steps = WARMUP
  else:
    c.schedule.warmup = WARMUP / c.num_steps
    c.schedule.decay = 0.3
    c.schedule.final = 1 / 3 if name == 'moderate' else 0.0
  if choice['order'] != 'shuffled':
    c.data.order = choice['order']
    c.data.score = 'compressibility'
    c.data.order_end = c.num_steps
  c.eval.num_sequences = 1024
  c.checkpoint.every_steps = 50
  return c
