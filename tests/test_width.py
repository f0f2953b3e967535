"""Width rules: the numbers of 2510.15262, and what reaches an optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import loop, model, spec, step, width
from lm.errors import UserError
from optimizers.lion_k import lion_k
from optimizers.parts import kernels, newton_schulz, roles, shape_scale
from tests import helpers
from tests import optimizer_problem as problem


def _config(d, base, arg='', **overrides):
  sizes = {'model__d_model': d, 'model__num_heads': d // 16,
           'model__num_kv_heads': d // 16, 'model__d_ff': 2 * d}  # fmt: skip
  return helpers.config(arg, model__base_width=base, **sizes, **overrides)


@pytest.mark.parametrize(
  ('d', 'decay', 'shrink', 'steps'),
  [
    (256, 0.1, 3.00e-4, 3333),
    (512, 0.1414, 2.12e-4, 4714),
    (1024, 0.2, 1.5e-4, 6667),
    (2048, 0.2828, 1.06e-4, 9428),
  ],
)
def test_the_corrected_rule(d, decay, shrink, steps):
  """Rate 3e-3 and decay 0.1 at width 256, as in the paper's set-up."""
  lr, wd = width.factors(_config(d, 256))['matrix']
  np.testing.assert_allclose(0.1 * wd, decay, rtol=3e-4)
  np.testing.assert_allclose(3e-3 * lr * 0.1 * wd, shrink, rtol=3e-3)
  np.testing.assert_allclose(1 / (3e-3 * lr * 0.1 * wd), steps, rtol=1e-3)
  # Top singular values, m^0.75 sqrt(rate / decay), do not move.
  np.testing.assert_allclose((d / 256) ** 0.75 * (lr / wd) ** 0.5, 1)


@pytest.mark.parametrize(
  ('rule', 'top', 'shrink'),
  [('constant', 1.68, 1 / 8), ('independent', 0.59, 1.0)],
)
def test_the_competing_rules_at_eight_times_the_width(rule, top, shrink):
  lr, wd = width.factors(_config(2048, 256, width__decay=rule))['matrix']
  np.testing.assert_allclose(8**0.75 * (lr / wd) ** 0.5, top, atol=0.006)
  np.testing.assert_allclose(lr * wd, shrink)


def test_factors_go_to_roles():
  config = _config(64, 32, width__embedding_decay=0.0, width__head_decay=3.0)
  axes = loop.build(config).model.axes
  found = {}
  for path, a in jax.tree_util.tree_leaves_with_path(axes):
    found.setdefault((a.lr_scale, a.decay_scale), set()).add(path[-1].key)
  assert found == {
    (0.5, 2**0.5): {'q', 'k', 'v', 'o', 'gate', 'up', 'down'},
    (1.0, 0.0): {'embedding'},
    (1.0, 3.0): {'head'},
    (1.0, 1.0): {'attn_norm', 'mlp_norm', 'final_norm'},
  }


def test_initial_values_and_logits():
  """m^-1/2 for matrices, 1 for the ends; logits by 1/m and by 1/head_dim."""
  rule, plain = _config(128, 32).model, _config(128, 0).model
  a, b = (model.build(c) for c in (rule, plain))
  x, y = (net.init(jax.random.key(0)) for net in (a, b))
  for p, q, meaning in zip(*map(jax.tree.leaves, (x, y, a.axes)), strict=True):
    factor = 0.5 if meaning.role == 'matrix' else 1.0
    np.testing.assert_allclose(p, factor * q, rtol=1e-6)
  tokens = jnp.arange(8)[None]
  logits = a.apply(x, tokens)
  np.testing.assert_allclose(4 * logits, b.apply(x, tokens), rtol=1e-5)
  assert a.head(x).shape == b.head(x).shape

  # q k / head_dim is q k / sqrt(head_dim) with q smaller by sqrt(head_dim).
  plain.base_head_dim = 4
  smaller = jax.tree_util.tree_map_with_path(
    lambda p, v: v / 2 if p[-1].key == 'q' else v, x
  )
  np.testing.assert_allclose(
    model.build(plain).apply(x, tokens), b.apply(smaller, tokens), rtol=1e-5
  )


