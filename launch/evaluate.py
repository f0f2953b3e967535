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

  refs = [address.in_run(text) for text in _AT.value]
  from launch.parts import comparison, show
  from lm.run import Run

  runs, rows, sets, first = {}, [], {}, None
  several = len(refs) > 1
  for text, ref in zip(_AT.value, refs, strict=True):
    run = runs.setdefault(ref.run, Run(ref.run))
    losses = run.losses(run.params(ref.at))
    tokens, size = run.data.eval_tokens_ES, run.config.eval.batch_size
    same = (size, tokens.shape, tokens.tobytes())
    minus = ''
    if first and first[0] == same:
      minus = str(comparison.difference(losses, first[1]))
    first = first or (same, losses)
    rows.append([text, *show.loss(run, losses), *[minus] * several])
    what = f'{len(losses)} batches of {size} x {tokens.shape[1] - 1} tokens'
    sets.setdefault(same, (what, []))[1].append(text)
  header = ['checkpoint', 'loss (nats)', 's.e.', 'bits per byte']
  show.table([*header, *['minus first'] * several], rows)
  print('s.e.: standard error over batches, if three or more.')
  if several:
    print(
      'minus first: paired by batch, ±: 95 % over these tokens; runs of other '
      'seeds would differ, too (launch.compare).'
    )
  for what, names in sets.values():
    print(f'{", ".join(names)}: {what}')
  if len(sets) > 1:
    print(
      f'warning: these are {len(sets)} validation sets; only losses on one of '
      'them can be compared.'
    )
  print(f'Next: python -m {_next(runs[refs[0].run], refs[0], _AT.value[0])}')


def _next(run, ref, text) -> str:
  if not (run.path / 'meta.json').is_file() or run.meta['status'] in (
    'imported',
    'diverged',
  ):
    return f'launch.generate --at={shlex.quote(text)}'
  rates = run.learning_rates()
  constant = rates[len(rates) // 2] == rates[-1] and len(run.steps) > 2
  tool = 'emulate' if constant else 'refine'
  return f'launch.{tool} --run={shlex.quote(str(ref.run))}'


if __name__ == '__main__':
  cli.run(main)
