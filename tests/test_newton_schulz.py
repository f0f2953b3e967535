"""Newton-Schulz: every preset against the SVD, shapes, stacks, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimizers.parts import newton_schulz, roles, shape_scale

PRESETS = newton_schulz.PRESETS
SIGMA = [1, 0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001]
# Computed from the published coefficients in float64, for SIGMA above.
GOLDEN = {
  'keller': [0.696436, 0.682011, 0.765439, 0.746769, 0.712120, 0.758120,
             0.681832, 0.698917, 1.154366, 0.860039, 0.470544],
  'you': [0.978346, 0.979914, 0.985869, 1.031159, 1.019050, 1.010644,
          1.018771, 1.018025, 1.111505, 0.852461, 0.474982],
  'polar_express': [0.903537, 1.057436, 1.086403, 1.017614, 1.016459,
                    0.862474, 1.094275, 0.996775, 0.983027, 1.141078,
                    0.846647],
}  # fmt: skip
RANGES = {  # of p on [0.01, 1] and on [0.001, 1], to the printed digits
  'keller': ((0.682, 1.134), (0.471, 1.202)),
  'you': ((0.978, 1.032), (0.475, 1.145)),
  'polar_express': ((0.859, 1.141), (0.847, 1.141)),
  'polar_express8': ((1, 1), (1, 1)),
  'cubic': ((0.076, 1.0), (0.0076, 1.0)),
}


def _steps(name):
  return max(5, len(PRESETS[name].rows))


def _p(name, sigma):
  """What a preset makes of the singular values of x / (safety |x| + eps)."""
  rows, n = PRESETS[name].rows, _steps(name)
  for a, b, c in [*rows, *[rows[-1]] * (n - len(rows))]:
    sigma = a * sigma + b * sigma**3 + c * sigma**5
  return sigma


def _run(x, name, dtype='float32', steps=None, form='direct'):
  f = jax.jit(
    lambda x: newton_schulz.orthogonalize(
      x, coefficients=name, steps=steps or _steps(name), dtype=dtype, form=form
    )
  )
  return np.asarray(f(x))


def _oracle(x, name):
  u, s, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  preset, norm = PRESETS[name], np.linalg.norm(s, axis=-1, keepdims=True)
  s = _p(name, s / (preset.safety * norm + preset.eps))
  return (u * s[..., None, :]) @ v


@pytest.mark.parametrize('name', PRESETS)
@pytest.mark.parametrize('n', [8, 24])
def test_it_maps_the_singular_values_as_the_svd_says(name, n):
  """Condition 5: bfloat16 does not hold the directions of small values."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 8, n))
  u, _, v = np.linalg.svd(x, full_matrices=False)
  x = (u * np.geomspace(1, 0.2, 8)) @ v
  x[1] *= 1e3  # each matrix has its own norm
  expected = _oracle(x, name)
  got = _run(x.astype(np.float32), name)
  # Larger coefficients enlarge what was rounded.
  large = name in ('keller', 'polar_express', 'polar_express8')
  atol = 3e-6 if name.startswith('polar') else 1e-6
  np.testing.assert_allclose(got, expected, atol=atol)
  half = _run(x.astype(np.float32), name, 'bfloat16')
  assert half.dtype == np.float32
  error = np.linalg.norm(half - expected) / np.linalg.norm(expected)
  most = 5e-2 if large else 2.1e-2
  assert 5e-4 < error < most, 'above: wrong; below: not bfloat16'
  with jax.enable_x64(True):
    np.testing.assert_allclose(_run(x, name), expected, atol=1e-12)


@pytest.mark.parametrize('name', sorted({*PRESETS} - {'polar_express8'}))
def test_the_gram_form_is_the_same_map(name):
  """Its products are other ones: N > 1.5 M. Small values lose digits."""
  rng = np.random.default_rng(0)
  u, _, v = np.linalg.svd(rng.standard_normal((2, 16, 32)), full_matrices=False)
  for least, atol in ((0.1, 1e-5), (1e-4, 2e-3)):
    x = (u * np.geomspace(1, least, 16)) @ v
    got = _run(x.astype(np.float32), name, form='gram')
    np.testing.assert_allclose(got, _oracle(x, name), rtol=0, atol=atol)
    assert (got != _run(x.astype(np.float32), name)).any()
  square = x[:, :, :16].astype(np.float32)
  np.testing.assert_array_equal(
    _run(square, name, form='gram'), _run(square, name)
  )
  with jax.enable_x64(True):
    got = _run(x, name, form='gram')
  np.testing.assert_allclose(got, _oracle(x, name), rtol=0, atol=1e-10)


