"""Checkpoints: Orbax, asynchronous, atomic, with a fingerprint per leaf.

  <run>/checkpoints/<step>/{params,train,mean,meta}

`params`, `train` (optimizer state and counters), `mean` and the averages of
lm/averages.py are separate items, so that parameters alone load anywhere.
`meta` is JSON: the fingerprints, and the step after which `mean` starts.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from lm import address, fingerprint, keep, log, noise, processes
from lm.errors import UserError
from lm.state import TrainState

# Small chunks let a merge stream one checkpoint after the other through little
# memory; Orbax's default is one chunk per shard.
CHUNK_BYTES = 16 << 20
noise.quiet()
PLACEHOLDER = ocp.PLACEHOLDER  # in place of a leaf that is not to be read


@jax.jit
def _finite(tree: Any) -> jax.Array:
  found = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(found))


def items(state: TrainState) -> dict[str, Any]:
  train = {
    'step': state.step,
    'opt_state': state.opt_state,
    'bad_steps': state.bad_steps,
    'bad_in_a_row': state.bad_in_a_row,
  }
  found = {'params': state.params, 'train': train, 'mean': state.mean}
  found |= state.averages
  return {k: v for k, v in found.items() if jax.tree.leaves(v)}


class Checkpoints:
  """The checkpoints of one run directory, for the process that trains it."""

  def __init__(self, run: str | pathlib.Path, knobs: Any = None) -> None:
    """Opens them; `knobs`, a config.checkpoint, says which stay (all)."""
    self.run = pathlib.Path(run)
    policy = keep.Policy(knobs) if knobs else None
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy, cleanup_tmp_directories=True
    )
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    # By default each device cuts out and writes its part of what all have. Of a
    # single process this takes longer than to write arrays of a few chunks.
    least = CHUNK_BYTES if jax.process_count() == 1 else None
    types = ocp.type_handlers
    array = types.ArrayHandler(min_slice_bytes_for_replica_parallel=least)
    arrays = types.create_type_handler_registry((jax.Array, array))
    # zstd would save 8 % of the space of float32, and costs every reader time.
    plain = ocp.PyTreeCheckpointHandler(
      use_compression=False, type_handler_registry=arrays
    )
    handlers.add(None, ocp.args.PyTreeSave, plain)
    handlers.add('meta', ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    self._manager = ocp.CheckpointManager(
      (self.run / 'checkpoints').absolute(),
      options=options,
      handler_registry=handlers,
    )

  def save(self, state: TrainState, step: int, meta: dict[str, Any]) -> bool:
    """Starts to save `state`; returns when its arrays may be overwritten.

    A step that is saved already is left as it is. Parameters that are not
    finite are not saved, since they would push out good ones: returns False.
    """
    if step in self._manager.all_steps():
      return True
    if not _finite(state.params):
      return False
    saved = items(state)
    found = fingerprint.of(saved)
    marks = {k: fingerprint.by_path(v) for k, v in found.items()}
    args = {'meta': ocp.args.JsonSave({**meta, 'fingerprints': marks})}
    one = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    for name, tree in saved.items():
      every = jax.tree.map(lambda _: one, tree)
      args[name] = ocp.args.PyTreeSave(tree, save_args=every)
    self._manager.save(step, args=ocp.args.Composite(**args), force=True)
    return True

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()

  def restore_latest(
    self, read: Callable[[int], TrainState]
  ) -> TrainState | None:
    """Returns the newest intact state, None when nothing was ever saved.

    Args:
      read: restores the checkpoint of a step, or raises Damaged.

    Raises:
      UserError: there are checkpoints, but all of them are damaged.
    """
    saved, bare = address.steps(self.run), self._bare()
    newest = [*saved[-1:], *bare]
    processes.check_alike('The newest checkpoint', str(newest))
    damaged = [
      (step, Damaged(f'Checkpoint {self.run}@{step} has no params.'))
      for step in bare
    ]
    for step in reversed(saved):
      try:
        state = read(step)
      except Damaged as e:
        damaged.append((step, e))
        continue
      for bad, e in damaged:  # only now: something intact is left
        print(f'warning: {e} It is set aside in {self._set_aside(bad)}.')
      return state
    if damaged:
      raise UserError(
        f'All checkpoints of {self.run} are damaged. {damaged[0][1]}'
      )
    if (self.run / 'damaged').exists():
      raise UserError(
        f'{self.run} has damaged checkpoints and no other; use a new --workdir.'
      )
    return None

  def _bare(self) -> list[int]:
    """Returns steps without params, which Orbax counts as saved."""
    has = lambda s: address.item(self.run, s, 'params').is_dir()
    return sorted(s for s in self._manager.all_steps() if not has(s))

  def _set_aside(self, step: int) -> pathlib.Path:
    """Moves a damaged checkpoint away, so that its step can be saved anew."""
    folder = self.run / 'damaged'
    earlier = len(list(folder.glob(f'{step}*')))
    place = folder / (f'{step}.{earlier}' if earlier else str(step))
    if jax.process_index() == 0:
      folder.mkdir(exist_ok=True)
      (self.run / 'checkpoints' / str(step)).rename(place)
    processes.gather('moved')
    self._manager.reload()
    return place


class Damaged(UserError):
  """A checkpoint whose bytes are not those that were saved."""


def restore(
  run: str | pathlib.Path,
  step: int,
  abstract: TrainState,
  read: Callable[..., Any] | None = None,
) -> TrainState:
  """Restores a whole state, on any mesh, and verifies every leaf.

  Args:
    run, step: the checkpoint.
    abstract: shapes, dtypes and shardings of the state.
    read: reads an item; None = `restore_item`.

  Raises:
    Damaged: a file is missing or unreadable, or a fingerprint differs.
  """
  found = {
    name: (read or restore_item)(run, step, name, tree)
    for name, tree in items(abstract).items()
  }
  return TrainState(
    **found['train'],
    params=found['params'],
    mean=found.get('mean', ()),  # absent when the config switches it off
    averages={name: found[name] for name in abstract.averages},
  )


def restore_item(
  run: str | pathlib.Path, step: int, name: str, abstract: Any
) -> Any:
  """Restores an item of a checkpoint ('params', 'mean') and verifies it.

  Leaves of `abstract` that are PLACEHOLDER are not read; None comes back.
  """
  path = address.item(run, step, name)

  def read():
    want = read_meta(run, step)['fingerprints'][name]
    return restore_tree(path, abstract), want

  # Each process reads its shards: what one of them cannot read, none uses.
  whole = lambda: _read(f'Checkpoint {run}@{step}', read)
  tree, want = processes.together(whole, Damaged)
  tree = jax.tree.map(lambda x: None if x is PLACEHOLDER else x, tree)
  # Compared without types: a part of an item comes as dicts and lists.
  want = {fingerprint.untyped(k): v for k, v in want.items()}
  found = fingerprint.by_path(fingerprint.of(tree))
  wrong = [k for k, v in found.items() if want[fingerprint.untyped(k)] != v]
  if wrong:
    raise Damaged(
      f'Checkpoint {run}@{step} is damaged: {name}{wrong[0]} is not what was '
      'saved.'
    )
  return tree


def restore_tree(path: pathlib.Path, abstract: Any) -> Any:
  """Restores an Orbax item onto the shardings of `abstract`, unverified."""
  args = ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
  )
  # Not through a Checkpointer, which waits for the other processes.
  handler = ocp.PyTreeCheckpointHandler()
  return handler.restore(epath.Path(path.absolute()), args=args)


def _read(what: str, read: Callable[[], Any]) -> Any:
  """Returns `read()`; whatever it raises is Damaged."""
  try:
    return read()
  except Exception as e:  # Orbax raises this very class for a broken chunk
    cause = e
    while cause.__cause__:  # TensorStore names the file, Orbax its own object
      cause = cause.__cause__
    line = (str(cause) or type(cause).__name__).splitlines()[0]
    raise Damaged(f'{what} is unreadable: {line.rstrip(".")}.') from e


def restore_merged(path: pathlib.Path, abstract: Any) -> Any:
  """Restores an item of <run>/merged/<name>: 'params', or 'state' with --state.

  It is verified if launch.merge wrote it, in the precision in which it did.
  """
  whole = lambda like: _read(f"'{path}'", lambda: restore_tree(path, like))
  if (want := marks(path)) is None:
    return whole(abstract)
  like, stored = abstract, abstract_item(path)
  if jax.tree.structure(stored) == jax.tree.structure(abstract):
    like = jax.tree.map(lambda a, s: a.update(dtype=s.dtype), abstract, stored)
  tree = whole(like)
  found = fingerprint.by_path(fingerprint.of(tree))
  wrong = [k for k, v in found.items() if want.get(fingerprint.untyped(k)) != v]
  if wrong:
    raise Damaged(
      f'{path.parent} is damaged: {wrong[0]} is not what was saved.'
    )
  return jax.tree.map(lambda x, a: x.astype(a.dtype), tree, abstract)


def read_meta(run: str | pathlib.Path, step: int) -> dict[str, Any]:
  """Returns the JSON item of a checkpoint."""
  path = epath.Path(address.item(run, step, 'meta').absolute())
  return ocp.JsonCheckpointHandler().restore(path)


def marks(item: pathlib.Path) -> dict[str, int] | None:
  """Returns the fingerprints, by untyped path, that lie beside an item.

  None: it is of another program, or of another version of this one.
  """
  meta = item.parent / 'meta' / 'metadata'
  if (merged := item.parent / 'fingerprints.json').is_file():
    return log.read_json(merged)
  of_items = log.read_json(meta).get('fingerprints') if meta.is_file() else None
  if not isinstance(of_items, dict) or item.name not in of_items:
    return None
  return {fingerprint.untyped(k): v for k, v in of_items[item.name].items()}


def abstract_item(path: pathlib.Path) -> Any:
  """Returns shapes and dtypes of an Orbax item, on this process's device.

  Whatever devices wrote it: the target's sharding replaces the stored one.
  """
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as c:
      found = c.metadata(path.absolute()).item_metadata
    if found is None:
      raise ValueError('its metadata is damaged')
  except Exception as e:  # Orbax raises whatever broke
    raise Damaged(f"'{path}' is not a readable checkpoint: {e}.") from e
  place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place),
    found.tree,
  )
