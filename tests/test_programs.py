"""Runs that share compiled programs are the runs that they are alone."""

import jax
import numpy as np
import pytest

from lm import loop, programs
from lm.errors import UserError
from tests import helpers

SEEDS = (0, 1, 7, 2**31, 2**32 - 1)


def test_runs_that_share_programs_are_the_same_runs(tmp_path):
  """Bit for bit; other seed, rate and floats, also those of the first state."""
  config = lambda **changes: helpers.config(
    'optimizer=prodigy,schedule=wsd', **changes
  )
  changes = {'seed': 3, 'learning_rate': 1e-2, 'schedule__decay': 0.5,
             'optimizer__d0': 0.9, 'optimizer__b2': 0.9}  # fmt: skip
  earlier = {}
  loop.train(config(), tmp_path / 'first', earlier)
  loop.train(config(**changes), tmp_path / 'second', earlier)
  loop.train(config(**changes), tmp_path / 'alone')
  helpers.assert_same_run(tmp_path / 'second', tmp_path / 'alone')
  (built,) = earlier.values()
  assert built.train_step._cache_size() == 1
  assert built.init.func._cache_size() == 1
  first, second = (helpers.lines(tmp_path / x) for x in ('first', 'second'))
  assert first != second


def test_what_shares_programs():
  plain = helpers.config()
  for changes in (
    {'seed': 5},
    {'z_loss': 1e-4},
    {'clip_norm': 0.0},
    {'optimizer__weight_decay': 0.0},
  ):
    other = helpers.config(**changes)
    assert programs.statics(other) == programs.statics(plain)
  kinds = {
    programs.statics(helpers.config(**changes))
    for changes in (
      {},
      {'optimizer__decay': 'cautious'},
      {'qk_clip': 100.0},
      {'num_steps': 13},
      {'model__norm_eps': 1e-5},
      {'eval__num_sequences': 8},
    )
  }
  assert len(kinds) == 6
  clipped = (helpers.config(qk_clip=x) for x in (50.0, 100.0))
  assert len(set(map(programs.statics, clipped))) == 1


def test_a_float_that_moves_the_width_rule_is_no_number_of_a_step():
  kinds = set()
  for epsilon, base in ((1.5, 0), (4.0, 0), (1.5, 8), (4.0, 8)):
    config = helpers.config(
      'optimizer=lion_k', optimizer__kernel='lp', optimizer__epsilon=epsilon,
      model__base_width=base,
    )  # fmt: skip
    kinds.add(programs.statics(config))
  assert len(kinds) == 3


def test_a_later_setting_is_refused_as_alone():
  config = helpers.config('optimizer=lion_k')
  built = loop.build(config)
  for changes in ({'learning_rate': np.nan}, {'optimizer__b1': 2.0}):
    with pytest.raises(UserError) as alone:
      loop.build(helpers.config('optimizer=lion_k', **changes))
    with pytest.raises(UserError) as later:
      loop.build(helpers.config('optimizer=lion_k', **changes), like=built)
    assert str(alone.value) == str(later.value)


@pytest.mark.parametrize('seed', SEEDS)
def test_the_key_of_a_seed_is_that_of_jax(seed):
  data = jax.jit(lambda s: jax.random.key_data(jax.random.key(s)))
  want = jax.random.key_data(jax.random.key(seed))
  np.testing.assert_array_equal(data(np.uint32(seed)), want)


def test_what_a_file_held_is_not_shared(tmp_path):
  """A table and validation text that change between two runs."""
  table, text = tmp_path / 'table.json', tmp_path / 'eval.txt'
  earlier, losses, rates = {}, [], []
  for i, content in enumerate(('[1, 1]', '[0, 1]')):
    table.write_text(content)
    text.write_text(f'{i} is what it says. ' * 100)
    config = helpers.config(
      'schedule=table', num_steps=2, schedule__path=str(table),
      data__source='text', data__train=str(helpers.ROOT / 'lm/*.py'),
      data__eval=str(text), eval__num_sequences=8,
    )  # fmt: skip
    for name, known in (('shared', earlier), ('alone', {})):
      loop.train(config, tmp_path / f'{name}{i}', known)
    shared, alone = (tmp_path / f'{x}{i}' for x in ('shared', 'alone'))
    helpers.assert_same_run(shared, alone)
    losses.append(helpers.lines(shared)[0]['eval/loss'])
    rates.append(helpers.lines(shared)[0]['optim/lr'])
  assert losses[0] != losses[1]
  assert rates == pytest.approx([config.learning_rate, 0])
  # The same table, so the same programs, but for the other text.
  table.write_text('[1, 1]')
  for name, known in (('shared', earlier), ('alone', {})):
    loop.train(config, tmp_path / name, known)
  helpers.assert_same_run(tmp_path / 'shared', tmp_path / 'alone')
  assert len(earlier) == 2
