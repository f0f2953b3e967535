"""Muon: axes, heads and layers; what it equals and what bounds it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import spec
from optimizers.adamw import adamw
from optimizers.muon import muon, scale_by_muon
from optimizers.parts import newton_schulz, roles
from optimizers.parts.nap import nap
from optimizers.parts.spectral_penalty import spectral_penalty
from optimizers.sgdw import sgdw
from tests import optimizer_problem as problem


def _paths(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in flat}


def test_muon_equals_optax_where_optax_is_told_the_axes():
  """Scanned query (L, D, H, K), joint and per head, and output (L, H, K, D)."""
  numbers = optax.contrib.MuonDimensionNumbers
  x = {'q': np.ones((2, 6, 2, 4)), 'o': np.ones((2, 2, 4, 6))}
  axes = {
    'q': roles.Axes(('',) * 4, 'matrix', (1,), (2, 3), (0,), (2,)),
    'o': roles.Axes(('',) * 4, 'matrix', (1, 2), (3,), (0,), (1,)),
  }
  grads = [
    {'q': a, 'o': b}
    for a, b in zip(
      problem.normal((2, 6, 2, 4)), problem.normal((2, 2, 4, 6)), strict=True
    )
  ]
  results = {}
  for heads, q in (('joint', (2, 3)), ('split', 3)):
    theirs = optax.contrib.muon(
      0.02,
      weight_decay=0.1,
      muon_weight_dimension_numbers={
        'q': numbers(1, q),
        'o': numbers((1, 2), 3),
      },
    )
    ours = muon(0.02, axes, heads=heads, bias_correction=True)
    got, want = problem.run(ours, x, grads), problem.run(theirs, x, grads)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), got, want
    )
    results[heads] = got['q']
  assert np.abs(results['joint'] - results['split']).max() > 1e-3


@pytest.mark.parametrize(
  ('bias_correction', 'want'),
  [(False, (0.045125, 0.0975)), (True, (0.31639, 0.84586))],
)
def test_weights_of_two_gradients(monkeypatch, bias_correction, want):
  """At step 2 with momentum .95, by hand: Nesterov of a mean, as Keller's."""
  monkeypatch.setattr(
    newton_schulz, 'orthogonalize_tree', lambda x, axes, **_: x
  )
  tx = scale_by_muon(
    None, momentum=0.95, nesterov=True, bias_correction=bias_correction,
    scale='keller', coefficients='keller', steps=5, dtype='float32',
  )  # fmt: skip
  first, second = jnp.diag(jnp.array([1.0, 0])), jnp.diag(jnp.array([0, 1.0]))
  _, state = tx.update(first, tx.init(first))
  u, _ = tx.update(second, state)
  np.testing.assert_allclose(jnp.diag(u), want, rtol=2e-5)


def test_short_stacks_change_no_bit(monkeypatch):
  """Alone on a CPU: see `newton_schulz._stacks`; a turned one is in each."""
  xs = [*problem.normal((6, 5, 7)), *problem.normal((5, 7, 5))]
  knobs = {'coefficients': 'keller', 'steps': 5, 'dtype': 'float32'}

  def run():
    tree = lambda xs: newton_schulz.orthogonalize_tree(
      xs, roles.of(xs), **knobs
    )
    return jax.jit(tree)(xs), str(jax.make_jaxpr(tree)(xs))

  short, text = run()
  monkeypatch.setattr(newton_schulz, '_stacks', lambda groups: groups)
  long, other = run()
  jax.tree.map(np.testing.assert_array_equal, short, long)
  assert text != other


@pytest.mark.parametrize('scan', [True, False])
def test_which_leaf_muon_treats_as_a_matrix(scan):
  """The list in full: the reason why roles are not read from shapes."""
  blocks = ['blocks'] if scan else ['block_0', 'block_1']
  want = {'head': 'rest', 'table': 'rest'}
  for b in blocks:
    want |= {f'{b}/norm': 'rest', f'{b}/query': 'matrix', f'{b}/out': 'matrix'}
  params, axes = problem.params(scan), problem.axes(scan)
  assert roles.treatment(params, axes) == want
  state = jax.eval_shape(muon(0.1, axes).init, params)
  owned = lambda kind: {path for path, k in want.items() if k == kind}
  assert _paths(state.matrices.momentum) == owned('matrix')
  assert _paths(state.rest.mu) == _paths(state.rest.nu) == owned('rest')
  shapes = roles.treatment(params)
  assert shapes['table'] == 'matrix', 'without axes, rank 2 is a matrix'


