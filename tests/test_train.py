"""A run: what it learns, refuses, and leaves on disk."""

import shutil

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from lm import address, checkpoint, keep, loop
from lm import run as run_lib
from lm.errors import UserError
from tests import helpers


def test_a_run_learns_and_explains_itself(whole):
  run = run_lib.Run(whole)
  loss = run.metrics['train/loss']
  assert loss.step.tolist() == list(range(12))
  assert run.metrics['eval/loss'].step.tolist() == [0, 4, 8, 12]
  assert run.metrics['eval/loss'].value[-1] < run.metrics['eval/loss'].value[0]
  assert run.steps == [0, 4, 8, 12]
  assert run.meta['status'] == 'done'
  assert run.meta['step'] == 12
  assert run.meta['data_fingerprint']
  assert run.meta['versions']['jax'] == jax.__version__
  np.testing.assert_array_equal(
    run.metrics['tokens'].value, run.metrics['tokens'].step * 8 * 32
  )
  np.testing.assert_allclose(
    run.metrics['optim/lr'].value, run.learning_rates(), rtol=1e-6
  )
  # The log's last evaluation, again from the checkpoint, on another mesh.
  loss = run.losses(run.params()).mean()
  np.testing.assert_allclose(
    loss, run.metrics['eval/loss'].value[-1], rtol=1e-5
  )
  with pytest.raises(UserError, match="Did you mean 'train/loss'"):
    run.metrics['train/los']


def test_tensorboard_reads_the_same_numbers(whole):
  events = event_accumulator.EventAccumulator(str(whole / 'tb')).Reload()
  run = run_lib.Run(whole)
  for tag in ('train/loss', 'eval/loss', 'grad/l1', 'optim/lr'):
    points = events.Scalars(tag)
    assert [p.step for p in points] == run.metrics[tag].step.tolist()
    np.testing.assert_allclose(
      [p.value for p in points], run.metrics[tag].value, rtol=1e-6
    )


def test_mean_is_the_mean_of_the_iterates(whole, tmp_path):
  """Every iterate is saved in a second run and averaged in float64."""
  every = tmp_path / 'every'
  config = helpers.config(checkpoint__every_steps=1, checkpoint__mean=False)
  loop.train(config, every)
  run = run_lib.Run(whole)
  iterates = {s: helpers.leaves(every, s, 'params') for s in range(13)}
  for knot in (4, 8, 12):
    mean = helpers.leaves(whole, knot, 'mean')
    assert checkpoint.read_meta(whole, knot)['mean_start'] == knot - 4
    for key, value in mean.items():
      steps = range(knot - 3, knot + 1)
      want = np.mean([iterates[s][key].astype(np.float64) for s in steps], 0)
      np.testing.assert_allclose(value, want, atol=1e-7)
      assert np.abs(value - iterates[knot][key]).max() > 0
  assert run.mean(12).keys() == run.params(12).keys()


def test_another_config_is_refused_with_the_field(whole, tmp_path, capsys):
  path = tmp_path / 'a'
  shutil.copytree(whole, path)
  before = (path / 'config.json').read_text()
  with pytest.raises(UserError, match=r'another optimizer\.b2') as kept:
    loop.train(helpers.config(optimizer__b2=0.99), path)
  assert 'optimizer.b2: 0.95 -> 0.99' in capsys.readouterr().out
  with pytest.raises(UserError, match='another num_steps'):
    loop.train(helpers.config(num_steps=16), path)  # wsd: another decay
  assert (path / 'config.json').read_text() == before
  loop.train(helpers.config(max_bad_steps=3), path)
  assert 'max_bad_steps: 10 -> 3' in capsys.readouterr().out
  assert kept.tb  # a traceback that is kept holds no run


