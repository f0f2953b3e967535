"""Averages in the train state: of every iterate, at resume, at a branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lm import address, averages, card, loop
from lm.errors import UserError
from merging.engine import items
from tests import helpers

ON = {'checkpoint__moment': True, 'checkpoint__ema': '0.1,0.2'}
ITEMS = ('moment', 'ema_0.1', 'ema_0.2')


def _config(**checkpoint):
  return ConfigDict(
    {
      'checkpoint': {
        'every_steps': 5,
        'mean': True,
        'moment': False,
        'ema': '',
        **checkpoint,
      }
    }
  )


@pytest.mark.parametrize(
  ('width', 'g'),
  [(0.05, 16.9722), (0.1, 6.93720), (0.15, 3.55787), (0.2, 1.82621),
   (0.25, 0.71982)],
)  # fmt: skip
def test_exponent_of_a_relative_width(width, g):
  """2312.02696: the figures are those of the reference implementation."""
  assert averages.gamma(width) == pytest.approx(g, rel=1e-5)
  t = np.arange(1, 1001)
  p = np.diff((np.arange(1001) / 1000) ** (averages.gamma(width) + 1))
  mean = p @ t
  found = np.sqrt(p @ (t - mean) ** 2) / 1000
  assert found == pytest.approx(width, rel=1e-4)
  assert p.sum() == pytest.approx(1, abs=1e-15)
  if width == 0.1:  # a decay that holds: what is left of the learning rate
    assert found == pytest.approx(0.0999997, abs=5e-8)
    left = 1 - np.array([0.5, 0.8, 0.9, 0.95]) ** (averages.gamma(width) + 1)
    np.testing.assert_allclose(left, [0.996, 0.830, 0.567, 0.334], atol=5e-4)


def _weights(config, steps):
  """Reads the weights back: the iterate of step s is the s-th unit vector."""
  with jax.enable_x64(True):
    eye = jnp.eye(steps, dtype=jnp.float64)
    state = {n: {'x': jnp.zeros(steps)} for n in averages.init(config, {})}
    update = jax.jit(lambda a, s, x: averages.update(config, a, s, {'x': x}))
    for s in range(steps):
      state = update(state, jnp.int32(s), eye[s])
    return {name: np.asarray(tree['x']) for name, tree in state.items()}


def test_weights_of_all_averages_inside_jit():
  found = _weights(_config(moment=True, ema='0.05,0.25'), 13)
  for width in (0.05, 0.25):
    edges = (np.arange(14) / 13) ** (averages.gamma(width) + 1)
    np.testing.assert_allclose(
      found[f'ema_{width}'], np.diff(edges), atol=3e-16
    )
  # The third interval of five has three iterates so far.
  want = np.zeros(13)
  want[10:] = np.array([1, 2, 3]) / 6
  np.testing.assert_allclose(found['moment'], want, atol=1e-16)


def test_long_runs_do_not_lose_the_weight_to_rounding():
  """At a million steps 1 - 1/t has four digits in float32."""
  config, t = _config(ema='0.2'), 1_000_000
  zero, one = {'ema_0.2': {'x': jnp.zeros(())}}, {'x': jnp.ones(())}
  got = averages.update(config, zero, jnp.int32(t - 1), one)['ema_0.2']['x']
  want = 1 - (1 - 1 / t) ** (averages.gamma(0.2) + 1)
  assert float(got) == pytest.approx(want, rel=1e-5)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs') / 'whole'
  loop.train(helpers.config(**ON), path)
  return path


def test_checkpoints_hold_the_averages_of_every_iterate(whole, tmp_path):
  loop.train(helpers.config(checkpoint__every_steps=1), tmp_path)
  every = [helpers.leaves(tmp_path, s, 'params') for s in range(13)]
  plain = helpers.leaves(whole, 12, 'params')
  weights = {'moment': np.zeros(12)}
  weights['moment'][8:] = np.arange(1, 5) / 10
  for width in (0.1, 0.2):
    edges = (np.arange(13) / 12) ** (averages.gamma(width) + 1)
    weights[f'ema_{width}'] = np.diff(edges)
  for name in ITEMS:
    for key, value in helpers.leaves(whole, 12, name).items():
      iterates = np.stack([x[key] for x in every[1:]]).astype(np.float64)
      want = np.tensordot(weights[name], iterates, 1)
      np.testing.assert_allclose(value, want, atol=1e-6)
      assert np.abs(value - plain[key]).max() > 0
    path = address.item(whole, 12, name)
    meta, limits = items.metadata(path), items.context()
    stored = items.open_leaf(path, meta, min(items.leaves(meta)), limits)
    assert stored.spec().to_json()['metadata']['compressor'] is None, name
  for key, value in plain.items():  # the run itself is the same
    np.testing.assert_array_equal(value, every[12][key])


def _assert_same_averages(a, b):
  for name in ITEMS:
    want = helpers.leaves(a, 12, name)
    for key, value in helpers.leaves(b, 12, name).items():
      np.testing.assert_array_equal(value, want[key])


def test_resume_bit_for_bit(whole, tmp_path, monkeypatch):
  config = helpers.config(**ON)
  with monkeypatch.context() as m:
    m.setattr(loop.Preemption, 'reached', lambda self, n: n == 7)
    assert loop.train(config, tmp_path) == 'preempted'
  loop.train(config, tmp_path)
  _assert_same_averages(whole, tmp_path)


def test_a_branch_has_the_emas_of_its_parent(whole, tmp_path):
  loop.train(helpers.config(branch=f'{whole}@4', **ON), tmp_path / 'b')
  _assert_same_averages(whole, tmp_path / 'b')  # it changes nothing else
  other = helpers.config(branch=f'{whole}@4', checkpoint__ema='0.15')
  with pytest.raises(UserError, match=r'has no ema_0.15, an average since'):
    loop.train(other, tmp_path / 'c')
  assert not (tmp_path / 'c').exists()


def test_averages_lie_like_the_parameters():
  config = helpers.config(num_steps=2, mesh__data=2, mesh__fsdp=4, **ON)
  built = loop.build(config)
  shardings = jax.tree.map(lambda x: x.sharding, built.abstract)
  for name in ITEMS:
    assert shardings.averages[name] == shardings.params
  assert any(
    not s.is_fully_replicated for s in jax.tree.leaves(shardings.params)
  )


@pytest.mark.parametrize(
  ('knobs', 'sentence'),
  [
    ({'ema': '0.4'}, "'0.4' is repeated or is not a relative width"),
    ({'ema': '0.1,0.10'}, "'0.10' is repeated"),
    ({'ema': 'nan'}, "'nan'"),
    ({'ema': 'wide'}, "'wide'"),
    ({'moment': True, 'mean': False}, 'needs checkpoint.mean=True'),
  ],
)
def test_mistakes(knobs, sentence):
  knobs = {f'checkpoint__{k}': v for k, v in knobs.items()}
  with pytest.raises(UserError, match=sentence):
    loop.build(helpers.config(**knobs))


def test_a_run_older_than_a_knob_has_it_off():
  new = {'checkpoint': {'mean': True, 'ema': '', 'moment': False}}
  assert card.diff({'checkpoint': {'mean': True}}, new) == {}
  new['checkpoint']['ema'] = '0.1'
  assert list(card.diff({'checkpoint': {'mean': True}}, new)) == [
    'checkpoint.ema'
  ]
