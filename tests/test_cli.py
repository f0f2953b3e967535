"""The command line of launch.train: mistakes, --dry_run, new components."""

import json
import logging
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from absl import flags

import optimizers
from launch import cli, train
from launch.parts import decay_formulas, judgement
from lm import dry_run, noise, spec
from lm import run as run_lib
from tests import helpers, tools

SCRIPTS = sorted(
  p
  for pattern in ('launch/**/*.sh', 'launch/**/*.sbatch', '.ci/run')
  for p in helpers.ROOT.glob(pattern)
)

_ONE_LAYER = '--config.model.num_layers=1'  # compiles sooner


def _train(*args, monkeypatch):
  """Runs launch.train in this process; returns its exit code."""
  monkeypatch.chdir(helpers.ROOT)
  monkeypatch.setattr(sys, 'argv', ['train', *map(str, args)])
  flags.FLAGS.unparse_flags()
  for name in [f for f in flags.FLAGS if f.startswith('config.')]:
    delattr(flags.FLAGS, name)  # each parse defines its own
  with pytest.raises(SystemExit) as e:
    cli.run(train.main, train._DEFAULT)
  return e.value.code


def test_a_branch_from_the_end_of_its_parent(tmp_path, monkeypatch, capsys):
  """The parent has no rates beside those of the branch; its grid has an end."""
  often = ['--config.checkpoint.every_steps=2', '--config.eval.every_steps=2']
  a, b = tmp_path / 'a', tmp_path / 'b'
  for workdir, *more in (
    (a, '--config=configs/debug.py:schedule=constant', '--config.num_steps=4'),
    (b, '--config=configs/debug.py:schedule=wsd', '--config.num_steps=8',
     f'--config.branch={a}'),
  ):  # fmt: skip
    args = [*more, *often, _ONE_LAYER, f'--workdir={workdir}']
    assert _train(*args, monkeypatch=monkeypatch) == 0
  assert f'Next: python -m launch.evaluate --at={a},{b}' in (
    capsys.readouterr().out
  )
  assert judgement.grid(run_lib.Run(a), [], []) == [(4, 2)]


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--workdir='], '--workdir is missing'),
    (['--workdirr=x'], "Unknown command line flag 'workdirr'"),
    (['x'], "'x' is not a flag"),
    (['--config=configs/debgu.py'], "Did you mean 'configs/debug.py'?"),
    (['--config=Makefile'], "'Makefile' is not a .py config"),
    (['--config={tmp}/config.json'], "config.json' does not exist"),
    (['--config={tmp}/run'], "run' is no file. Did you mean '{tmp}/run/config"),
    (['--config={tmp}/broken.json'], 'is not the config.json of a run'),
    (['--config={tmp}/null.json'], 'is not the config.json of a run: b1 is nu'),
    (['--config={tmp}/broken.py'], "broken.py', line 1: invalid syntax"),
    (['--config={tmp}/empty.py'], 'has no get_config()'),
    (['--config={tmp}/raises.py'], "raises.py', line 2: ZeroDivisionError"),
    (['--config={tmp}/none.py'], 'returns no ConfigDict, but None'),
    (['--config={tmp}/null.py'], "branch=None must be of type str, as in conf"),
    (['--config={tmp}/half.py'], 'the config has no field seed; begin with co'),
    (['--config={tmp}/bare.py'], 'the config has no field optimizer.name; beg'),
    (['--config={tmp}/typo.py'], "Did you mean \"learning_rate\" instead of"),
    (['--config={tmp}/switch.py'], 'seed=True must be of type int, as in co'),
    (['--config={tmp}/none.py:x'], "none.py': TypeError: get_config() takes 0"),
    (['--config=configs/debug.py:lion'], "'lion' is not a choice"),
    (['--config'], '--config has no value; for example'),
    (['--config=configs/debug.py:foo=3'], "'foo=3' is not a choice of this"),
    (['--config.optimizer=lion'], 'colon: --config=FILE:optimizer=NAME.'),
    (['--config.model=x'], "'model' is a section, which takes no value"),
    (['--config.model.gated=no'], "gated='no' must be true or false."),
    (['--config.seed=1.5'], "seed='1.5' must be an integer."),
    (['--config.learning_rate=x'], "learning_rate='x' must be a number."),
    (['--config.b1=0.5'], "Did you mean 'optimizer.b1'?"),
    (['--config=configs/debug.py:optimiser=lion'], "Did you mean 'optimizer'?"),
    (['--config=configs/debug.py:optimizer=lionn'], "Did you mean 'lion'?"),
    (['--config=configs/debug.py:schedule=wds'], "Did you mean 'wsd'?"),
    (['--config.optimizer.b3=0.9'], "no field 'optimizer.b3'. Did you mean"),
    (['--config.learning_rates=1'], "Did you mean 'learning_rate'?"),
    (['--config.optimizer.name=lion'], '--config=FILE:optimizer=lion'),
    (['--config.num_steps=ten'], 'ten'),
    (['--config.num_steps=1.5'], '1.5'),
    (['--config.learning_rate=fast'], 'fast'),
    (['--config.checkpoint.mean=perhaps'], 'perhaps'),
    (['--config.model=3'], 'model'),
    (['--config.num_steps=0'], 'num_steps=0 must be from 1'),
    (['--config.batch_size=7'], 'batch_size=7 must be a positive multiple'),
    (['--config.grad_accum_steps=-1'], 'accum_steps=-1 must be at least 0'),
    (['--config=configs/debug.py:schedule'], "write 'schedule=NAME'"),
    (['--config.mesh.fsdp=3'], 'does not make 8 devices'),
    (['--config.schedule.shape=lin'], 'linear'),
    (['--config.data.source=web'], "web"),
    (['--config.data.source=bin'], 'data.train'),
    (['--config.branch=nowhere@5'], "'nowhere' does not exist"),
    (['--dry_run', '--config.branch=nowhere@5'], "'nowhere' does not exist"),
    (['--dry_run', '--config.init=nowhere@5'], "'nowhere' does not exist"),
    (['--config.optimizer.eps=-1'], 'optimizer.eps=-1.0 must be from 0'),
    (['--config=configs/debug.py:optimizer=prodigy',
      '--config.optimizer.d0=0'], 'optimizer.d0=0.0 must be from 1e-30'),
    (['--config=configs/debug.py:optimizer=adafactor',
      '--config.optimizer.clipping_threshold=0'],
     'optimizer.clipping_threshold=0.0 must be from 1e-30'),
    (['--config=configs/debug.py:optimizer=schedule_free_adamw',
      '--config.optimizer.b1=0'], 'b1=0.0 must exceed 0'),
    (['--config.branch_state=keep'], "branch_state='keep' needs a branch"),
    (['--config.model.base_width=-64'],
     'model.base_width=-64 must be 0 to 2**31 - 1'),
    (['--config.model.dtype=float31'], 'float31'),
    (['--config.model.remat=some'], 'some'),
    (['--config.model.attention=fast'], 'fast'),
    (['--config.model.attention=cudnn'], "needs a GPU and a 16-bit"),
    (['--config.model.rope_theta=0'], 'model.rope_theta=0.0 must be from 1'),
    (['--config.model.vocab_size=2147483648'], 'vocab_size=2147483648 must be'),
    (['--config.model.vocab_size=2147483647'], 'averages need 2048.0 GiB per'),
    (['--config.model.init_std=nan'], 'model.init_std=nan must be from 0'),
    (['--config.model.num_kv_heads=3'], 'num_kv_heads'),
    (['--num_processes=2'], 'need a --coordinator'),
    (['--coordinator=localhost:1'], '--num_processes >= 1'),
    (['--workdir={tmp}/a,b'], "a,b' must have no comma"),
    (['--coordinator=[::1]:1'], '--num_processes >= 1'),
    (['--coordinator=nonsense', '--num_processes=1', '--process_id=0'],
     "--coordinator='nonsense' must be HOST:PORT"),
    (['--coordinator=localhost:65536'], 'a port from 1 to 65535'),
    (['--workdir={tmp}/empty.py'], 'empty.py'),
    (['--workdir={tmp}/empty.py/below'], 'empty.py'),
  ],
  ids=lambda x: ''.join(x).replace('{tmp}/', '') if isinstance(x, list) else '',
)  # fmt: skip
def test_a_mistake_is_one_sentence(
  arguments, sentence, tmp_path, monkeypatch, capsys
):
  (tmp_path / 'broken.json').write_text('{"a": 1')
  (tmp_path / 'null.json').write_text('{"optimizer": {"b1": null}}')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run/config.json').write_text('{}')
  (tmp_path / 'broken.py').write_text('def get_config(:')
  (tmp_path / 'empty.py').write_text('')
  (tmp_path / 'raises.py').write_text('def get_config():\n  1 / 0\n')
  (tmp_path / 'none.py').write_text('def get_config():\n  pass\n')
  (tmp_path / 'typo.py').write_text(
    'from configs import base\ndef get_config():\n'
    '  base.get_config().learningrate = 0.1\n'
  )
  for name, change in (
    ('null', 'c.branch = None'), ('half', 'del c.seed'),
    ('bare', 'del c.optimizer'),
    ('switch', 'c.seed = True'),
  ):  # fmt: skip
    (tmp_path / f'{name}.py').write_text(
      'from configs import base\ndef get_config():\n  c = base.get_config()\n'
      f'  with c.unlocked(), c.ignore_type():\n    {change}\n  return c\n'
    )
  before = sorted(tmp_path.rglob('*'))
  given = [a.format(tmp=tmp_path) for a in arguments]
  code = _train(
    '--config=configs/debug.py', f'--workdir={tmp_path}/new', *given,
    monkeypatch=monkeypatch,
  )  # fmt: skip
  assert code == 2
  lines = capsys.readouterr().err.splitlines()
  assert [x for x in lines if x.startswith('error: ')] == lines[-1:]
  assert sentence.replace('{tmp}', str(tmp_path)) in lines[-1]
  assert 'Traceback' not in ''.join(lines) and len(lines[-1]) < 1000
  assert sorted(tmp_path.rglob('*')) == before