def _moves(name, axes, lr, peak, wd, decay='independent'):
  """One update from a state of zeros."""
  config = spec.spec('optimizers', name, decay=decay)
  knobs = {'weight_decay': wd}
  tx = spec.build('optimizers', config, lr, axes, peak, floats=knobs)
  params, grads = problem.params(), problem.params(seed=1)
  return jax.tree.leaves(tx.update(grads, tx.init(params), params)[0])


@pytest.mark.parametrize(
  ('name', 'decay'),
  [(name, 'independent') for name in spec.names('optimizers')]
  + [('adamw', mode) for mode in ('decoupled', 'corrected', 'cautious')]
  + [('sgdw', 'coupled')],
)
def test_a_leaf_is_as_if_it_had_its_own_rate_and_decay(name, decay):
  """Factors in the axes of the matrices, against these knobs for all."""
  lr, peak, wd, s, k = 0.01, 0.04, 0.3, 0.25, 3.0
  axes = problem.axes()
  scale = lambda a: dataclasses.replace(a, lr_scale=s, decay_scale=k)
  scaled = jax.tree.map(lambda a: scale(a) if a.role == 'matrix' else a, axes)
  got = _moves(name, scaled, lr, peak, wd, decay)
  own = _moves(name, axes, s * lr, s * peak, k * wd, decay)
  rest = _moves(name, axes, lr, peak, wd, decay)
  for i, a in enumerate(jax.tree.leaves(axes)):
    want = own[i] if a.role == 'matrix' else rest[i]
    np.testing.assert_allclose(got[i], want, rtol=2e-5, atol=1e-8)
    assert a.role != 'matrix' or np.abs(own[i] - rest[i]).max() > 1e-4


@pytest.mark.parametrize('scale', sorted(shape_scale.SCALES))
def test_the_power_of_an_orthogonal_update_keeps_its_spectral_norm(scale):
  """Of square matrices, measured; so for any gradient."""
  norm = {}
  for d in (16, 64):
    x = jax.random.normal(jax.random.key(d), (1, d, d))
    u = newton_schulz.orthogonalize(
      x, coefficients='polar_express', steps=8, dtype='float32'
    )
    factor = shape_scale.factor(scale, (d, d), roles.infer((d, d)))
    norm[d] = factor * np.linalg.norm(u[0], 2)
  config = _config(64, 16, 'optimizer=muon', optimizer__scale=scale)
  lr = width.factors(config)['matrix'][0]
  np.testing.assert_allclose(norm[64] * lr, norm[16], rtol=0.05)
  assert width.factors(_config(64, 16))['matrix'][0] == 0.25  # AdamW


@pytest.mark.parametrize(
  ('choice', 'knobs', 'power'),
  [
    ('adamw', {}, -1),
    ('scion', {}, 0),
    ('adamuon', {}, -0.5),
    ('sgdw', {}, 0),
    ('adafactor', {}, -0.5),
    ('adafactor', {'optimizer__multiply_by_parameter_scale': False}, -1),
  ],
)
def test_the_power_of_methods_that_state_it(choice, knobs, power):
  config = _config(64, 16, f'optimizer={choice}', **knobs)
  assert width.lr_powers(config)['matrix'] == power


@pytest.mark.parametrize('name', ['scion', 'adamuon'])
def test_their_updates_keep_their_spectral_norm(name):
  """Of one normal gradient, at rates by the rule."""
  norm = {}
  for d in (32, 128):
    rate = 128 * width.factors(_config(d, 32, f'optimizer={name}'))['matrix'][0]
    tx = spec.get('optimizers', name)(rate, decay='none')
    g = {'w': jax.random.normal(jax.random.key(d), (d, d))}
    norm[d] = np.linalg.norm(tx.update(g, tx.init(g), g)[0]['w'], 2)
  np.testing.assert_allclose(norm[128], norm[32], rtol=0.15)


