"""Merged checkpoints are exact, whatever wrote the sources."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from merging.engine import coefficients, items, stream
from tests import merging_items as made

BF16 = ts.bfloat16.numpy_dtype


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """<run>/checkpoints/<step>/params of four steps."""
  root = tmp_path_factory.mktemp('run')
  for i in range(4):
    made.save(root / f'checkpoints/{100 * i}/params', made.params(i))
  return root


@pytest.mark.parametrize('handler', made.FORMATS.values(), ids=made.FORMATS)
@pytest.mark.parametrize('dtype', [np.float32, BF16, np.float16, np.float64])
def test_one_checkpoint_is_itself_bit_for_bit(tmp_path, handler, dtype):
  tree = made.params(0, dtype)
  tree['layers.norm'][:2] = -0.0, np.finfo(np.float16).tiny
  source = made.save(tmp_path / 'source', tree, **handler)
  stream.merge([(source, 1.0)], tmp_path / 'out')
  made.assert_same_bits(made.restore(tmp_path / 'out'), tree)
  made.assert_same_bits(stream.combine([(source, 1.0)]), tree)


def test_weighted_sum_against_numpy_and_in_memory(run, tmp_path):
  c = [0.1, 0.2, 0.3, 0.4]
  stream.merge(made.sources(run, c), tmp_path / 'out')
  merged = made.restore(tmp_path / 'out')
  made.assert_same_bits(stream.combine(made.sources(run, c)), merged)
  trees = [made.params(i, np.float64) for i in range(4)]
  want = jax.tree.map(lambda *x: np.tensordot(c, np.stack(x), 1), *trees)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-7), merged, want
  )
  assert not np.allclose(merged['block']['w'], trees[0]['block']['w'])


def test_blocks_of_any_size_and_any_order_give_the_same_bits(run, tmp_path):
  sources = made.sources(run, [0.1, 0.2, 0.3, 0.4])
  want = stream.combine(sources)
  for max_bytes in (
    made.SMALL,
    4 * made.SMALL,
  ):  # one block at a time, and several
    got = stream.combine(sources, max_bytes=max_bytes)
    made.assert_same_bits(got, want)
  small = [
    (made.save(tmp_path / f'{i}/params', made.params(i), chunk_bytes=64), c)
    for i, (_, c) in enumerate(sources)
  ]
  for max_bytes in (made.SMALL, 1 << 30):
    got = stream.combine(small, max_bytes=max_bytes)
    made.assert_same_bits(got, want)
  made.assert_same_bits(stream.combine(sources[::-1]), want)
  double = stream.combine(sources, accumulate='float64')
  diff = abs(double['block']['w'] - want['block']['w']).max()
  assert 0 < diff < 3e-7, 'float32 and float64 sums should differ in rounding'


@pytest.mark.parametrize('count', [3, 4])
def test_identical_checkpoints(tmp_path, count):
  sources = [
    (made.save(tmp_path / f'{i}/params', made.params(0)), 1 / count)
    for i in range(count)
  ]
  got = stream.combine(sources)['block']['w']
  want = made.params(0)['block']['w']
  ulp = np.spacing(abs(want))
  assert (abs(got - want) <= (0 if count == 4 else ulp)).all()


def test_merges_of_merges_compose(run, tmp_path):
  a, b = tmp_path / 'a', tmp_path / 'b'
  stream.merge(made.sources(run, [0.25, 0.75]), a)
  stream.merge(made.sources(run, [0.5, 0.5], (200, 300)), b)
  nested = stream.combine([(a, 0.4), (b, 0.6)])
  flat = stream.combine(made.sources(run, [0.1, 0.3, 0.3, 0.3]))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), nested, flat
  )


def test_negative_coefficients_are_summed(run):
  trees = [made.params(i, np.float64)['block']['w'] for i in range(2)]
  got = stream.combine(made.sources(run, [-0.5, 1.5]))['block']['w']
  np.testing.assert_allclose(got, 1.5 * trees[1] - 0.5 * trees[0], atol=1e-6)


def test_sharded_equals_single_device(tmp_path):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  sharding = NamedSharding(mesh, P('a', 'b'))
  single, sharded = [], []
  for i in range(3):
    tree = made.params(i)
    single.append((made.save(tmp_path / f'one/{i}/params', tree), 1 / 3))
    tree['block']['w'] = jax.device_put(tree['block']['w'], sharding)
    sharded.append((made.save(tmp_path / f'many/{i}/params', tree), 1 / 3))
  meta = items.metadata(sharded[0][0])
  chunk = items.open_leaf(sharded[0][0], meta, 'block.w', items.context())
  assert chunk.chunk_layout.read_chunk.shape == (4, 3), 'not sharded'
  want = stream.combine(single)
  made.assert_same_bits(stream.combine(sharded), want)
  # One source of each kind: the block follows the largest chunk.
  mixed = [single[0], sharded[1], sharded[2]]
  made.assert_same_bits(stream.combine(mixed, max_bytes=made.SMALL), want)
  # The result restores onto other devices.
  stream.merge(sharded, tmp_path / 'out')
  small = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,))
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(small, P())
    ),
    want,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    made.assert_same_bits(checkpointer.restore(tmp_path / 'out', target), want)


def test_result_restores_as_an_item_of_a_checkpoint_manager(run, tmp_path):
  stream.merge(made.sources(run, [0.5, 0.5]), tmp_path / '7' / 'params')
  args = ocp.args.Composite(params=ocp.args.StandardRestore())
  with ocp.CheckpointManager(tmp_path) as manager:
    got = manager.restore(7, args=args)['params']
  made.assert_same_bits(got, stream.combine(made.sources(run, [0.5, 0.5])))


def test_bfloat16_sources_are_added_in_float32(tmp_path):
  c = [1 / 12] * 12
  trees = [made.params(i, BF16) for i in range(12)]
  sources = [
    (made.save(tmp_path / f'{i}/params', t), 1 / 12)
    for i, t in enumerate(trees)
  ]
  want = np.tensordot(c, [t['block']['w'].astype(np.float64) for t in trees], 1)
  wide = stream.combine(sources, dtype='float32')['block']['w']
  assert wide.dtype == np.float32
  np.testing.assert_allclose(wide, want, atol=2e-7)
  narrow = stream.combine(sources)['block']['w']
  assert narrow.dtype == BF16
  np.testing.assert_array_equal(narrow, wide.astype(BF16))


def test_observer_sees_every_block(run, tmp_path):
  seen = {}

  def observe(item, leaf, index, block):
    key = (item and item.parent.name, leaf)
    whole = seen.setdefault(key, np.zeros(_shape(leaf), np.float32))
    if len(index) == 1:  # of the leaf in C order
      whole = whole.reshape(-1)
    whole[index] += block

  def _shape(leaf):
    return {'block.w': (16, 6), 'layers.norm': (5,), 'scale': ()}[leaf]

  sources = made.sources(run, [0.5, 0.5])
  stream.merge(sources, tmp_path / 'out', observe=observe, max_bytes=made.SMALL)
  assert len(seen) == 9
  np.testing.assert_array_equal(
    seen['100', 'block.w'], made.params(1)['block']['w']
  )
  got = made.restore(tmp_path / 'out')['block']['w']
  np.testing.assert_array_equal(seen[None, 'block.w'], got)


def test_interval_means_equal_the_mean_of_all_iterates(tmp_path):
  # Knots 0, 2, 5: the linear decay is the mean of the iterates 1..5.
  thetas = [made.params(s) for s in range(6)]
  sources = []
  c = coefficients.interval_means([0, 2, 5])
  for (a, b), weight in zip([(0, 2), (2, 5)], c.means, strict=True):
    mean = jax.tree.map(
      lambda *x: np.mean(x, 0, dtype=np.float32), *thetas[a + 1 : b + 1]
    )
    path = made.save(tmp_path / f'{b}/mean', mean)
    sources.append((path, weight))
  got = stream.combine(sources)['block']['w']
  want = np.mean([t['block']['w'] for t in thetas[1:]], 0)
  np.testing.assert_allclose(got, want, atol=3e-7)