def test_the_config_of_a_run_makes_the_run_again(tmp_path, monkeypatch, capsys):
  a, b = tmp_path / 'a', tmp_path / 'b'
  given = ['--config=configs/debug.py:optimizer=lion,schedule=cosine']
  given += ['--config.num_steps=3', '--config.optimizer.b1=0.8', _ONE_LAYER]
  assert _train(*given, f'--workdir={a}', monkeypatch=monkeypatch) == 0
  output = capsys.readouterr().out
  assert f'{a}: done. Next: python -m launch.' in output
  again = [f'--config={a}/config.json', f'--workdir={b}']
  assert _train(*again, monkeypatch=monkeypatch) == 0
  helpers.assert_same_run(a, b)
  configs = [json.loads((r / 'config.json').read_text()) for r in (a, b)]
  assert configs[0] == configs[1]
  assert configs[0]['optimizer'] == {
    **configs[0]['optimizer'], 'name': 'lion', 'b1': 0.8
  }  # fmt: skip


def test_a_config_may_import_what_lies_beside_it(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'path', [*sys.path])
  (tmp_path / 'zz_beside.py').write_text('STEPS = 7\n')
  (tmp_path / 'mine.py').write_text(
    'import zz_beside\nfrom configs import base\n'
    'def get_config():\n  c = base.get_config()\n'
    '  c.num_steps = zz_beside.STEPS\n  return c\n'
  )
  assert cli.load_config(f'{tmp_path}/mine.py').num_steps == 7