@pytest.mark.parametrize('form', newton_schulz.FORMS)
@pytest.mark.parametrize('n', [256, 512])
def test_symmetric_products_in_blocks_are_the_same_map(form, n, monkeypatch):
  """From 256 rows on; their flops are 3/4 but for the products with X."""
  rng = np.random.default_rng(0)
  u, _, v = np.linalg.svd(rng.standard_normal((1, 256, n)), full_matrices=False)
  x = (u * np.geomspace(1, 0.1, 256)) @ v
  expected = _oracle(x, 'you')
  with jax.enable_x64(True):
    got = _run(x, 'you', form=form)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
  x = x.astype(np.float32)
  got, flops = _run(x, 'you', form=form), _flops(x, form)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
  gram = form == 'gram' and n > 256
  # The direct form is a loop, whose body XLA counts once.
  symmetric = n + 17 * 256 if gram else n + 256
  least = 1.5 * symmetric + 2 * n
  assert flops == pytest.approx(256**2 * least, rel=0.02)
  monkeypatch.setattr(newton_schulz, '_blocks', lambda x: [x])
  np.testing.assert_allclose(_run(x, 'you', form=form), got, rtol=0, atol=1e-5)
  assert flops < 0.9 * _flops(x, form)


def _flops(x, form):
  f = lambda x: newton_schulz.orthogonalize(
    x, coefficients='you', steps=5, dtype='float32', form=form
  )
  return jax.jit(f).lower(x).cost_analysis()['flops']


def test_five_steps_for_a_block_of_gpt_cost_300_cubes_of_its_width():
  """4 M^2 N + 2 M^3 a step: 0.65 % of training at 124M and 491,520 tokens.

  Four matrices of d x d and two of d x 4 d, as XLA counts them; elementwise
  work, a part of 3 / d, is not in the formula.
  """
  d = 200
  square, wide = (
    _flops(np.zeros((1, d, n), np.float32), 'direct') for n in (d, 4 * d)
  )
  block = 5 * (4 * square + 2 * wide)
  assert block == pytest.approx(300 * d**3, rel=0.03)
  update = 12 * block * (768 / d) ** 3
  assert update == pytest.approx(1.63e12, rel=0.03)
  training = 6 * 12 * (4 + 2 * 4) * 768**2 * 491_520
  assert update / training == pytest.approx(0.0065, rel=0.03)


