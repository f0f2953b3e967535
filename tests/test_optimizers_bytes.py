"""Every optimizer at its default config on the tiny byte-level model."""

import shutil

import numpy as np
import pytest

from configs import base
from lm import data, loop, spec
from lm import run as run_lib
from tests import helpers

STEPS = 150


def _config(name):
  c = base.get_config(f'size=nano,optimizer={name}')
  c.num_steps = STEPS
  c.checkpoint.every_steps, c.eval.every_steps = STEPS // 2, STEPS
  c.eval.num_sequences = 64
  return c


def _unigram_entropy(batches):
  """Of the bytes that the run sees, in nats."""
  seen = np.concatenate([batches.batch(n).ravel() for n in range(STEPS)])
  p = np.bincount(seen) / seen.size
  return -np.sum(p[p > 0] * np.log(p[p > 0]))


@pytest.mark.slow
@pytest.mark.parametrize('name', spec.names('optimizers'))
def test_it_learns_more_than_frequencies_and_resumes(name, tmp_path):
  """Beats the unigram entropy; resumed at half way, the same bit for bit."""
  c = _config(name)
  whole, again = tmp_path / 'whole', tmp_path / 'again'
  assert loop.train(c, whole) == 'done'
  loss = run_lib.Run(whole).metrics['eval/loss'].value[-1]
  assert loss < _unigram_entropy(data.build(c).train), loss
  shutil.copytree(whole, again)
  shutil.rmtree(again / 'checkpoints' / str(STEPS))
  assert loop.train(_config(name), again) == 'done'
  helpers.assert_same_run(whole, again)
