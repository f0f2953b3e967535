"""What tests of commands share: calls in this process, logs, their output."""

import json
import pathlib
import runpy
import shlex
import sys

import numpy as np
from absl import flags

from tests import helpers


def call(monkeypatch, name, *arguments, package='launch'):
  """Runs `python -m PACKAGE.NAME`; returns its exit code."""
  module = f'{package}.{name}'
  monkeypatch.setattr(sys, 'argv', [module, *map(str, arguments)])
  others = _take()
  flags.FLAGS.unparse_flags()
  try:
    runpy.run_module(module, run_name='__main__')
  except SystemExit as e:
    return e.code
  finally:
    _take()
    for flag_name, (flag, module) in others.items():
      flags.FLAGS[flag_name] = flag
      flags.FLAGS.register_flag_by_module(module, flag)
  raise AssertionError(f'{module} did not exit')


def _take():
  """Removes the flags of all commands; {name: (flag, module)} of them."""
  modules = {
    n: flags.FLAGS.find_module_defining_flag(n, '') for n in flags.FLAGS
  }
  ours = ('launch', 'benchmarks')
  found = {
    n: (flags.FLAGS[n], module)
    for n, module in modules.items()
    if n == 'config' or n.startswith('config.') or module.startswith(ours)
  }
  for n in found:
    delattr(flags.FLAGS, n)
  return found


def log(path, **columns):
  """A log with one line per step."""
  names, rows = list(columns), zip(*columns.values(), strict=True)
  lines = [
    json.dumps({'step': s, **dict(zip(names, map(float, row), strict=True))})
    for s, row in enumerate(rows)
  ]
  pathlib.Path(path).write_text('\n'.join(lines) + '\n')
  return path


def fake_run(name, **overrides):
  """A run directory without arrays: config, log and names of checkpoints."""
  run = pathlib.Path(name)
  c = helpers.config(overrides.pop('arg'), **overrides)
  (run / 'checkpoints' / '3200' / 'params').mkdir(parents=True)
  (run / 'checkpoints' / '2400' / 'params').mkdir(parents=True)
  (run / 'config.json').write_text(json.dumps(c.to_dict()))
  log(run / 'metrics.jsonl', **{'optim/lr': np.ones(9)})
  return name


def commands(output):
  """[(title, command)] of launch.extend."""
  lines = output.splitlines()
  return [
    (a, b) for a, b in zip(lines, lines[1:], strict=False) if a[:1] == '#'
  ]


def proposed(output):
  """(name, arguments) of the command that a tool ends with."""
  line = output.splitlines()[-1]
  assert line.startswith('Next: python -m launch.') and '...' not in line
  name, *words = shlex.split(line.removeprefix('Next: python -m launch.'))
  return name, words