def test_steps_that_were_skipped_are_told(tmp_path, monkeypatch, capsys):
  given = ['--config=configs/debug.py', '--config.learning_rate=1e30']
  given += ['--config.num_steps=6', '--config.eval.every_steps=0', _ONE_LAYER]
  assert _train(*given, f'--workdir={tmp_path}', monkeypatch=monkeypatch) == 0
  bad = int(run_lib.Run(tmp_path).metrics['train/bad_steps'].value[-1])
  assert bad > 2
  output = capsys.readouterr().out
  assert f'warning: the gradient or loss of {bad} steps was not fin' in output


def test_dry_run_prints_and_creates_nothing(tmp_path, monkeypatch, capsys):
  arguments = [
    '--config=configs/debug.py', '--dry_run', f'--workdir={tmp_path}/a'
  ]  # fmt: skip
  assert _train(*arguments, monkeypatch=monkeypatch) == 0
  output = capsys.readouterr().out
  for word in ('parameters', 'FLOPs per token', 'memory', 'one checkpoint'):
    assert word in output
  assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_branch_counts_what_it_trains(whole, capsys):
  dry_run.report(helpers.config(branch=f'{whole}@8'))
  rows = [x.split('│') for x in capsys.readouterr().out.splitlines()]
  found = {r[1].strip(): r[2].strip() for r in rows if len(r) > 2}
  per_step = int(found['tokens per step'].replace(',', ''))
  assert found['tokens in the run'] == f'{4 * per_step:,}'
  assert found['checkpoints of the run'] == '2'


