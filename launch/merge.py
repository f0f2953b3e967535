r"""Merges checkpoints, of a run or of any program, into an ordinary one.

  python -m launch.merge --run=runs/a --window=200 \
      --method=decay:shape=1-sqrt,floor=0.1
  python -m launch.merge --run=runs/a --window=200 --means --name=linear
  python -m launch.merge --run=runs/a --steps=600,800,1000 --method=wma
  python -m launch.merge --run=runs/a --window=400 --method=from_run \
      --target=wsd:decay=0.4,shape=1-sqrt
  python -m launch.merge --run=runs/a --stored=trackers --method=power_ema

  python -m launch.merge --inputs=CHECKPOINTS --steps=600,800 --out=MERGED
  python -m launch.merge --inputs=A,B,C --tree=state.params --out=MERGED

The result, RUN/merged/NAME/{params,merge.json}, is read by launch.evaluate,
--config.init and plain Orbax. The checkpoints are only read. --inputs takes
Orbax checkpoints and safetensors folders of other programs, one by one or the
folder that holds their steps; the result has their format.
"""

import os
import pathlib
import re
import shlex
import sys

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
_STATE = flags.DEFINE_bool(
  'state', False, 'the optimizer states, too, for --config.init_state=True'
)
_STORED = flags.DEFINE_string(
  'stored',
  '',
  "'moments' (checkpoint.moment) or 'trackers' (checkpoint.ema; "
  "'trackers:ridge=1e-4,nonnegative=True') instead of checkpoints",
)
_TARGET = flags.DEFINE_string(
  'target', '', 'of from_run: NAME:KEY=VALUE,... of schedules/NAME.py'
)
_CONTROL = flags.DEFINE_enum(
  'control', '', ['', 'reverse', 'scramble'], 'coefficients in a wrong order'
)
_SEED = flags.DEFINE_integer('seed', 0, 'of --control=scramble', lower_bound=0)
_INPUTS = flags.DEFINE_list(
  'inputs', [], 'checkpoints of any program, or one folder of them'
)
_TREE = flags.DEFINE_string(
  'tree', '', 'where --inputs have their parameters, as state.params'
)
_OUT = flags.DEFINE_string('out', '', 'directory of the result of --inputs')
_NAME = flags.DEFINE_string('name', '', 'of the result; default: the method')
_ACCUMULATE = flags.DEFINE_enum(
  'accumulate', 'float32', ['float32', 'float64'], 'precision of the sums'
)
_DTYPE = flags.DEFINE_string('dtype', '', 'of the result; default: as stored')
_HASH_INPUTS = flags.DEFINE_bool(
  'hash_inputs', False, 'SHA-256 of every file of the inputs, in merge.json'
)
_MAX_MIB = flags.DEFINE_integer(
  'max_mib', 1024, 'most memory for arrays, in MiB', lower_bound=1
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'HOST:PORT of process 0, to merge with several machines'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'that merge together')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'of this process, from 0')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'print the plan, merge nothing')


def main() -> None:
  if not _RUN.value and not _INPUTS.value:
    raise UserError('--run is missing; for example --run=runs/a.')
  if _RUN.value and _INPUTS.value:
    raise UserError('--run and --inputs exclude each other.')
  if _STEPS.value and (
    _MEANS.value or _WINDOW.value or _END.value != -1 or _EVERY.value != 1
  ):
    raise UserError('--steps excludes --means, --window, --end and --every.')
  if _END.value < -1:
    raise UserError(f'--end={_END.value} is not a step.')
  import jax

  from lm import mesh
  from merging.engine import memory

  memory.reuse()
  # It would swallow SIGTERM, so that a run of several processes can save.
  jax.config.update('jax_enable_preemption_service', False)
  mesh.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  options = {
    'accumulate': _ACCUMULATE.value,
    'dtype': _DTYPE.value or None,
    'max_bytes': _MAX_MIB.value << 20,
  }
  with cli.user_errors():
    if _INPUTS.value:
      _merge_inputs(options)
    else:
      _merge_run(options)


