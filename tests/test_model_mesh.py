"""The model on meshes of 8 virtual devices: numbers, and what is moved."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lm import loss, mesh, model
from tests.test_model import assert_close, build, config

MESH = {'num_kv_heads': 2, 'scan_layers': True, 'd_model': 32}


def _devices(*shape):
  names = 'data', 'fsdp', 'tensor'
  return mesh.make(ConfigDict(dict(zip(names, shape, strict=True))))


@functools.cache
def _on_mesh(*shape):
  """Loss, gradient and program, on one device without a shape."""
  net, params = build(**MESH)
  tokens = np.random.default_rng(1).integers(0, 256, (8, 81), np.int32)
  f = jax.value_and_grad(lambda p, t: loss.next_token(net, p, t, chunk=40).loss)
  if not shape:
    return *jax.jit(f)(params, tokens), ''
  devices = _devices(*shape)
  with jax.set_mesh(devices):
    place = mesh.param_shardings(devices, net.axes, params)
    batch = NamedSharding(devices, P(('data', 'fsdp')))
    args = jax.device_put(params, place), jax.device_put(tokens, batch)
    compiled = jax.jit(f, in_shardings=(place, batch)).lower(*args).compile()
    return *compiled(*args), compiled.as_text()


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2)], ids=['data', 'all'])
def test_a_mesh_gives_the_single_device_numbers(shape):
  value, grads, _ = _on_mesh()
  value8, grads8, _ = _on_mesh(*shape)
  assert jax.tree.leaves(grads8)[0].sharding.num_devices == 8
  np.testing.assert_allclose(value, value8, rtol=1e-5)
  assert_close(grads, grads8)


def test_meshes_move_no_activations_but_the_sums_of_tensor():
  """Data parallel: only sums of gradients. Sharded: parameters are gathered."""
  moves = 'all-gather', 'all-to-all', 'collective-permute'
  program = _on_mesh(8, 1, 1)[2]
  assert ' all-reduce(' in program or ' all-reduce-start(' in program
  assert not any(f' {m}' in program for m in moves)
  program = _on_mesh(2, 2, 2)[2]
  sizes = re.findall(r'= f32\[([\d,]+)\]\S* all-gather', program)
  assert sizes
  # Nothing gathered has a dimension of T or of B T on one device.
  found = {int(n) for s in sizes for n in s.split(',')}
  assert not found & {80, 160}, sizes


def test_parameters_are_made_on_the_mesh():
  net = model.build(config(**MESH))
  params = net.init(jax.random.key(0))
  devices = _devices(2, 2, 2)
  with jax.set_mesh(devices):
    place = mesh.param_shardings(devices, net.axes, params)
    made = jax.jit(net.init, out_shardings=place)(jax.random.key(0))
  assert made['head'].sharding.spec == P('fsdp', 'tensor')
  assert_close(params, made, rtol=0, atol=0)
