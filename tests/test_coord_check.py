"""launch.coord_check: activations and singular values over the width."""

import re

import jax
import numpy as np
import pytest

from launch.parts import widths
from lm import loop, model, state, step
from tests import helpers, tools


def test_slopes_are_powers_of_the_width():
  for power in (-0.5, 0.0, 1.0):
    values = [3 * w**power for w in (32, 64, 256)]
    np.testing.assert_allclose(
      widths.slope((32, 64, 256), values), power, atol=1e-12
    )


def test_sizes_grow_together():
  config = helpers.config()  # d_model 32, 2 heads of 16, d_ff 64
  c = widths.at_width(config, 128, 'heads').model
  assert (c.d_model, c.num_heads, c.num_kv_heads, c.d_ff) == (128, 8, 8, 256)
  c = widths.at_width(config, 128, 'head_dim').model
  assert (c.d_model, c.num_heads, c.head_dim, c.d_ff) == (128, 2, 64, 256)
  assert config.model.d_model == 32


def test_top_singular_values_of_each_kind():
  """Against numpy's SVD of each layer as a matrix."""
  config = helpers.config(model__num_layers=2)
  net = model.build(config.model)
  before, after = (net.init(jax.random.key(i)) for i in range(2))
  run = widths.Trained(config, net, None, before, after)
  old, got = widths.singular_values(run)
  top = lambda x: np.linalg.svd(np.asarray(x), compute_uv=False)[0]
  q = [top(after[f'block_{i}']['attn']['q'].reshape(32, 32)) for i in range(2)]
  o = [top(before[f'block_{i}']['attn']['o'].reshape(32, 32)) for i in range(2)]
  np.testing.assert_allclose(got['q'], np.sqrt(np.mean(np.square(q))), 1e-5)
  np.testing.assert_allclose(old['o'], np.sqrt(np.mean(np.square(o))), 1e-5)
  np.testing.assert_allclose(got['head'], top(after['head']), 1e-5)
  assert sorted(got) == sorted(
    ['q', 'k', 'v', 'o', 'gate', 'up', 'down', 'embedding', 'head']
  )


def _slopes(base_width):
  """Of the RMS of changes in 4 steps, from width 32 to 128."""
  config = helpers.config(model__base_width=base_width, learning_rate=3e-3)
  both = [
    widths.activations(widths.train(widths.at_width(config, w, 'heads'), 4))[1]
    for w in (32, 128)
  ]
  return {k: widths.slope((32, 128), [b[k] for b in both]) for k in both[0]}


def test_a_rule_keeps_changes_alike_that_grow_without_it():
  rule, plain = _slopes(32), _slopes(0)
  assert sorted(rule) == ['attn', 'block', 'final_norm', 'logits', 'mlp']
  for kind in ('attn', 'logits'):
    assert abs(rule[kind]) < 0.35
    assert plain[kind] > 0.5


RATES = [2e-3 * 2**k for k in range(6)]


def _best(width, base_width):
  """The place in RATES of the lowest loss, a mean over steps 32 to 48."""
  knobs = {'num_layers': 1, 'num_kv_heads': 2, 'base_width': base_width}
  config = helpers.config(**{f'model__{k}': v for k, v in knobs.items()})
  config = widths.at_width(config, width, 'heads')
  built = loop.build(config)
  train_step = jax.jit(step.build_train(config, built.model))  # on one device
  tokens = [np.asarray(built.batch(n)) for n in range(48)]
  start = state.init(config, built.model, jax.random.key(0))
  losses = []
  for rate in RATES:
    s, found = start, []
    traced = {**step.floats(config), 'learning_rate': rate}
    for batch in tokens:
      s, metrics = train_step(s, batch, traced)
      found.append(metrics['train/loss'])
    losses.append(np.mean(jax.device_get(found[32:])))
  return int(np.argmin(losses))


def test_the_best_learning_rate_transfers_by_a_rule_alone():
  """From width 16 to 128 it moves by at most one factor of 2, else by more."""
  base = _best(16, 16)
  assert 0 < base < len(RATES) - 1
  assert abs(_best(128, 16) - base) <= 1
  assert base - _best(128, 0) >= 2


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--widths=32'], '--widths=32 must be two or more different'),
    (['--widths=32,a'], "--widths: 'a' is not a width"),
    (['--widths=-64'], "--widths: '-64' is not a width"),
    (['--widths=32,40'], 'at d_model=40, model.num_heads=2 x 40/32'),
    (['--of=sigma'], "--of='sigma' does not exist. Legal"),
    (['--grow=head'], "--grow='head' does not exist. Did you mean 'heads'"),
    (['--out=a.jpg'], "--out='a.jpg' must end in .png"),
    (['--num_steps=0'], '--num_steps=0: 0 is not a positive'),
    (['--widths=320000,640000'], 'averages need'),
    (['--config.width.decay=sqr'], "width.decay='sqr' does not exist"),
  ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, arguments, sentence):
  assert tools.call(monkeypatch, 'coord_check', *arguments) == 2
  assert sentence in capsys.readouterr().err


def test_the_command(monkeypatch, capsys, tmp_path):
  out = tmp_path / 'sigma.png'
  code = tools.call(
    monkeypatch, 'coord_check', '--widths=16,32', '--of=singular_values',
    '--num_steps=2', f'--out={out}', '--config.model.base_width=16',
    '--config.model.num_layers=1',
  )  # fmt: skip
  assert code == 0
  text = capsys.readouterr().out
  assert '2 x base width 16: matrices initial std x0.7071' in text
  rows = re.findall(r'│ (\w+) +│ +([\d.]+) │ +([\d.]+) │ ([-+.\d]+) │', text)
  assert len(rows) == 18
  for _, small, large, slope in rows:
    want = np.log2(float(large) / float(small))
    assert float(slope) == pytest.approx(want, abs=0.02)
  assert 'steps x shrinkage of a step by weight decay: 0.0006, 0.00042;' in text
  assert text.index('top singular value before') < text.index('value after')
  assert text.endswith(
    'Next: the same without a rule, --config.model.base_width=0\n'
  )
  assert 'all would, after 14142 steps' in text
  assert out.read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
  ('decay', 'said'),
  [
    ('independent', ': 0.2, 0.14;'),
    ('decoupled', ': 0.0004, 0.00028;'),
    ('none', 'No decoupled weight decay'),
  ],
)
def test_what_decay_forgets_is_that_of_its_mode(
  monkeypatch, capsys, tmp_path, decay, said
):
  code = tools.call(
    monkeypatch, 'coord_check', '--widths=16,32', '--of=singular_values',
    '--num_steps=2', f'--out={tmp_path}/x.png', '--config.model.base_width=16',
    '--config.model.num_layers=1', f'--config.optimizer.decay={decay}',
    '--config.learning_rate=0.002',
  )  # fmt: skip
  assert code == 0
  assert said in capsys.readouterr().out
