"""Arrays of an Orbax item directory, opened one by one without a device.

An item is what `ocp.args.StandardSave` writes: `_METADATA` names the leaves,
the arrays are zarr (version 2 or 3), in one OCDBT store or in plain files.
"""

import ast
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

# No cache and little concurrency: memory is what the caller reads.
_CONTEXT = {
  'cache_pool': {'total_bytes_limit': 0},
  'file_io_concurrency': {'limit': 4},
  'data_copy_concurrency': {'limit': 2},
}
FLOATS = ('float32', 'bfloat16', 'float16', 'float64')


def context() -> ts.Context:
  """Returns limits shared by the arrays of one merge."""
  return ts.Context(_CONTEXT)


def metadata(path: pathlib.Path) -> dict[str, Any]:
  """Returns the parsed `_METADATA` of an item.

  Raises:
    ValueError: `path` is not a readable item.
  """
  try:
    found = json.loads((path / '_METADATA').read_text())
    found['tree_metadata'].items()
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
    raise ValueError(
      f"'{path}' is not an Orbax item: its _METADATA cannot be read ({e})."
    ) from e
  return found


def leaves(meta: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
  """Returns {name of the array: its key path}, without empty nodes."""
  paths = (
    ast.literal_eval(key)
    for key, value in meta['tree_metadata'].items()
    if not value['value_metadata']['skip_deserialize']
  )
  return {'.'.join(p): p for p in paths}


def open_leaf(
  path: pathlib.Path, meta: Mapping[str, Any], name: str, limits: ts.Context
) -> ts.TensorStore:
  """Opens one array for reading; chunks that are missing are an error."""
  spec = {
    'driver': 'zarr3' if meta.get('use_zarr3') else 'zarr',
    'kvstore': _store(path, name, bool(meta.get('use_ocdbt'))),
    # Orbax may leave out chunks of zeros only where it says so.
    'fill_missing_data_reads': not meta.get(
      'store_array_data_equal_to_fill_value', False
    ),
  }
  return ts.open(spec, open=True, context=limits).result()


def create_leaf(
  path: pathlib.Path,
  name: str,
  *,
  shape: tuple[int, ...],
  dtype: str,
  chunk: tuple[int, ...],
  limits: ts.Context,
) -> ts.TensorStore:
  """Creates one array as Orbax's defaults do: zarr 2 in OCDBT, zstd."""
  spec = {
    'driver': 'zarr',
    'kvstore': _store(path, name, True),
    'dtype': dtype,
    'metadata': {
      'shape': list(shape),
      'chunks': list(chunk),
      'compressor': {'id': 'zstd', 'level': 1},
      'dimension_separator': '.',
    },
    'store_data_equal_to_fill_value': True,
  }
  return ts.open(spec, create=True, context=limits).result()


def write_metadata(path: pathlib.Path, like: Mapping[str, Any]) -> None:
  """Writes `_METADATA` with the tree of another item.

  The type is numpy's: jax.Array would tie the item to the devices that wrote
  it. A restore with abstract arrays gives jax.Array on any devices.
  """
  tree = json.loads(json.dumps(like['tree_metadata']))
  for node in tree.values():
    value = node['value_metadata']
    if not value['skip_deserialize']:
      value['value_type'] = 'np.ndarray'
      value.pop('write_shape', None)
  content = {
    'tree_metadata': tree,
    'use_ocdbt': True,
    'use_zarr3': False,
    'store_array_data_equal_to_fill_value': True,
    'custom_metadata': None,
  }
  (path / '_METADATA').write_text(json.dumps(content))


def _store(path, name, use_ocdbt):
  # Orbax writes a trailing slash: a scalar array has the same form.
  if not use_ocdbt:
    return {'driver': 'file', 'path': f'{path / name}/'}
  base = {'driver': 'file', 'path': f'{path}/'}
  return {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