def _merge_run(options) -> None:
  from launch.parts import emulation, finished, merged_state, show, stored
  from lm.run import Run
  from merging.engine import artifact

  _refuse(('tree', 'out'), 'needs --inputs')
  if _DTYPE.value == 'float64':
    raise UserError(
      "--dtype='float64' is not what a run can read; legal: float32, bfloat16, "
      'float16. Sums are float64 with --accumulate=float64.'
    )
  if _STATE.value:
    _refuse(('means', 'stored'), 'does not go with --state')
  if _MEANS.value:
    _refuse(('every',), 'does not go with --means, which cover every step')
  run = Run(_RUN.value)
  if _NAME.value:
    artifact.check_name(_NAME.value)
  method = emulation.parse_method(_METHOD.value)
  at = {'end': _END.value if _END.value >= 0 else None, 'window': _WINDOW.value}
  if _STORED.value:
    of_steps = ('means', 'every', 'steps', 'target', 'control')
    _refuse(of_steps, 'does not go with --stored')
    plan = stored.plan(run, method, _STORED.value, **at)
  else:
    plan = emulation.plan(
      run,
      method,
      means=_MEANS.value,
      **at,
      every=_EVERY.value,
      steps=cli.integers('steps', _STEPS.value),
      target=_TARGET.value,
    )
    if not _STEPS.value and not _MEANS.value and _EVERY.value == 1:
      emulation.warn_of_gaps(run, plan, _WINDOW.value)
    if _WINDOW.value not in (0, plan.about['window']):
      print(
        f'These checkpoints cover {plan.about["window"]} steps, not '
        f'--window={_WINDOW.value}.'
      )
  emulation.warn_of_code(run, plan.about['end'], plan.about['window'])
  if _CONTROL.value:
    plan = emulation.control(plan, _CONTROL.value, _SEED.value)
  if _STATE.value:
    plan = merged_state.add(plan)
  about = artifact.provenance(
    run.path,
    plan.sources,
    method={**method, 'means': _MEANS.value, **plan.about},
    learning_rates=plan.learning_rates,
    **options,
  )
  if plan.state:
    about['state'] = merged_state.provenance(run, plan.state)
  if _STORED.value:
    stored.amend(plan, about)
  name = _NAME.value or _default_name(method, plan.about)
  out = run.path / 'merged' / name
  hashed = _hashed(run.path, [*plan.sources, *plan.state])
  items = ('params', 'state')[: 1 + bool(plan.state)]
  done = finished.is_done(out, about, items, plan.sources, hashed)
  if _STORED.value:
    stored.describe(run, plan)
  else:
    show.coefficients(about, run.config.batch_size * run.config.seq_len)
  if _end(out, done):
    return
  emulation.write(run, name, plan, about, options, hashed)
  print(f'wrote {out}/params and {out}/merge.json')
  at = shlex.quote(f'{run.path},{out}')
  print(f'Next: python -m launch.evaluate --at={at}')


def _merge_inputs(options) -> None:
  from launch.parts import emulation, finished, foreign, show, verified
  from merging.engine import artifact
  from merging.engine import plan as engine

  _check_inputs_flags()
  method = emulation.parse_method(_METHOD.value)
  steps = cli.integers('steps', _STEPS.value)
  found = foreign.inputs(_INPUTS.value, steps, _TREE.value)
  plan = foreign.plan(found, method)
  if _CONTROL.value:
    plan = emulation.control(plan, _CONTROL.value, _SEED.value)
  options |= {'tree': found.tree, 'ages': found.steps}
  checked = engine.plan(plan.sources, engine.Options(**options))  # may refuse
  if _DRY_RUN.value:
    list(engine.leaves(checked))  # as the merge will
  out, folder = pathlib.Path(_OUT.value), pathlib.Path(_INPUTS.value[0])
  if len(_INPUTS.value) == 1 and out.resolve().parent == folder.resolve():
    raise UserError(
      f"--out='{out}' lies in --inputs='{folder}', where the next merge would "
      'take it for a checkpoint.'
    )
  about = artifact.provenance(
    out.absolute(),
    plan.sources,
    method={**method, **plan.about, 'tree': found.tree},
    steps=found.steps,
    **options,
  )
  hashed = _hashed(out, plan.sources)
  done = finished.is_done(out, about, (found.item,), plan.sources, hashed)
  show.coefficients(about)
  if _end(out, done):
    return
  together = emulation.group()
  hooks = verified.of_inputs(plan.sources, together, bool(found.item))
  artifact.write_at(
    out,
    found.item,
    sources=plan.sources,
    provenance=about,
    hashed=hashed,
    group=together,
    **hooks,
    **options,
  )
  print(f'wrote {out / found.item} and {out}/merge.json')
  if found.tree:
    print(f"It holds what is below '{found.tree}' of the inputs, and no more.")


def _check_inputs_flags():
  if not _OUT.value:
    raise UserError('--out is missing: the directory of the result.')
  runs = ('run', 'means', 'stored', 'end', 'window', 'every', 'target', 'name')
  _refuse(('state', *runs), 'needs --run; --inputs take --steps')


def _refuse(names, why):
  for name in names:
    if flags.FLAGS[name].value != flags.FLAGS[name].default:
      raise UserError(f'--{name} {why}.')


def _hashed(folder, sources):
  """Returns {path as in merge.json: path} of what --hash_inputs hashes."""
  paths = [p for p, _ in sources] if _HASH_INPUTS.value else []
  return {os.path.relpath(p, folder.absolute()): p for p in paths}


def _end(out, done) -> bool:
  if done:
    print(f'{out} is this very merge already.')
    return True
  if _DRY_RUN.value:
    print(f'dry run: {out} is not written.')
  return _DRY_RUN.value


def _default_name(method, about) -> str:
  defaults = spec.knobs('merging', method['name'])
  knobs = [
    f'{k}={v}' for k, v in method.items() if k != 'name' and v != defaults[k]
  ]
  what = _STORED.value or ('means' if _MEANS.value else 'raw')
  window = f'{about["window"]}at{about["end"]}'
  known = [k for k in ('control', 'seed', 'target', 'state') if k in about]
  marks = [f'{k}={about[k]}' for k in known]
  parts = [method['name'], *knobs, what, window, *marks]
  return re.sub(r'[^\w.=+-]', '-', '-'.join(parts))


def _methods() -> str:
  """One line per method, as --method takes it."""
  lines = ['', 'Methods, with their knobs:']
  for name in spec.names('merging'):
    knobs = spec.knobs('merging', name).items()
    text = ','.join(f'{k}={v}' for k, v in knobs)
    about = (sys.modules[f'merging.{name}'].__doc__ or '').partition('\n')[0]
    method = f'{name}:{text}' if text else name
    lines.append(f'  {method:45} {about}')
  return '\n'.join([*lines, ''])


if __name__ == '__main__':
  cli.run(main, more_help=_methods)
