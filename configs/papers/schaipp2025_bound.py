r"""Does the convex bound predict final losses of runs that were not fitted?

Claim of arXiv 2501.18965 (sections 4 and 5): with one scale, fitted to a few
runs, the last-iterate bound of convex SGD ranks real schedules and gives their
best learning rates. Here on a byte-level transformer of 0.03M parameters: fit
on two schedules at two learning rates, predict the others.

  for schedule in linear wsd cosine; do for lr in 1e-3 3e-3 6e-3; do
    python -m launch.train --workdir=runs/bound/$schedule-$lr \
        --config=configs/papers/schaipp2025_bound.py:schedule=$schedule \
        --config.learning_rate=$lr
  done; done
  at=runs/bound
  python -m launch.predict \
      --runs=$at/linear-1e-3,$at/linear-6e-3,$at/wsd-1e-3,$at/wsd-6e-3 \
      --held_out=$at/cosine-1e-3,$at/cosine-3e-3,$at/cosine-6e-3,\
$at/linear-3e-3,$at/wsd-3e-3

Nine runs of 400 steps, about 5 minutes on 2 cores. Measured, one seed each:
mean error of the five held-out runs 0.052 nats, of the mean of the fitted runs
0.105. Fitted on all eight runs of linear and wsd at 5e-4, 1e-3, 3e-3 and 6e-3:
0.047 on the four of cosine, of the mean 0.231. It is too low by 0.1 at 6e-3,
where training becomes unstable: the bound knows no instability. With four runs
the 90 % intervals (one degree of freedom) are wider than all differences.
"""

from ml_collections import ConfigDict

from configs import debug


def get_config(arg: str = '') -> ConfigDict:
  c = debug.get_config(arg)
  c.num_steps = 400
  c.eval.every_steps = 100
  c.eval.num_sequences = 512
  c.eval.batch_size = 64
  c.checkpoint.every_steps = 100
  return c