def test_an_odd_number_of_rows_is_one_block():
  x = np.random.default_rng(0).standard_normal((1, 257, 300))
  with jax.enable_x64(True):
    got = _run(x, 'keller')
  np.testing.assert_allclose(got, _oracle(x, 'keller'), rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_map_of_singular_values(name):
  """Each sigma is the first singular value of a diagonal matrix of norm 1."""
  s = np.array(SIGMA)
  x = np.stack([np.diag([a, np.sqrt(1 - a**2)]) for a in s]) * 1e6
  with jax.enable_x64(True):
    got = _run(x, name)[:, 0, 0]
  np.testing.assert_allclose(got, GOLDEN[name], atol=1e-6)


@pytest.mark.parametrize('name', RANGES)
def test_range_of_the_map(name):
  for low, (least, most) in zip((0.01, 0.001), RANGES[name], strict=True):
    p = _p(name, np.geomspace(low, 1, 200_001) / PRESETS[name].safety)
    digits = 4e-15 if name == 'polar_express8' else 6e-4
    assert abs(p.min() - least) < digits and abs(p.max() - most) < digits


def test_golden_matrix():
  """From the published coefficients; the last is the exact polar factor."""
  g = np.array([[[3.0, 0, 1], [0, 2, -1]]])
  golden = {
    'keller': [[1.05783758, -0.01590119, 0.36056312],
               [-0.02385179, 0.62571911, -0.32081015]],
    'you': [[0.94999998, 0.05240910, 0.29046211],
            [0.07861365, 0.89537847, -0.42148485]],
    'polar_express': [[0.85416296, 0.07926798, 0.24508700],
                      [0.11890197, 0.96578187, -0.44325695]],
    'polar_express8': [[0.9550046, 0.0530558, 0.2918070],
                       [0.0795837, 0.9019488, -0.4244465]],
  }  # fmt: skip
  with jax.enable_x64(True):
    for name, want in golden.items():
      np.testing.assert_allclose(_run(g, name)[0], want, atol=5e-7)


@pytest.mark.parametrize('shape', [(64, 64), (64, 128), (128, 512)])
def test_sizes_of_what_is_orthogonal(shape):
  """RMS sqrt(max side): 1 of the polar factor, 0.86 to 0.885 of Keller's.

  So 0.2 sqrt(max side) makes the RMS 0.17. Of Gaussian matrices of this size:
  at 32 x 128 it is 0.83, at 256 x 1024 0.96.
  """
  x = np.random.default_rng(0).standard_normal((8, *shape))
  with jax.enable_x64(True):
    exact, keller = (
      np.sqrt((_run(x, name, steps=steps) ** 2).mean() * max(shape))
      for name, steps in (('polar_express8', 12), ('keller', 5))
    )
  assert exact == pytest.approx(1, abs=1e-12)
  assert 0.86 <= keller <= 0.885
  axes = roles.infer(shape)
  rms = shape_scale.factor('moonlight', shape, axes) / max(shape) ** 0.5
  assert rms * exact == pytest.approx(0.2) and 0.17 < rms * keller < 0.18


def test_steps_beyond_the_preset_repeat_the_last_row():
  x = np.random.default_rng(1).standard_normal((1, 4, 6)).astype(np.float32)
  exact = _oracle(x, 'polar_express8')
  np.testing.assert_allclose(
    _run(x, 'polar_express8', steps=11), exact, atol=1e-5
  )
  assert np.abs(_run(x, 'cubic') - exact).max() > 0.02
  np.testing.assert_allclose(_run(x, 'cubic', steps=40), exact, atol=1e-5)


def test_zero_and_tiny_matrices_are_finite():
  x = np.zeros((2, 3, 3), np.float32)
  x[1] = 1e-30
  assert np.isfinite(_run(x, 'keller')).all() and not _run(x, 'keller')[0].any()


@pytest.mark.parametrize('heads', ['joint', 'split'])
def test_tree_of_stacks_flips_and_heads_equals_one_at_a_time(heads):
  rng = np.random.default_rng(2)
  tree = {
    'wide': rng.standard_normal((4, 6)),
    'tall': rng.standard_normal((2, 6, 4)),  # the same group, flipped
    'query': rng.standard_normal((2, 6, 2, 4)),  # layers, in, heads, out
    'out': rng.standard_normal((2, 4, 6)),  # heads, in, out
  }
  axes = {
    'wide': roles.infer((4, 6)),
    'tall': roles.infer((2, 6, 4)),
    'query': roles.Axes(('',) * 4, 'matrix', (1,), (2, 3), (0,), (2,)),
    'out': roles.Axes(('',) * 3, 'matrix', (0, 1), (2,), (), (0,)),
  }
  if heads == 'split':
    axes = {k: roles.split_heads(a) for k, a in axes.items()}
  with jax.enable_x64(True):
    got = newton_schulz.orthogonalize_tree(
      jax.tree.map(jnp.asarray, tree),
      axes,
      coefficients='keller',
      steps=5,
      dtype='float32',
    )
  want = lambda x: _oracle(x, 'keller')
  query = tree['query']
  if heads == 'joint':
    query = want(query.reshape(2, 6, 8)).reshape(2, 6, 2, 4)
  else:
    query = want(query.swapaxes(1, 2)).swapaxes(1, 2)
  np.testing.assert_allclose(got['query'], query, atol=1e-12)
  out = want(tree['out'].reshape(8, 6)).reshape(2, 4, 6)
  np.testing.assert_allclose(got['out'], out, atol=1e-12)
  for k in ('wide', 'tall'):
    np.testing.assert_allclose(got[k], want(tree[k]), atol=1e-12)


def test_scales_read_fan_in_and_fan_out_from_the_axes():
  a = roles.Axes(('',) * 3, 'matrix', (0, 1), (2,))
  b = roles.Axes(('',) * 3, 'matrix', (2,), (0, 1))
  values = {
    'keller': (1, 1.5**0.5),
    'moonlight': (0.2 * 6**0.5,) * 2,
    'spectral': ((4 / 6) ** 0.5, (6 / 4) ** 0.5),
  }
  for name, (wide, tall) in values.items():
    assert shape_scale.factor(name, (2, 3, 4), a) == pytest.approx(wide)
    assert shape_scale.factor(name, (2, 3, 4), b) == pytest.approx(tall)


def test_dropped_steps_are_refused():
  with pytest.raises(ValueError, match="drop steps of coefficients='you'.* 5 "):
    newton_schulz.check('you', 4, 'float32')
  newton_schulz.check('you', 6, 'float32')
  newton_schulz.check('keller', 1, 'bfloat16')


@pytest.mark.parametrize('steps, dtype', [(6, 'float32'), (5, 'bfloat16')])
def test_where_the_gram_form_would_blow_up_it_is_refused(steps, dtype):
  with pytest.raises(ValueError, match="ns_form='gram' needs .* not '.*' and"):
    newton_schulz.check('keller', steps, dtype, 'gram')
  newton_schulz.check('keller', 5, 'float32', 'gram')