@pytest.mark.parametrize(
  ('overrides', 'sentence'),
  [
    ({'branch': '{run}@5'}, r"@5' does not exist; .* has the steps 0, 4, 8"),
    ({'branch': 'nowhere@4'}, "'nowhere' does not exist"),
    ({'branch': '{run}@4', 'init': '{run}@4'}, 'exclude each other'),
    ({'branch': '{run}@12'}, 'not before num_steps=12'),
    ({'branch': '{run}@4', 'checkpoint__every_steps': 3}, 'that divides it'),
    ({'branch': '{run}@4', 'branch_data': 'x'}, 'Legal: continue, restart'),
    ({'branch': '{run}@4', 'branch_data': 'restart', 'data__order': 'ascend',
      'data__score': 'compressibility', 'data__order_end': 12},
     'counts the steps of the run, but its data begin at step 4'),
    ({'init': '{run}/merged/x'}, 'not a merge; merges of this run: none'),
    ({'init': '{run}@4', 'model__d_model': 64}, 'do not fit this model'),
    ({'batch_size': 7}, 'batch_size=7 must be a positive multiple of 8'),
    ({'eval__num_sequences': 12}, 'must be a multiple of eval.batch_size=8'),
    ({'mesh__fsdp': 3}, 'does not make 8 devices'),
    ({'mesh__tensor': 8}, r'mesh\.tensor=8 does not divide .* size 2'),
    ({'schedule__shape': 'lin'}, r'schedules/wsd\.py: .*linear'),
    ({'optimizer__decay': 'x'}, r'optimizers/adamw\.py: .*decoupled'),
    ({'num_steps': 0}, 'num_steps=0'),
    ({'checkpoint__every_steps': 0}, r'checkpoint\.every_steps=0'),
    ({'clip_norm': -1.0}, r'clip_norm=-1'),
  ],
)  # fmt: skip
def test_mistakes_are_one_sentence(whole, tmp_path, overrides, sentence):
  filled = {
    k: v.format(run=whole) if isinstance(v, str) else v
    for k, v in overrides.items()
  }
  with pytest.raises(UserError, match=sentence):
    loop.train(helpers.config(**filled), tmp_path / 'new')
  assert not (tmp_path / 'new' / 'config.json').exists()


def test_non_finite_steps_are_skipped_counted_and_end_the_run(tmp_path):
  config = helpers.config(learning_rate=1e30, max_bad_steps=3)
  assert loop.train(config, tmp_path) == 'diverged'
  run = run_lib.Run(tmp_path)
  assert run.meta['status'] == 'diverged'
  bad = run.metrics['train/bad_steps'].value
  assert bad[-1] == 3
  saved = helpers.leaves(tmp_path, run.steps[-1], 'params')
  assert all(np.isfinite(x).all() for x in saved.values())


def test_keep_policies(tmp_path):
  config = helpers.config(
    checkpoint__every_steps=1, checkpoint__keep_latest=2,
    checkpoint__keep_every_steps=5,
  )  # fmt: skip
  loop.train(config, tmp_path)
  assert address.steps(tmp_path) == [0, 5, 10, 11, 12]


@pytest.mark.parametrize(
  ('saved', 'stay'),
  [
    ([0, 4, 8, 12], [4, 8, 12]),
    ([0, 4, 8, 9, 11, 12], [4, 8, 12]),
    ([0, 4, 8, 9, 11], [0, 4, 8, 11]),
    ([0, 20, 24, 28, 30], [20, 24, 28, 30]),
    ([0, 20, 24, 28, 32], [20, 24, 28, 32]),
    ([], []),
  ],
)
def test_stops_push_no_regular_checkpoints_out(saved, stay):
  config = helpers.config(
    checkpoint__every_steps=4, checkpoint__keep_latest=3,
    checkpoint__keep_every_steps=20,
  ).checkpoint  # fmt: skip
  # 0 is a multiple of all.
  assert keep.steps_kept(saved, config) == {*stay, *saved[:1]}
  with config.unlocked():
    config.keep_latest = 0
  assert keep.steps_kept(saved, config) == {*saved}
