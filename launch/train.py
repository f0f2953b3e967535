r"""Trains a run, or continues it: the same command resumes.

  python -m launch.train --config=configs/debug.py:optimizer=lion \
      --workdir=runs/a --config.learning_rate=1e-3
  python -m launch.train --config=runs/a/config.json --workdir=runs/again
  python -m launch.train --config=runs/a/config.json --workdir=runs/b \
      --config.branch=runs/a@1000

On several machines run the same command on each: TPU pods and SLURM are
detected; elsewhere give --coordinator, --num_processes and --process_id.
"""

import pathlib
import shlex

from absl import flags

from launch import cli
from lm.errors import UserError, through

_DEFAULT = 'configs/quickstart.py'
_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', '', 'directory of the run')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'print size, FLOPs and memory of the run; train nothing'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'HOST:PORT of process 0, if not detected'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'of the whole run')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'of this process, from 0')

_CODES = {'done': 0, 'diverged': 1, 'preempted': 143}


def main() -> int:
  if not _WORKDIR.value and not _DRY_RUN.value:
    raise UserError('--workdir is missing; for example --workdir=runs/a.')
  if ',' in _WORKDIR.value:
    raise UserError(
      f"--workdir='{_WORKDIR.value}' must have no comma: it separates runs."
    )
  from lm import mesh  # jax is imported here, so that --help is fast

  mesh.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if _DRY_RUN.value:
    from lm import dry_run

    dry_run.report(_CONFIG.value, _WORKDIR.value)
    return 0
  from lm import loop

  workdir = _WORKDIR.value
  with through(f'optimizers/{_CONFIG.value.optimizer.name}.py'):
    status = loop.train(_CONFIG.value, workdir)
  following = {
    'done': _after(workdir) if status == 'done' else '',
    'diverged': 'lower --config.learning_rate, in a new --workdir; the log is '
    f'{workdir}/metrics.jsonl',
    'preempted': 'run the same command to continue',
  }
  print(f'{workdir}: {status}. Next: {following[status]}')
  return _CODES[status]


def _after(workdir: str) -> str:
  """Returns the command that fits a finished run."""
  from lm.run import Run

  run = Run(workdir)
  bad = run.metrics.get('train/bad_steps')
  if bad is not None and (count := int(bad.value[-1])):
    print(
      f'warning: the gradient or loss of {count} steps was not finite; they '
      f'were skipped (train/bad_steps in {workdir}/metrics.jsonl).'
    )
  parent = run.meta['parent'].rpartition('@')[0]
  there = pathlib.Path(parent, 'config.json').is_file()
  if _CONFIG.value.branch and parent and there:
    return f'python -m {_beside(run, parent, workdir)}'
  rates = run.learning_rates()
  if rates[len(rates) // 2] == rates[-1] and len(run.steps) > 2:
    return f'python -m launch.emulate --run={shlex.quote(workdir)}'
  return f'python -m launch.evaluate --at={shlex.quote(workdir)}'


def _beside(run, parent: str, workdir: str) -> str:
  """The parent's emulated decays, if it kept its rate to this branch's end."""
  from lm import card
  from lm.run import Run

  whole, end = Run(parent), run.steps[-1]
  start = int(run.meta['parent'].rpartition('@')[2])
  rates = whole.learning_rates()[start:end]
  kept = end in whole.steps and (rates == rates[0]).all()
  here = run.learning_rates()[start:end]
  # As parts/cooldowns.py wants it.
  begins = kept and abs(here[0] / rates[0] - 1) < 1e-5
  first = start + int((here < here[0] * (1 - 1e-6)).argmax()) - 1
  alike = not card.other_model(whole.config, run.config)
  if begins and here[-1] < here[0] and first in whole.steps and alike:
    options = f'--run={shlex.quote(parent)} --against={shlex.quote(workdir)}'
    return f'launch.emulate {options}'
  return f'launch.evaluate --at={shlex.quote(f"{parent},{workdir}")}'


if __name__ == '__main__':
  cli.run(main, _DEFAULT)
