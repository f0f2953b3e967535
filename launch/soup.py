r"""Greedy soup: averages those checkpoints that improve the average.

  python -m launch.soup --at=runs/a,runs/b@900,runs/c --name=soup

Checkpoints of one or several runs of the same model are added in the order of
their loss on a second validation set, disjoint from the one whose loss is
reported; each stays if the mean is no worse. Both sets are those of the first
run. Writes RUN/merged/NAME of the first run.
"""

import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_AT = flags.DEFINE_list('at', [], 'RUN (newest checkpoint) or RUN@STEP, ...')
_NAME = flags.DEFINE_string('name', 'soup', 'of the result')
_MAX_MIB = flags.DEFINE_integer(
  'max_mib', 1024, 'most memory for arrays, in MiB', lower_bound=1
)


def main() -> None:
  if len(_AT.value) < 2:
    raise UserError('--at needs two checkpoints; for example runs/a,runs/b.')
  from lm import address
  from merging.engine import artifact

  with cli.user_errors():
    artifact.check_name(_NAME.value)
  refs = [address.in_run(text) for text in _AT.value]
  for text, ref in zip(_AT.value, refs, strict=True):
    if ref.step is None:
      raise UserError(f"--at: '{text}' is a merge; legal: RUN or RUN@STEP.")
    if sum(ref.item.resolve() == r.item.resolve() for r in refs) > 1:
      raise UserError(f"--at: '{text}' is listed twice.")
  from lm import card
  from lm.run import Run

  run = Run(refs[0].run)
  for ref in refs[1:]:
    card.check_same_model(run, Run(ref.run))
  if (run.path / 'merged' / _NAME.value).exists():
    raise UserError(
      f'{run.path}/merged/{_NAME.value} exists; use another --name.'
    )
  with cli.user_errors():
    _soup(run, refs)


def _soup(run, refs) -> None:
  from launch.parts import show
  from lm import data, evaluate
  from lm import mesh as mesh_lib
  from lm.run import Run
  from merging.engine import greedy, stream

  options = {'max_bytes': _MAX_MIB.value << 20}
  second = run.data._replace(eval_tokens_ES=data.second_validation(run.config))
  select = evaluate.build_losses(
    run.config, run.model, second, mesh_lib.single()
  )
  mean = lambda chosen: stream.combine(
    [(refs[i].item, 1 / len(chosen)) for i in chosen], **options
  )
  mean(range(len(refs)))  # refuses different models before any evaluation
  reported, losses = [], []
  for ref in refs:  # one at a time in memory
    params = Run(ref.run).params(ref.step)  # verified
    reported.append(run.losses(params))
    losses.append(float(select(params).mean()))
  tried = greedy.greedy(losses, lambda i: float(select(mean(i)).mean()))
  chosen = [t.candidate for t in tried if t.kept]
  _print(run, tried, losses, reported, run.losses(mean(chosen)))
  if len(chosen) == 1:
    print('Nothing improves the best checkpoint: there is no soup to write.')
    return
  out, about = _write(run, refs, chosen, losses, options)
  if {ref.run for ref in refs} == {run.path}:
    show.coefficients(about, run.config.batch_size * run.config.seq_len)
  else:  # no blocks of one trajectory: no multipliers
    show.effective_count(about)
  print(f'wrote {out}/params and {out}/merge.json')
  at = shlex.quote(f'{_AT.value[chosen[0]]},{out}')
  print(f'Next: python -m launch.evaluate --at={at}')


def _print(run, tried, losses, reported, soup) -> None:
  from launch.parts import show

  rows = [
    [_AT.value[i], f'{losses[i]:.4f}', f'{loss:.4f}', 'yes' if kept else 'no',
     *show.loss(run, reported[i])[:2]]
    for i, loss, kept in tried
  ]  # fmt: skip
  rows.append(['soup', '', '', '', *show.loss(run, soup)[:2]])
  header = ['checkpoint', 'loss (chosen by)', 'of mean with it', 'kept']
  show.table([*header, 'loss (reported)', 's.e.'], rows)
  gain, error = show.gain(reported[tried[0].candidate], soup)
  print(
    f'Gain of the soup over the best single checkpoint: {gain} (standard '
    f'error {error}) nats on validation tokens that nothing was chosen by.'
  )


def _write(run, refs, chosen, losses, options):
  from launch.parts import emulation
  from merging.engine import artifact

  pairs = [(refs[i].item, 1 / len(chosen)) for i in sorted(chosen)]
  method = {
    'name': 'greedy',
    'candidates': dict(zip(_AT.value, losses, strict=True)),
  }
  rates = None
  if {ref.run for ref in refs} == {run.path}:
    pairs.sort(key=lambda pair: int(pair[0].parent.name))
    knots = [int(path.parent.name) for path, _ in pairs]
    rates = emulation.block_rates(run.learning_rates(), knots)
  about = artifact.provenance(
    run.path, pairs, method=method, learning_rates=rates, **options
  )
  plan = emulation.Plan(pairs, [], {})
  emulation.write(run, _NAME.value, plan, about, options)
  return run.path / 'merged' / _NAME.value, about


if __name__ == '__main__':
  cli.run(main)
