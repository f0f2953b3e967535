"""What tests of whole runs share: a tiny config, commands, comparisons."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from configs import debug
from lm import address, checkpoint

ROOT = pathlib.Path(__file__).parents[1]


def config(arg='', **overrides):
  """The debug config, of one layer, which compiles sooner, with overrides."""
  c = debug.get_config(arg)
  c.model.num_layers = 1
  c.update_from_flattened_dict(
    {'num_steps': 12, 'checkpoint.every_steps': 4, 'eval.every_steps': 4}
  )
  c.update_from_flattened_dict(
    {k.replace('__', '.'): v for k, v in overrides.items()}
  )
  return c


def command(*args, devices=1, check=True, **env):
  """Runs `python -m ...` as a user would; returns the finished process."""
  environment = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    **env,
  }
  done = subprocess.run(
    [sys.executable, '-m', *map(str, args)],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert not check or done.returncode == 0, done.stdout + done.stderr
  return done


def lines(run):
  """metrics.jsonl without what differs between two runs: the speed."""
  text = pathlib.Path(run, 'metrics.jsonl').read_text()
  return [
    {k: v for k, v in json.loads(x).items() if not k.startswith('throughput')}
    for x in text.splitlines()
  ]


def leaves(run, step, name):
  """All arrays of an item, by path."""
  path = address.item(run, step, name)
  tree = checkpoint.restore_tree(path, checkpoint.abstract_item(path))
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in flat}


def assert_same_run(a, b):
  """Bit for bit: parameters, optimizer state, mean, metrics."""
  step = address.steps(a)[-1]
  assert address.steps(b)[-1] == step
  for name in ('params', 'train', 'mean'):
    left, right = leaves(a, step, name), leaves(b, step, name)
    assert left.keys() == right.keys()
    for key in left:
      np.testing.assert_array_equal(left[key], right[key], err_msg=key)
  assert lines(a) == lines(b)


def flat(tree):
  """A nested dict of arrays by path, as `leaves` gives them."""
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in found}
