"""The README's commands run as they stand, and what it quotes is true."""

import json
import os
import re
import shlex
import subprocess
import sys

from lm import spec
from tests import tools
from tests.helpers import ROOT

README = (ROOT / 'README.md').read_text()
CODE = ('configs', 'launch', 'lm', 'merging', 'optimizers', 'schedules')


def _block(name):
  return re.search(f'<!-- {name} -->\n(.*?)<!-- end -->', README, re.S)[1]


def test_the_tour(tmp_path, monkeypatch, capsys):
  """In a folder that has the code and nothing else, so that runs/ is new."""
  for folder in CODE:
    (tmp_path / folder).symlink_to(ROOT / folder)
  (tour,) = re.findall(r'```sh\n(.*?)```', README, re.S)
  commands = [x for x in tour.splitlines() if not x.startswith('#')]
  assert len(commands) >= 8
  environment = {
    **os.environ,
    'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
  }
  for line in commands:
    python, *arguments = shlex.split(line)
    assert python == 'python'
    done = subprocess.run(
      [sys.executable, *arguments],
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert done.returncode == 0, f'{line}\n{done.stdout}{done.stderr}'
  _notebook_snippet(tmp_path)
  _other_programs(tmp_path, monkeypatch, capsys)


def test_the_schedule_tools(tmp_path, monkeypatch, capsys):
  """The second block, in this process, with a tenth of the steps."""
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  monkeypatch.chdir(tmp_path)
  (block,) = re.findall(r'```shell\n(.*?)```', README, re.S)
  commands = [x for x in block.splitlines() if not x.startswith('#')]
  assert len(commands) >= 7
  for line in commands:
    short = re.sub(r'(num_steps=\d+)0\b', r'\1', line)
    short = short.replace('num_sequences=512', 'num_sequences=32')
    python, m, command, *arguments = shlex.split(short)
    assert (python, m) == ('python', '-m')
    code = tools.call(monkeypatch, command.removeprefix('launch.'), *arguments)
    assert not code, f'{short}\n{capsys.readouterr()}'
  refined, linear = (
    json.loads((tmp_path / 'runs' / name / 'config.json').read_text())
    for name in ('refined', 'linear')
  )
  assert refined['schedule']['name'] == 'table'
  assert refined['learning_rate'] == linear['learning_rate']
  for picture in ('runs/schedules.png', 'runs/lr_range.png'):
    assert (tmp_path / picture).read_bytes().startswith(b'\x89PNG')


def test_the_comparison(tmp_path, monkeypatch, capsys):
  """The command, with ten steps of a smaller model, two seeds, two methods."""
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  monkeypatch.chdir(tmp_path)
  block, sweep = re.findall(r'```bash\n(.*?)```', README, re.S)
  python, m, command, *arguments = shlex.split(block)
  assert (python, m, command) == ('python', '-m', 'launch.compare')
  short = ['--config=configs/compare.py:size=debug', '--config.num_steps=10']
  short += ['--config.eval.num_sequences=32', '--seeds=2', '--most=3']
  names = [x.removeprefix('--method=') for x in arguments if 'method' in x]
  rows = re.findall(r'^\| ([\w.,=]+) \|', _block('compare table'), re.M)
  assert rows == ['method', *names]
  optimizers = {name.partition(',')[0] for name in names}
  assert optimizers <= {*spec.names('optimizers')}
  few = [x for x in arguments if 'method' not in x or x[9:] in names[:2]]
  assert not tools.call(monkeypatch, 'compare', *few, *short)
  text = (tmp_path / 'runs' / 'compare' / 'compare.md').read_text()
  assert all(f'| {name} |' in text for name in names[:2])
  python, m, command, *arguments = shlex.split(sweep)
  assert (python, m, command) == ('python', '-m', 'launch.sweep')
  short[0] = '--config=configs/sweep.py:size=debug'
  assert not tools.call(monkeypatch, 'sweep', *arguments, *short[:3])
  runs = json.loads((tmp_path / 'runs' / 'sweep' / 'sweep.json').read_text())
  assert len(runs['runs']) == 2 * 5


def _notebook_snippet(folder):
  (code,) = re.findall(r'```python\n(from lm.run.*?)```', README, re.S)
  done = subprocess.run(
    [sys.executable, '-c', code + '\nprint(run.losses(emulated).mean())'],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert 0 < float(done.stdout.splitlines()[-1]) < 6, done.stderr


def _other_programs(folder, monkeypatch, capsys):
  """Export, import, sample, in this process; lm_eval is not installed."""
  monkeypatch.chdir(folder)
  (block,) = re.findall(r'```\n(python -m launch.export.*?)```', README, re.S)
  lines = [shlex.split(x, comments=True) for x in block.splitlines()]
  commands = [x[2:] for x in lines if x[:2] == ['python', '-m']]
  names = ['launch.export', 'launch.import_hf', 'launch.generate']
  assert [command for command, *_ in commands] == names
  for command, *arguments in commands:
    code = tools.call(monkeypatch, command.removeprefix('launch.'), *arguments)
    output = capsys.readouterr()
    assert not code, f'{command}\n{output}'
  assert output.out.startswith('def ')
  assert (folder / 'exports/tour/model.safetensors').is_file()
  assert (folder / 'runs/imported/config.json').is_file()


def test_the_example_optimizer_is_the_file():
  code = (ROOT / 'optimizers' / 'signum.py').read_text()
  assert _block('signum') == f'```python\n{code}```\n'


def test_links_and_named_files_exist():
  for target in re.findall(r'\]\(([^)#:]+)\)', README):
    assert (ROOT / target).exists(), target
  for path in re.findall(
    r'`((?:lm|configs|optimizers|launch)/\w+\.py)`', README
  ):
    assert (ROOT / path).exists(), path