NEW = '''import jax
import optax

from optimizers.parts.decay import descend


def zz_test_descent(
  learning_rate, axes=None, peak=None, *,
  momentum: float = 0.9, weight_decay: float = 0.1, decay: str = 'decoupled',
):
  """Gradient descent with momentum."""
  assert axes is None or jax.tree.leaves(axes)[0].names
  return descend(
    optax.trace(momentum), learning_rate, axes, peak,
    weight_decay=weight_decay, decay=decay,
  )
'''


@pytest.fixture
def new_optimizer(tmp_path_factory, monkeypatch):
  """A file beside those of optimizers/; other processes do not see it."""
  folder = tmp_path_factory.mktemp('optimizers')
  (folder / 'zz_test_descent.py').write_text(NEW)
  path = [*optimizers.__path__, str(folder)]
  monkeypatch.setattr(optimizers, '__path__', path)
  return 'zz_test_descent'


def test_a_new_file_is_a_new_optimizer(
  new_optimizer, tmp_path, monkeypatch, capsys
):
  assert NEW.count('\n') < 18
  assert _train('--help', monkeypatch=monkeypatch) == 0
  optimizers = capsys.readouterr().out.split('Optimizers: ')[1].split('\n')[0]
  assert new_optimizer in optimizers.split(', ')
  chosen = f'--config=configs/debug.py:optimizer={new_optimizer}'
  assert _train(chosen, '--help', monkeypatch=monkeypatch) == 0
  output = capsys.readouterr().out
  assert '  --config.optimizer.momentum=0.9\n' in output
  assert f'{new_optimizer}.py: Gradient descent with momentum.\n' in output
  assert 'schedules/wsd.py: Linear warm-up, the peak, then a decay' in output
  arguments = [
    chosen,
    _ONE_LAYER,
    '--config.num_steps=3',
    '--config.optimizer.momentum=0.5',
    f'--workdir={tmp_path}/a',
  ]
  assert _train(*arguments, monkeypatch=monkeypatch) == 0
  run = run_lib.Run(tmp_path / 'a')
  assert run.meta['status'] == 'done'
  assert run.config.optimizer.momentum == 0.5


