"""Imports point one way, and commands are fast where they need no device."""

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.helpers import ROOT

OURS = (
  'benchmarks', 'configs', 'launch', 'lm', 'merging', 'optimizers',
  'schedules', 'tests',
)  # fmt: skip
# What each folder may import of ours.
MAY = {
  'optimizers': ('optimizers',),
  'schedules': ('schedules',),
  'merging': ('merging',),
  'lm': ('lm',),
  'configs': ('configs', 'lm.spec', 'lm.errors'),
  'launch': ('launch', 'lm', 'configs', 'optimizers', 'schedules', 'merging'),
  'notebooks': ('lm.run', 'schedules', 'merging'),
  'benchmarks': OURS,
  'tests': OURS,
}
# Leaves, which can be copied into another project.
LIBRARIES = {
  'optimizers': ('jax', 'numpy', 'scipy', 'optax'),
  'schedules': ('jax', 'numpy', 'scipy', 'optax'),
  'merging': (
    'jax', 'numpy', 'scipy', 'optax', 'orbax', 'tensorstore', 'etils',
    'zstandard',
  ),
}  # fmt: skip
NOWHERE = ('clu', 'tensorflow', 'gin', 'pickle', 'dill', 'flax.training')


def imports(source: str) -> set[str]:
  """All imported names, in full: 'lm.spec', 'lm.errors.UserError'."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'relative import'
      found |= {f'{node.module}.{a.name}' for a in node.names}
  return found


def problems(path: str, source: str) -> list[str]:
  folder, found = path.split('/')[0], []
  for name in sorted(imports(source)):
    top = name.split('.')[0]
    if top in OURS and not _within(name, MAY[folder]):
      found.append(f'{path} imports {name}')
    standard = top in OURS or top in sys.stdlib_module_names
    libraries = LIBRARIES.get(folder)
    if libraries and not standard and not _within(name, libraries):
      found.append(f'{path} imports {name}; legal: {libraries}')
    if _within(name, NOWHERE):
      found.append(f'{path} imports {name}, which nothing may')
    if _within(name, ('flax.linen', 'flax.nnx')) and path != 'lm/model.py':
      found.append(f'{path} imports {name}; only lm/model.py may')
  return found


def _within(name, prefixes):
  return any(f'{name}.'.startswith(f'{p}.') for p in prefixes)


def _sources():
  """(path, source) of all Python files and notebooks of the repository."""
  for folder in MAY:
    for path in sorted((ROOT / folder).rglob('*.py')):
      yield path.relative_to(ROOT).as_posix(), path.read_text()
  for path in sorted((ROOT / 'notebooks').rglob('*.ipynb')):
    if '.ipynb_checkpoints' in path.parts:
      continue
    cells = json.loads(path.read_text())['cells']
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    lines = [x for x in '\n'.join(code).split('\n') if x[:1] not in '%!']
    yield path.relative_to(ROOT).as_posix(), '\n'.join(lines)


def test_imports_point_one_way():
  assert [
    p for path, source in _sources() for p in problems(path, source)
  ] == []


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('optimizers/x.py', 'from lm import spec'),
    ('optimizers/x.py', 'import flax'),
    ('schedules/parts/x.py', 'import orbax.checkpoint'),
    ('merging/x.py', 'import optimizers.adamw'),
    ('lm/x.py', 'def f():\n  from launch import cli'),
    ('lm/x.py', 'from flax import linen as nn'),
    ('lm/x.py', 'import pickle'),
    ('configs/x.py', 'from lm import data'),
    ('launch/x.py', 'from tests import helpers'),
    ('launch/x.py', 'from flax.training import train_state'),
    ('notebooks/x.ipynb', 'import lm.loop'),
  ],
)
def test_the_test_sees_a_wrong_import(path, source):
  assert len(problems(path, source)) == 1


@functools.cache
def _defined(path: pathlib.Path) -> set[str]:
  """All names that the top level of a file gives a value."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      found.add(node.name)
    elif isinstance(node, ast.Import | ast.ImportFrom):
      found |= {(a.asname or a.name).split('.')[0] for a in node.names}
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      found.add(node.id)
  return found


def missing(source: str) -> list[str]:
  """Names of our modules that a file uses and that these do not have."""
  modules, found = {}, []
  nodes = list(ast.walk(ast.parse(source)))
  for node in (n for n in nodes if isinstance(n, ast.ImportFrom)):
    here = ROOT.joinpath(*node.module.split('.'))
    for name in node.names:
      file = here / f'{name.name}.py'
      if file.is_file():
        modules[name.asname or name.name] = file
      elif node.module.split('.')[0] in OURS:
        parent = here if here.is_dir() else here.parent
        file = parent / ('__init__.py' if here.is_dir() else f'{here.name}.py')
        if name.name not in _defined(file):
          found.append(f'{node.module}.{name.name}')
  for node in (n for n in nodes if isinstance(n, ast.Attribute)):
    if isinstance(node.value, ast.Name) and node.value.id in modules:
      file = modules[node.value.id]
      if node.attr not in _defined(file) and node.attr[:2] != '__':
        found.append(f'{node.value.id}.{node.attr}')
  return found


def test_what_is_used_of_a_module_is_there():
  """Also in benchmarks and branches that no test runs."""
  found = {path: missing(source) for path, source in _sources()}
  assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
  'source',
  [
    'from lm.run import Runs',
    'from lm import run\nrun.Runs',
    'def f():\n  from launch.parts import judgement as j\n  j.cooldown(1)',
  ],
)
def test_the_test_sees_a_missing_name(source):
  assert len(missing(source)) == 1


def test_names_and_settings_need_no_jax():
  """What --help needs; jax alone costs most of a second."""
  modules = ['lm.spec', 'lm.errors', 'launch.cli', 'configs.base']
  code = (
    f'import sys, {", ".join(modules)}; lm.spec.names("optimizers"); '
    'sys.exit("jax" in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_files_are_short():
  """Rule 10; tests may be longer."""
  files = (p for f in OURS if f != 'tests' for p in (ROOT / f).rglob('*.py'))
  lines = {str(p): p.read_text().count('\n') for p in files}
  assert not {p: n for p, n in lines.items() if n > 300}


def _commands():
  files = sorted((ROOT / 'launch').glob('*.py'))
  return [p.stem for p in files if "__name__ == '__main__'" in p.read_text()]


def test_there_are_commands():
  assert {'train', 'evaluate', 'merge', 'emulate'} <= set(_commands())


@pytest.mark.parametrize('name', _commands())
def test_help_is_fast_and_writes_nothing(name, tmp_path):
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', '-m', f'launch.{name}', '--help'],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert f'python -m launch.{name}' in done.stdout
  imported = {x.split('|')[-1].strip() for x in done.stderr.splitlines()}
  assert 'launch.cli' in imported  # the report of -X importtime is there
  assert not imported & {'jax', 'jaxlib', 'orbax', 'grain', 'matplotlib'}
  assert list(pathlib.Path(tmp_path).iterdir()) == []