@pytest.mark.parametrize(
  'make',
  [spec.get('optimizers', n) for n in spec.names('optimizers')]
  + [lambda lr, ax: nap(spectral_penalty(sgdw(lr, ax), ax, 0.1), ax)],
)  # fmt: skip
def test_scanned_equals_unrolled(make):
  """Layers are a batch of matrices: each has its own norm and update."""
  scanned, unrolled = problem.params(), problem.params(False)
  unstack = lambda tree: {
    **{
      f'block_{i}': jax.tree.map(lambda x, i=i: x[i], tree['blocks'])
      for i in range(2)
    },
    **{k: v for k, v in tree.items() if k != 'blocks'},
  }
  assert jax.tree.structure(unstack(scanned)) == jax.tree.structure(unrolled)
  grads = [jax.tree.map(lambda x, i=i: jnp.cos(9 * x + i), scanned)
           for i in range(3)]  # fmt: skip
  got = problem.run(make(0.02, problem.axes()), scanned, grads)
  want = problem.run(
    make(0.02, problem.axes(False)), unstack(scanned), list(map(unstack, grads))
  )
  last = lambda tree: jax.tree.map(lambda x: x[-1], tree)
  hint = 'what is taken over a matrix leaves out its dimensions axes.batch'
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, err_msg=hint),
    unstack(last(got)),
    last(want),
  )


def test_weight_decay_bounds_the_operator_norm_of_muon():
  """Constant gradient: |W|_op <= max(p) / wd, reached within the band of p.

  With Keller's coefficients singular values end in [0.68, 1.203] / wd.
  """
  wd, lr = 0.5, 0.1
  g = jnp.asarray(problem.normal((4, 4), 1)[0], jnp.float32)
  tx = muon(lr, weight_decay=wd)

  def body(carry, _):
    w, state = carry
    updates, state = tx.update(g, state, w)
    w = w + updates
    return (w, state), jnp.linalg.norm(w, 2)

  w = jnp.zeros((4, 4))
  (w, _), norms = jax.jit(
    lambda w: jax.lax.scan(body, (w, tx.init(w)), length=300)
  )(w)
  assert norms.max() <= 1.203 / wd
  assert norms[-1] > 0.68 / wd


@pytest.mark.parametrize(
  'axes, shape, sentence',
  [
    (roles.Axes(('x',), 'matrix', (0,)), (3,), r'\(3,\).*matrix.* no matrix'),
    (roles.Axes(('x', 'y'), 'matrix', (), (1,)), (3, 4), 'is no matrix; legal'),
    (
      roles.Axes(('x', 'y', 'z'), 'matrix', (0,), (1,)),
      (3, 4, 5),
      r'batch=\(\) must have each dimension of .*shape \(3, 4, 5\) once',
    ),
    (
      roles.Axes(('x', 'y'), 'matrix', (0,), (1, 0)),
      (3, 4),
      'dimension .*once',
    ),
    (roles.Axes(('x',), 'bias'), (3,), "role='bias' does not exist; legal: '"),
    (roles.Axes(('x',), 'matrix', (0,)), (3, 4), 'name 1 dimensions'),
  ],
)
def test_mistakes_in_axes_are_one_sentence(axes, shape, sentence):
  x = {'w': jnp.ones(shape)}
  tx = muon(0.1, {'w': axes})
  with pytest.raises(ValueError, match=sentence):
    tx.update(x, tx.init(x), x)


def test_a_vector_is_adamws_or_refused():
  """Alone, `muon` gives it to AdamW; its direction has no use for it."""
  x = jnp.array([3.0, -4.0])
  u, _ = muon(0.1, decay='none').update(x, muon(0.1).init(x), x)
  np.testing.assert_allclose(u, [-0.02, 0.02], rtol=1e-5)
  tx = scale_by_muon(
    None,
    momentum=0.9,
    nesterov=True,
    bias_correction=False,
    scale='keller',
    coefficients='keller',
    steps=5,
    dtype='float32',
  )
  with pytest.raises(ValueError, match=r"shape \(2,\) and role 'vector' is no"):
    tx.update(x, tx.init(x))


def test_nan_gradients_alone_need_apply_if_finite():
  """As everywhere in Optax; a run skips such steps by itself."""
  x, bad = jnp.eye(3), jnp.full((3, 3), jnp.nan)
  plain, safe = muon(0.1), optax.apply_if_finite(muon(0.1), 5)
  u, _ = plain.update(bad, plain.init(x), x)
  assert jnp.isnan(u).all()
  u, state = safe.update(bad, safe.init(x), x)
  np.testing.assert_array_equal(u, 0)
  u, _ = safe.update(x, state, x)
  assert jnp.isfinite(u).all() and (u != 0).any()


def test_the_rest_is_adamw_with_its_own_knobs():
  x, grads = problem.params(), [problem.params(seed=i) for i in range(1, 5)]
  knobs = {'b1': 0.7, 'b2': 0.8, 'eps': 1e-3, 'weight_decay': 0.5}
  ours = muon(0.1, problem.axes(), adam_lr_ratio=0.3, **knobs)
  theirs = adamw(0.03, problem.axes(), **knobs)
  got, want = (problem.run(tx, x, grads) for tx in (ours, theirs))
  for name in ('table', 'head'):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-12)
  norm = [tree['blocks']['norm'] for tree in (got, want)]
  np.testing.assert_allclose(*norm, rtol=1e-12)