def test_what_a_new_optimizer_raises_is_one_sentence(
  new_optimizer, tmp_path, monkeypatch, capsys
):
  """In the step, too: with its line, and what to do if it is an `if`."""
  folder = pathlib.Path(optimizers.__path__[-1])
  for name, line, sentence in (
    ('branch', 'if momentum > 0.5: momentum', 'line 5: Tracer.* jnp.where'),
    ('typo', 'optax.nothere', "line 5: AttributeError: .* 'nothere'"),
    ('alone', 'return updates', r'must return \(updates, state\), not <class'),
    (
      'shape',
      'updates = {**updates, "embedding": params["head"]}',
      r"updates must have float32\[256, 32\] at \['embedding'\], as before, "
      r'not float32\[32, 256\]',
    ),
    (
      'state',
      'return updates, (state,)',
      'the state after an update must have the str',
    ),
    ('three', 'pass', r'must return an optax\.Grad.*, not 3'),
  ):
    (folder / f'zz_test_{name}.py').write_text(f"""import optax
def zz_test_{name}(learning_rate, *, momentum: float = 0.9):
  start = optax.sgd(learning_rate)
  def update(updates, state, params=None):
    {line}
    return start.update(updates, state, params)
  made = optax.GradientTransformation(start.init, update)
  return {'3' if name == 'three' else 'made'}
""")
    chosen = f'--config=configs/debug.py:optimizer=zz_test_{name}'
    workdir = f'--workdir={tmp_path}/{name}'
    assert _train(chosen, _ONE_LAYER, workdir, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert re.search(f'zz_test_{name}.py.*{sentence}', error), error
    assert error.count('\n') == 1, error


def test_an_optimizer_without_axes_and_decay(
  new_optimizer, tmp_path, monkeypatch, capsys
):
  """It trains, also with diagnostics; what cannot reach it is refused."""
  folder, name = pathlib.Path(optimizers.__path__[-1]), 'zz_test_plain'
  (folder / f'{name}.py').write_text(f"""import optax
def {name}(learning_rate, *, b1: float = 0.9):
  return optax.adam(learning_rate, b1)
""")
  chosen = f'--config=configs/debug.py:optimizer={name}'
  train = lambda *args: _train(
    chosen, _ONE_LAYER, f'--workdir={tmp_path}/a', *args,
    monkeypatch=monkeypatch,
  )  # fmt: skip
  for setting, needed in (
    ('normalize_decay=True', 'weight_decay'),
    ('model.base_width=16', 'axes'),
  ):
    assert train(f'--config.{setting}') == 2
    assert capsys.readouterr().err == (
      f'error: {setting} would do nothing: optimizers/{name}.py takes no '
      f'{needed}.\n'
    )
  assert train('--config.diagnostics', '--config.num_steps=2') == 0
  line = helpers.lines(tmp_path / 'a')[0]
  assert line['decay/ratio/matrix'] == 0 < line['update/relative/matrix']
  can, cannot = decay_formulas.split(spec.names('optimizers'))
  assert cannot == [name] and new_optimizer in can


def test_the_contract_covers_a_new_optimizer(new_optimizer):
  """As if collected now, with no other edit."""
  contract = runpy.run_path(str(helpers.ROOT / 'tests/test_optimizers.py'))
  assert new_optimizer in contract['NAMES']
  each = contract['each'].mark
  marks = lambda f: getattr(f, 'pytestmark', [])
  found = [f for f in contract.values() if marks(f) == [each]]
  assert len(found) >= 8
  for test in found:
    test(new_optimizer)


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid(path):
  subprocess.run(['bash', '-n', path], check=True)
  assert path.read_text().startswith('#!')
  assert 'pipefail' in path.read_text()
  if shutil.which('shellcheck'):
    subprocess.run(['shellcheck', path], check=True)


def test_the_pod_recipe_passes_flags_on(tmp_path):
  """With a gcloud that prints what it was asked to do."""
  gcloud = tmp_path / 'gcloud'
  gcloud.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
  gcloud.chmod(0o755)
  environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  pod = lambda *args: subprocess.run(
    [helpers.ROOT / 'launch' / 'tpu' / 'pod.sh', *args],
    env=environment, capture_output=True, text=True,
  )  # fmt: skip
  done = pod('train', '--workdir=/mnt/a b', '--config=x.py:size=1b')
  assert done.returncode == 0
  assert '--worker=all' in done.stdout
  assert (
    r'launch.train --workdir=/mnt/a\ b --config=x.py:size=1b' in done.stdout
  )
  assert pod('delete').stdout.split()[:4] == [
    'compute',
    'tpus',
    'tpu-vm',
    'delete',
  ]
  usage = pod('remove')
  assert usage.returncode == 2
  assert 'pod.sh create' in usage.stderr


@pytest.mark.parametrize(
  ('error', 'sentence'),
  [
    (ValueError('RESOURCE_EXHAUSTED: Out of memory.\nmore'), 'ory. Less is'),
    (MemoryError(), 'not enough memory'),
    (
      RuntimeError('in "/a/b": No space left on device'),
      'left on device for /a/b; make room and the same command goes on.',
    ),
    (OSError(28, 'No space left on device'), 'no space left on device; make'),
    (
      OSError(122, 'Disk quota exceeded', '/a/b'),
      'disk quota exceeded for /a/b',
    ),
    (RuntimeError('x: File too large'), 'file too large; make room and'),
    (RuntimeError('a bug'), None),
  ],
)
def test_a_full_machine_is_one_sentence(error, sentence, monkeypatch, capsys):
  def fail():
    raise error

  monkeypatch.setattr(sys, 'argv', ['train'])
  fail.__module__ = train.__name__
  with pytest.raises(SystemExit if sentence else RuntimeError):
    cli.run(fail)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == bool(sentence) and (sentence or '') in ''.join(lines)


def test_libraries_are_quiet_about_what_is_reported(monkeypatch):
  """By every way in which they print; other lines stay."""
  seen = []
  monkeypatch.setattr(noise, '_hooks', [seen.append])
  for text in ('Event loop is closed', 'another'):
    about = {'exc_type': RuntimeError, 'exc_value': RuntimeError(text)}
    noise.unraisable(types.SimpleNamespace(**about))
  assert [str(x.exc_value) for x in seen] == ['another']
  monkeypatch.setattr(sys, 'unraisablehook', print)
  for _ in range(2):
    noise.quiet()
  assert noise._hooks == [seen.append, print]

  def record(text, error=None):
    about = (type(error), error, None) if error else None
    return logging.LogRecord('absl', logging.ERROR, '', 0, text, (), about)

  full = ValueError('RESOURCE_EXHAUSTED: "a":\nNo space left on device [os]')
  assert not noise.wanted(record('Task exception was never retrieved', full))
  assert not noise.wanted(record('Failed to get item metadata of x'))
  assert noise.wanted(record('Task exception', ValueError('another')))
  assert noise.wanted(record('I say: Failed to get item metadata'))


def test_a_ctrl_c_that_hits_a_callback_comes_again():
  about = {'exc_type': KeyboardInterrupt, 'exc_value': KeyboardInterrupt()}
  # A shell that starts the tests with & lets them ignore it.
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt):
      noise.unraisable(types.SimpleNamespace(**about))
      time.sleep(30)
  finally:
    signal.signal(signal.SIGINT, old)


_CACHE = """
import sys
from launch import cli
sys.argv = ['x', '--config=configs/debug.py']
config = cli.define_config()
def main():
  import jax
  print(jax.config.jax_compilation_cache_dir)
cli.run(main, 'configs/debug.py')
"""


def test_programs_are_compiled_once_per_machine():
  """The cache is chosen before a config imports jax."""
  environment = dict(os.environ)
  del environment['JAX_COMPILATION_CACHE_DIR']
  done = subprocess.run(
    [sys.executable, '-c', _CACHE],
    cwd=helpers.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.stdout.startswith(str(helpers.ROOT / '.cache' / 'jax'))


def test_the_help_of_merge_lists_every_method_with_its_knobs(
  monkeypatch, capsys
):
  assert tools.call(monkeypatch, 'merge', '--help') == 0
  lines = capsys.readouterr().out.split('Methods')[1].splitlines()
  for name in spec.names('merging'):
    (line,) = [x for x in lines if re.match(rf'  {name}[: ]', x)]
    knobs = spec.knobs('merging', name).items()
    assert all(f'{knob}={default}' in line for knob, default in knobs)
