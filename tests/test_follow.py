"""Floats of the optimizer that follow a schedule; a longer run keeps them."""

import numpy as np
import pytest

from launch.parts import curves
from lm import card, follow, log, loop, step
from lm.errors import UserError
from tests import helpers


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('weight_decay=0', lambda m, other: 0.2 * m),
    ('weight_decay=0.05', lambda m, other: 0.05 + 0.15 * m),
    ('weight_decay=0:cosine', lambda m, other: 0.2 * other),
  ],
)
def test_floats_that_follow(text, want):
  c = helpers.config('schedule=linear', follow=text, num_steps=100)
  c.optimizer.weight_decay = 0.2
  steps = np.arange(100)
  got = [follow.floats(c, s, step.floats(c))['weight_decay'] for s in steps]
  m, other = (curves.values({'name': n}, 100) for n in ('linear', 'cosine'))
  np.testing.assert_allclose(got, want(m, other), atol=1e-6)


@pytest.mark.parametrize(
  ('text', 'sentence'),
  [
    ('weight_deca=0', "Did you mean 'weight_decay'"),
    ('decay=0', "no float 'decay'"),
    ('b1', "'' is not a number"),
    ('b1=high', "'high' is not a number"),
    ('b1=nan', 'nan must be from 0.0 to 1.0'),
    ('eps=inf', 'inf must be from 0.0'),
    ('b1=1.5', '1.5 must be from 0.0 to 1.0'),
    ('b1=0.9,b1=1', "names 'b1' twice"),
    ('b1=0.9:cosin', "Did you mean 'cosine'"),
    ('b1=0.9:gone.csv', 'is not a file'),
  ],
)
def test_what_cannot_follow(text, sentence):
  with pytest.raises(UserError, match=sentence):
    loop.build(helpers.config(follow=text))


def test_the_optimizer_refuses_where_the_floats_end():
  c = helpers.config('optimizer=lion_k', follow='epsilon=0.5')
  c.optimizer.kernel, c.optimizer.epsilon = 'lp', 3.0
  with pytest.raises(UserError, match=r'epsilon=0.5 must exceed 1 for kernel='):
    loop.build(c)


@pytest.mark.parametrize(
  ('knobs', 'num_steps', 'legal'),
  [
    ({'follow': 'weight_decay=0:linear'}, 16, False),
    ({'follow': 'weight_decay=0:constant'}, 16, True),
    ({'follow': 'weight_decay=0'}, 16, True),
    ({'normalize_decay': True}, 16, False),
    ({'normalize_decay': True}, 8, True),
    ({}, 16, True),
  ],
)
def test_a_longer_run_has_the_same_floats_before(
  knobs, num_steps, legal, tmp_path
):
  old = helpers.config('schedule=constant', num_steps=8, **knobs)
  log.write_json(tmp_path / 'config.json', card.as_dict(old))
  log.write_multipliers(tmp_path, step.multipliers(old))
  new = helpers.config('schedule=constant', num_steps=num_steps, **knobs)
  card.check_config(tmp_path, new, 0)
  if legal:
    card.check_config(tmp_path, new, 8)
  else:
    with pytest.raises(UserError, match='another num_steps'):
      card.check_config(tmp_path, new, 8)
