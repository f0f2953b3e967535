"""eval.merged: the offline numbers, and a run that does not notice."""

import numpy as np
import pytest

from launch.parts import emulation
from lm import loop, online
from lm import run as run_lib
from lm.errors import UserError
from merging.engine import stream
from tests import helpers

KNOBS = {'num_steps': 12, 'checkpoint__every_steps': 2, 'eval__every_steps': 4,
         'checkpoint__ema': '0.1'}  # fmt: skip
MERGED = 'linear:6,linear:2,lawa:3,ema:0.1'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  found = {}
  for name, merged in (('off', ''), ('on', MERGED)):
    found[name] = tmp_path_factory.mktemp('runs') / name
    config = helpers.config('schedule=constant', eval__merged=merged, **KNOBS)
    loop.train(config, found[name])
  return found


def test_the_run_is_the_same(runs):
  on, off = helpers.lines(runs['on']), helpers.lines(runs['off'])
  assert any('merged/linear_6/loss' in line for line in on)
  plain = [
    {k: v for k, v in x.items() if not k.startswith('merged/')} for x in on
  ]
  assert plain == off
  for name in ('params', 'train', 'mean', 'ema_0.1'):
    want = helpers.leaves(runs['off'], 12, name)
    for key, value in helpers.leaves(runs['on'], 12, name).items():
      np.testing.assert_array_equal(value, want[key])


def test_losses_are_those_of_offline_merges(runs):
  run = run_lib.Run(runs['on'])
  plan = lambda method, **at: stream.combine(
    emulation.plan(run, emulation.parse_method(method), **at).sources
  )
  for end in (8, 12):
    want = {
      'linear_6': plan('decay', means=True, end=end, window=6),
      'linear_2': run.mean(end),
      'lawa_3': plan('uniform', end=end, window=6),
    }
    for name, params in want.items():
      step, loss = run.metrics[f'merged/{name}/loss']
      got = loss[step.tolist().index(end)]
      assert got == pytest.approx(run.losses(params).mean(), rel=1e-5)
  # What does not reach back far enough is not there.
  assert run.metrics['merged/linear_6/loss'].step.tolist() == [8, 12]
  assert run.metrics['merged/lawa_3/loss'].step.tolist() == [4, 8, 12]
  assert run.metrics['merged/ema_0.1/loss'].step.tolist() == [4, 8, 12]


def test_resume_reports_the_same(runs, tmp_path, monkeypatch):
  """Also where the checkpoints of two stops could push those of it out."""
  config = helpers.config(
    'schedule=constant', eval__merged=MERGED, checkpoint__keep_latest=3, **KNOBS
  )
  for at in (5, 7):
    with monkeypatch.context() as m:
      m.setattr(loop.Preemption, 'reached', lambda self, n, at=at: n == at)
      assert loop.train(config, tmp_path) == 'preempted'
  loop.train(config, tmp_path)
  assert helpers.lines(tmp_path) == helpers.lines(runs['on'])


@pytest.mark.parametrize(
  ('merged', 'more', 'sentence'),
  [
    ('linear', {}, 'legal: linear:STEPS'),
    ('cosine:4', {}, 'legal: linear:STEPS'),
    ('linear:3', {}, 'multiple of checkpoint.every_steps=2'),
    ('lawa:0', {}, 'must be at least 1'),
    ('ema:0.2', {}, "is not in checkpoint.ema='0.1'"),
    ('ema:wide', {}, "'ema:wide' is not in checkpoint.ema='0.1'"),
    ('linear:4', {'checkpoint__mean': False}, 'needs checkpoint.mean=True'),
    ('linear:4', {'eval__every_steps': 3}, 'eval.every_steps that is a'),
    ('linear:20', {}, 'needs 20 steps at a constant rate before an evaluation'),
    ('lawa:3', {'checkpoint__keep_latest': 2}, 'checkpoint.keep_latest=2'),
  ],
)
def test_mistakes(merged, more, sentence):
  config = helpers.config(eval__merged=merged, **{**KNOBS, **more})
  with pytest.raises(UserError, match=sentence):
    loop.build(config)


def test_a_width_is_a_number_however_written():
  config = helpers.config(eval__merged='ema:0.10', checkpoint__ema='0.1')
  assert [x.item for x in online.parse(config)] == ['ema_0.1']


def test_no_decay_is_emulated_where_the_rate_was_not_constant():
  """wsd of 12 steps: 2 of warm-up, then its decay from step 8 on."""
  config = helpers.config(
    'schedule=wsd', eval__merged='linear:4', **{**KNOBS, 'eval__every_steps': 2}
  )
  config.schedule.warmup, config.schedule.decay = 2 / 12, 4 / 12
  assert online._ends(config, 4) == {6, 8}
