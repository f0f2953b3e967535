"""Small Orbax items for the tests of merging."""

import jax
import numpy as np
import orbax.checkpoint as ocp


def params(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {
    'block': {'w': rng.standard_normal((16, 6)).astype(dtype)},
    'layers.norm': rng.standard_normal(5).astype(dtype),
    'scale': np.asarray(rng.standard_normal(), dtype),
  }


def save(path, tree, chunk_bytes=None, **handler):
  chunks = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree
  )
  args = ocp.args.PyTreeSave(tree, save_args=chunks)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**handler)) as checkpointer:
    checkpointer.save(path, args)
  return path


# Enough for one chunk of `params`, and for two of those of 64 bytes.
SMALL = 2000


def restore(path):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype and x.shape == y.shape
    assert x.tobytes() == y.tobytes()


def sources(run, c, steps=(0, 100, 200, 300)):
  return [
    (run / f'checkpoints/{s}/params', x) for s, x in zip(steps, c, strict=False)
  ]


FORMATS = {
  'ocdbt, zarr 2': {},
  'ocdbt, zarr 3': {'use_zarr3': True},
  'files, zarr 2': {'use_ocdbt': False},
  'files, zarr 3': {'use_ocdbt': False, 'use_zarr3': True},
}