@pytest.mark.parametrize('kernel', sorted({*kernels.KERNELS} - {'quadratic'}))
@pytest.mark.parametrize('role', ['embedding', 'head'])
def test_embedding_and_head_move_as_by_the_sign(role, kernel):
  """Of a gradient of rank one: the spectral norm grows as m^1/2."""
  knobs = {'kernel': kernel, 'epsilon': 3.0 if kernel == 'lp' else 0.5}
  methods = [('lion_k', knobs)] + [('scion', {})] * (kernel == 'l1')
  for name, knobs in methods:
    norm = {}
    for d in (64, 256):
      given = {f'optimizer__{k}': v for k, v in knobs.items()}
      config = _config(d, 64, f'optimizer={name}', **given)
      rate, decay = width.factors(config)[role]
      np.testing.assert_allclose(rate * decay, 1)
      shape = (48, d) if role == 'embedding' else (d, 48)
      a = dataclasses.replace(roles.infer(shape), role=role)
      tx = spec.get('optimizers', name)(rate, {'w': a}, decay='none', **knobs)
      u, v = (jax.random.normal(jax.random.key(n), (n,)) for n in shape)
      g = {'w': jnp.outer(u, v)}
      norm[d] = np.linalg.norm(tx.update(g, tx.init(g), g)[0]['w'], 2)
    np.testing.assert_allclose(norm[256], 2 * norm[64], rtol=0.15)


@pytest.mark.parametrize('kernel', sorted(kernels.KERNELS))
def test_updates_of_lion_k_keep_their_spectral_norm(kernel):
  """Of a gradient of rank one, whose sign has a norm as its width."""
  norm, knobs = (
    {},
    {'kernel': kernel, 'epsilon': 3.0 if kernel == 'lp' else 0.5},
  )
  for d in (64, 256):
    given = {f'optimizer__{k}': v for k, v in knobs.items()}
    config = _config(d, 64, 'optimizer=lion_k', **given)
    tx = lion_k(width.factors(config)['matrix'][0], decay='none', **knobs)
    a, b = (jax.random.normal(jax.random.key(i), (d,)) for i in (d, d + 1))
    g = {'w': jnp.outer(a, b) / (d if kernel == 'quadratic' else 1)}
    norm[d] = np.linalg.norm(tx.update(g, tx.init(g), g)[0]['w'], 2)
  np.testing.assert_allclose(norm[256], norm[64], rtol=0.15)


@pytest.mark.parametrize('rule', sorted(width.DECAYS))
def test_a_decay_that_knows_no_rate_shrinks_as_much(rule):
  """decay=independent subtracts wd lr / peak x, so the rule has the rate."""
  shrink = {}
  for mode in ('decoupled', 'independent', 'corrected'):
    config = _config(64, 16, width__decay=rule, optimizer__decay=mode)
    axes = {'w': loop.build(config).model.axes['block_0']['mlp']['up']}
    x = {'w': jnp.ones((4, 4))}
    tx = spec.get('optimizers', 'adamw')(
      0.1, axes, 0.1, decay=mode, weight_decay=0.5
    )
    shrink[mode] = -tx.update({'w': jnp.zeros((4, 4))}, tx.init(x), x)[0]['w']
  # At the peak: times wd alone, not lr wd.
  np.testing.assert_allclose(
    0.1 * shrink['independent'], shrink['decoupled'], rtol=1e-6
  )
  np.testing.assert_allclose(
    shrink['corrected'], shrink['decoupled'], rtol=1e-6
  )


def test_at_its_base_width_a_rule_is_no_program():
  """The same text before compilation, so the same bits."""
  texts = []
  for base, head in ((0, 0), (32, 16), (16, 16)):
    built = loop.build(_config(32, base, model__base_head_dim=head))
    tokens = jax.ShapeDtypeStruct((8, 33), jnp.int32)
    traced = step.floats(helpers.config())
    with jax.set_mesh(built.mesh):
      lowered = built.train_step.lower(built.abstract, tokens, traced)
    init = built.init.func.lower(*built.init.args)
    texts.append(lowered.as_text() + init.as_text())
  assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
  ('knob', 'value', 'sentence'),
  [
    ('width__decay', 'sqr', "width.decay='sqr' does not exist. .*'sqrt'"),
    ('model__base_width', -1, r'model\.base_width=-1 must be 0 to'),
    ('model__base_head_dim', -8, r'model\.base_head_dim=-8 must be'),
  ],
)
def test_mistakes_are_one_sentence(knob, value, sentence):
  with pytest.raises(UserError, match=sentence):
    loop.build(helpers.config(**{knob: value}))
