r"""Merges checkpoints of one run into an ordinary checkpoint.

  python -m launch.merge --run=runs/a --window=200 \
      --method=decay:shape=1-sqrt,floor=0.1
  python -m launch.merge --run=runs/a --window=200 --means --name=linear
  python -m launch.merge --run=runs/a --steps=600,800,1000 --method=wma
  python -m launch.merge --run=runs/a --window=400 --method=from_run \
      --target=wsd:decay=0.4,shape=1-sqrt

The result, RUN/merged/NAME/{params,merge.json}, is read by launch.evaluate,
--config.init and plain Orbax. The checkpoints are only read.
"""

import pathlib
import re

from absl import flags

from launch import cli
from lm import spec
from lm.errors import UserError

_RUN = flags.DEFINE_string('run', '', 'the run directory')
_METHOD = flags.DEFINE_string(
  'method', 'decay:shape=linear', 'NAME:KEY=VALUE,... of merging/NAME.py'
)
_END = flags.DEFINE_integer('end', -1, 'last step of the window; -1 = newest')
_WINDOW = flags.DEFINE_integer(
  'window', 0, 'length in steps; 0 = a fifth of the steps so far'
)
_EVERY = flags.DEFINE_integer('every', 1, 'least distance of two checkpoints')
_STEPS = flags.DEFINE_list('steps', [], 'these checkpoints instead of a window')
_MEANS = flags.DEFINE_bool(
  'means', False, 'interval means instead of raw checkpoints (method decay)'
)
_TARGET = flags.DEFINE_string(
  'target', '', 'of from_run: NAME:KEY=VALUE,... of schedules/NAME.py'
)
_CONTROL = flags.DEFINE_enum(
  'control', '', ['', 'reverse', 'scramble'], 'coefficients in a wrong order'
)
_SEED = flags.DEFINE_integer('seed', 0, 'of --control=scramble', lower_bound=0)
_NAME = flags.DEFINE_string('name', '', 'of the result; default: the method')
_ACCUMULATE = flags.DEFINE_enum(
  'accumulate', 'float32', ['float32', 'float64'], 'precision of the sums'
)
_DTYPE = flags.DEFINE_string('dtype', '', 'of the result; default: as stored')
_MAX_MIB = flags.DEFINE_integer('max_mib', 256, 'memory for arrays, in MiB')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'print the plan, merge nothing')


def main() -> None:
  if not _RUN.value:
    raise UserError('--run is missing; for example --run=runs/a.')
  if _STEPS.value and (_MEANS.value or _WINDOW.value or _END.value != -1):
    raise UserError('--steps excludes --means, --window and --end.')
  if _END.value < -1:
    raise UserError(f'--end={_END.value} is not a step.')
  from launch import emulation
  from lm.run import Run
  from merging.engine import artifact

  run = Run(_RUN.value)
  method = emulation.parse_method(_METHOD.value)
  with cli.user_errors():
    plan = emulation.plan(
      run,
      method,
      means=_MEANS.value,
      end=_END.value if _END.value >= 0 else None,
      window=_WINDOW.value,
      every=_EVERY.value,
      steps=cli.integers('steps', _STEPS.value),
      target=_TARGET.value,
    )
    if _CONTROL.value:
      plan = emulation.control(plan, _CONTROL.value, _SEED.value)
    options = {
      'accumulate': _ACCUMULATE.value,
      'dtype': _DTYPE.value or None,
      'max_bytes': _MAX_MIB.value << 20,
    }
    about = artifact.provenance(
      run.path,
      plan.sources,
      method={**method, 'means': _MEANS.value, **plan.about},
      learning_rates=plan.learning_rates,
      **options,
    )
  _print(run, about)
  name = _NAME.value or _default_name(method, plan.about, _MEANS.value)
  if _same(run.path / 'merged' / name / 'merge.json', about):
    print(f'{run.path}/merged/{name} is this very merge already.')
    return
  if _DRY_RUN.value:
    print(f'dry run: {run.path}/merged/{name} is not written.')
    return
  out = _write(run, name, plan, about, options)
  print(f'wrote {out}/params and {out}/merge.json')
  print(f'Next: python -m launch.evaluate --at={run.path},{out}')


def _same(path: pathlib.Path, about) -> bool:
  """Returns whether `path` says the same but for versions and time."""
  from lm import log

  if not path.is_file():
    return False
  old = log.read_json(path)
  fields = ('method', 'sources', 'accumulate', 'dtype')
  return all(old[f] == about[f] for f in fields)


def _write(run, name, plan, about, options) -> pathlib.Path:
  from lm import checkpoint, log, verify
  from merging.engine import artifact

  first = checkpoint.abstract_item(plan.sources[0][0])
  verifier = verify.Verifier(verify.shapes(first))

  def finish(folder):
    verifier.check()
    log.write_json(folder / 'fingerprints.json', verifier.result())

  with cli.user_errors():
    return artifact.write(
      run.path,
      name,
      sources=plan.sources,
      provenance=about,
      observe=verifier,
      before_commit=finish,
      **options,
    )


def _print(run, about) -> None:
  from launch import show

  tokens = run.config.batch_size * run.config.seq_len
  rows = []
  later = [row['multiplier'] for row in about['sources'][1:]] + [0.0]
  for row, after in zip(about['sources'], later, strict=True):
    w = f'{row["multiplier"]:.4f}'
    effective = f'{row["effective_learning_rate"]:.3e}'
    if row['item'] == 'mean':  # falls linearly over the interval
      w = f'{w} -> {after:.4f}'
      effective = f'{effective} -> {after * row["learning_rate"]:.3e}'
    rows.append(
      [
        f'{row["step"]} {row["item"]}',
        f'{row["step"] * tokens:,}',
        f'{row["learning_rate"]:.3e}',
        f'{row["coefficient"]:.6f}',
        w,
        effective,
      ]
    )
  header = ['checkpoint', 'tokens', 'LR used', 'c', 'w', 'effective LR']
  show.table(header, rows)
  print(
    'w: what the updates between the checkpoint before and this one are '
    'multiplied by; 1 before the first.'
  )
  if not about['method']['means']:
    print(
      f'The noise of {about["effective_count"]:.1f} independent checkpoints '
      'is averaged (1 / sum c^2).'
    )


def _default_name(method, about, means) -> str:
  defaults = spec.knobs('merging', method['name'])
  knobs = [
    f'{k}={v}' for k, v in method.items() if k != 'name' and v != defaults[k]
  ]
  what = 'means' if means else 'raw'
  window = f'{about["window"]}at{about["end"]}'
  marks = [f'{k}={about[k]}' for k in ('control', 'seed') if k in about]
  if 'target' in about:
    marks.append(re.sub(r'[^\w.=+-]', '-', f'target={about["target"]}'))
  return '-'.join([method['name'], *knobs, what, window, *marks])


if __name__ == '__main__':
  cli.run(main)
