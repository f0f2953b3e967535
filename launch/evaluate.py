r"""Evaluates checkpoints or merges on the validation set of their run.

  python -m launch.evaluate --at=runs/a@1000
  python -m launch.evaluate --at=runs/a,runs/a/merged/linear

The tokens are those of the run's own config: losses of one run are paired.
"""

import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_AT = flags.DEFINE_list(
  'at', [], 'RUN (newest checkpoint), RUN@STEP or RUN/merged/NAME, by commas'
)


def main() -> None:
  if not _AT.value:
    raise UserError('--at is missing; for example --at=runs/a@1000.')
  from lm import address

  refs = [address.locate(text) for text in _AT.value]
  from launch.parts import show
  from lm.run import Run

  runs = {}
  rows = []
  for text, ref in zip(_AT.value, refs, strict=True):
    run = runs.setdefault(ref.run, Run(ref.run))
    at = ref.item.parent.name if ref.step is None else ref.step
    losses = run.losses(run.params(at))
    rows.append([text, *show.loss(run, losses)])
  show.table(['checkpoint', 'loss (nats)', '+-', 'bits per byte'], rows)
  print(f'{len(losses)} batches of {run.config.eval.batch_size} sequences; '
        '+- is the standard error over batches.')  # fmt: skip
  rates = runs[refs[0].run].learning_rates()
  tool = 'emulate' if rates[len(rates) // 2] == rates[-1] else 'refine'
  print(f'Next: python -m launch.{tool} --run={shlex.quote(str(refs[0].run))}')


if __name__ == '__main__':
  cli.run(main)
