"""Newton-Schulz on 8 devices: whole matrices, the bits and moves it takes."""

import collections
import contextlib
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm import axes as lm_axes
from optimizers.muon import muon
from optimizers.parts import owners

_LEAVES = {  # two stacks: 16 x 16 and 16 x 32
  'query': (('embed', 'heads', 'head_dim'), (16, 8, 2)),
  'out': (('heads', 'head_dim', 'embed'), (8, 2, 16)),
  'up': (('embed', 'mlp'), (16, 32)),
  'down': (('mlp', 'embed'), (32, 16)),
}


def _problem(layers, scan):
  """Returns axes and shapes of a scanned or an unrolled model."""
  if scan:
    found = {
      k: (('layers', *names), (layers, *shape))
      for k, (names, shape) in _LEAVES.items()
    }
  else:
    found = {f'{k}{i}': v for k, v in _LEAVES.items() for i in range(layers)}
  axes = {k: lm_axes.from_names(names) for k, (names, _) in found.items()}
  rng = np.random.default_rng(0)
  normal = lambda s: rng.standard_normal(s).astype(np.float32)
  return axes, {k: normal(shape) for k, (_, shape) in found.items()}


def _mesh(*sizes):
  names = ('data', 'fsdp', 'tensor')
  return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3)


def _step(axes, heads, params, state, grads):
  tx = muon(0.02, axes, heads=heads)
  updates, state = tx.update(grads, state, params)
  return jax.tree.map(lambda x, u: x + u, params, updates), state


def _run(mesh, layers, scan=True, heads='joint', ambient=True):
  """Returns collectives, and parameters on `mesh` and on one device."""
  axes, params = _problem(layers, scan)
  place = lambda spec: NamedSharding(mesh, spec)
  specs = jax.tree.map(place, lm_axes.partition_specs(axes))
  step = functools.partial(_step, axes, heads)
  state = jax.jit(muon(0.02, axes).init)(params)
  lies = lm_axes.like_params(state, params, specs, place(P()))
  arguments = params, state, jax.tree.map(np.cos, params)
  everywhere = specs, lies, specs
  sharded = jax.jit(step, in_shardings=everywhere, out_shardings=(specs, lies))
  with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
    compiled = sharded.lower(*arguments).compile()
  got = compiled(*jax.device_put(arguments, everywhere))[0]
  kinds = 'all-to-all|all-gather|all-reduce|collective-permute'
  found = re.findall(rf' ({kinds})(?:-start)?\(', compiled.as_text())
  return collections.Counter(found), got, jax.jit(step)(*arguments)[0]


def _same_bits(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def _close(got, want):
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
  jax.tree.map(close, got, want)


@pytest.mark.parametrize('layers', [8, 3])
def test_each_stack_goes_and_comes_back_by_one_all_to_all(layers):
  """3 layers of 2 parameters do not divide by 8: padding."""
  moves, got, want = _run(_mesh(1, 8, 1), layers)
  assert moves == {'all-to-all': 2 * 2}
  _same_bits(got, want)
  assert all(len(x.sharding.device_set) == 8 for x in got.values())


def test_unrolled_layers_form_the_same_stacks():
  moves, got, want = _run(_mesh(1, 8, 1), 4, scan=False)
  assert moves == {'all-to-all': 2 * 2}
  _same_bits(got, want)


def test_two_sharded_axes_take_two_all_to_alls_each_way():
  """And a replicated axis an all-gather of what each device owns.

  XLA lays the stacks out in another way here: sums of squares differ by a bit.
  """
  moves, got, want = _run(_mesh(2, 2, 2), 4)
  assert moves == {'all-to-all': 2 * 2 * 2, 'all-gather': 2}
  _close(got, want)


def test_replicated_parameters_share_the_work():
  moves, got, want = _run(_mesh(8, 1, 1), 4)
  assert moves == {'all-gather': 2}
  _same_bits(got, want)


def test_heads_as_matrices_of_their_own():
  _, got, want = _run(_mesh(1, 2, 4), 2, heads='split')
  _close(got, want)
  joint = _run(_mesh(8, 1, 1), 2)[2]
  assert np.abs(joint['query'] - want['query']).max() > 1e-3


def test_without_the_ambient_mesh_xla_gathers_in_every_iteration():
  """What the counts above are worth: the loop's body has one per product."""
  moves, got, want = _run(_mesh(1, 8, 1), 8, ambient=False)
  assert moves['all-gather'] >= 3
  _close(got, want)


def test_inside_a_shard_map_there_is_nothing_to_share():
  mesh = _mesh(8, 1, 1)
  x = np.arange(96, dtype=np.float32).reshape(8, 3, 4)
  f = lambda x: owners.apply(lambda y: 2 * y, x)
  with jax.set_mesh(mesh):
    inside = jax.shard_map(f, in_specs=P('data'), out_specs=P('data'))
    _same_bits(jax.jit(inside)(x), 2 * x)
    _same_bits(jax.jit(jax.vmap(f))(x[:, None]), 2 * x[:, None])
