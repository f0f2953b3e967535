"""Environment of the tests: 8 virtual CPU devices, persistent compile cache."""

import os
import pathlib

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
# On a busy machine 8 devices on 2 cores may be late; XLA would abort at 40 s.
# LLVM's level 1 shortens the tests, of which half is compilation, by a quarter;
# 0 rounds otherwise. What tests run as a user does, `helpers.command`, has none
# of these flags.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 '
  '--xla_cpu_collective_call_terminate_timeout_seconds=600 '
  '--xla_backend_optimization_level=1'
)
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(
  pathlib.Path(__file__).parents[1] / '.cache' / 'jax'
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['MPLBACKEND'] = 'Agg'


@pytest.fixture(scope='session')
def whole(tmp_path_factory):
  """An uninterrupted run of 12 steps; tests read it, and change copies."""
  from lm import loop
  from tests import helpers

  path = tmp_path_factory.mktemp('runs') / 'whole'
  assert loop.train(helpers.config(), path) == 'done'
  return path
