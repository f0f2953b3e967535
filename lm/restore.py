"""Where a run starts: the first of four places that exists."""

import math
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from lm import address, axes, card, checkpoint, log, opt_state, processes
from lm import step as step_lib
from lm.errors import UserError
from lm.run import Run
from lm.state import TrainState


def restore_or_init(
  config: ConfigDict,
  checkpoints: checkpoint.Checkpoints,
  abstract: TrainState,
  init: Callable[..., TrainState],
) -> tuple[TrainState, str]:
  """Returns the state that a run starts from, and a line that says which.

  The first that applies:
    1. the newest intact checkpoint in the workdir;
    2. `branch = 'run@step'`: parameters, optimizer state and step of that run;
    3. `init = 'run@step'` or 'run/merged/name': parameters only, at step 0;
       with `init_state` the optimizer state of a merge, too;
    4. scratch.

  Args:
    config: of the run.
    checkpoints: of the workdir.
    abstract: the state's shapes, dtypes and shardings.
    init: makes the state from scratch, or from parameters.
  """
  run = checkpoints.run
  state = checkpoints.restore_latest(
    lambda step: _resume(run, step, abstract, init)
  )
  if state is not None:
    return state, f'resumed from {checkpoints.run}@{int(state.step)}'
  if config.branch:
    _tell_changes(config, address.locate(config.branch))
  return begin(config, abstract, init)


def begin(
  config: ConfigDict, abstract: TrainState, init: Callable[..., TrainState]
) -> tuple[TrainState, str]:
  """Returns where a run begins that has no checkpoint: 2 to 4 of the above."""
  if config.branch:
    note = _other_model(config, config.branch)
    state = _branch(config, abstract, init)
    return state, f'branched from {config.branch}{note}'
  if config.init:
    note = _other_model(config, config.init)
    state = init(_params(config.init, abstract))
    if item := _merged_state(config, abstract):
      like = {'opt_state': abstract.opt_state}
      state = state.replace(**checkpoint.restore_merged(item, like))
      note = f' with its optimizer state{note}'
    return state, f'initialised from {config.init}{note}'
  return init(), 'from scratch'


def check_shapes(config: ConfigDict, abstract: TrainState) -> None:
  """Raises UserError unless the parameters to start from fit this model."""
  for text in filter(None, (config.branch, config.init)):
    ref = address.locate(text)
    have = _shapes(checkpoint.abstract_item(ref.item))
    want = _shapes(abstract.params)
    for key in {**want, **have}:
      there, here = (x.get(key, 'nothing') for x in (have, want))
      if there != here:
        raise UserError(
          f"The parameters of '{text}' do not fit this model: {key} is "
          f'{there} there and {here} here.'
        )
  _merged_state(config, abstract)


def _merged_state(config, abstract):
  """Returns where the optimizer state of the merge is; None without one.

  Raises:
    UserError: `init` is no merge, has no state, or that of another optimizer.
  """
  if not config.init_state:
    return None
  text = config.init
  ref = address.locate(text) if text else None
  if not ref or ref.step is not None:
    raise UserError(
      f"init_state=True needs init='RUN/merged/NAME', not '{text}'; the "
      'optimizer state of a checkpoint itself is taken over by branch.'
    )
  item = ref.item.with_name('state')
  if not item.is_dir():
    raise UserError(
      f"'{text}' has no optimizer state: merge with launch.merge --state, or "
      'use init_state=False.'
    )
  manifest = item.with_name('merge.json')
  about = log.read_typed(manifest, {'state.optimizer': str}, {})
  old, new = about['state']['optimizer'], config.optimizer.name
  have = _shapes(checkpoint.abstract_item(item))
  if old != new or have != _shapes({'opt_state': abstract.opt_state}):
    raise UserError(
      f"The optimizer state of '{text}' is that of {old} and does not fit this "
      f'{new}; use init_state=False.'
    )
  return item


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns {path: shape}; types of containers do not matter."""
  found = opt_state.by_path(tree)
  return {'/'.join(path): x.shape for path, x in found.items()}


def _resume(run, step, abstract, init):
  """Restores a whole state; its optimizer may have another layout by now."""

  def read(run, step, name, tree):
    if name != 'train':
      return checkpoint.restore_item(run, step, name, tree)
    params = lambda: read(run, step, 'params', abstract.params)
    return _train(run, step, abstract, lambda: init(params()), '')

  return checkpoint.restore(run, step, abstract, read)


def _branch(config, abstract, init):
  ref = address.locate(config.branch)
  state = init(_params(config.branch, abstract))
  train = _train(
    ref.run, ref.step, abstract, lambda: state, config.branch_state
  )
  trackers = {
    name: checkpoint.restore_item(ref.run, ref.step, name, tree)
    for name, tree in abstract.averages.items()
    if name.startswith('ema')  # the moment begins anew, like the mean
  }
  return state.replace(
    step=train['step'],
    opt_state=train['opt_state'],
    averages={**state.averages, **trackers},
  )


def _tell_changes(config, ref):
  """Prints what a branch has otherwise than its parent, and a jump of the rate.

  A cooldown has another schedule, which begins at the rate of its parent.
  """
  parent = Run(ref.run)
  changed = card.diff(card.as_dict(parent.config), card.as_dict(config))
  found = [
    f'{field} {before} -> {after}'
    for field, (before, after) in changed.items()
    if not field.startswith('branch')
  ]
  if found:
    print(f'unlike {ref.run}: {", ".join(found)}')
  try:
    before = parent.learning_rates()[: ref.step + 1][-1]
  except UserError:
    return  # a table that the parent read is gone
  after = config.learning_rate * step_lib.multipliers(config)[ref.step]
  if not math.isclose(before, after, rel_tol=1e-5):
    print(
      f'warning: the learning rate jumps: {after:.3e} after step {ref.step}, '
      f'{before:.3e} in {ref.run}.'
    )


def _train(run, step, abstract, fresh, policy):
  """Restores the item 'train', whose optimizer state may be another's.

  Args:
    run, step: the checkpoint.
    abstract: the state that is wanted.
    fresh: makes it from scratch; called if a leaf has to be initialised.
    policy: one of `opt_state.POLICIES`.
  """
  wanted = checkpoint.items(abstract)['train']
  item = address.item(run, step, 'train')
  stored = processes.together(
    lambda: checkpoint.abstract_item(item), checkpoint.Damaged
  )
  like = opt_state.by_path(wanted)
  if not policy and _shapes(stored) == _shapes(wanted):
    # Read as it was stored: transformations without a state may have come or
    # gone, and dtypes may have changed.
    _tell_casts(f'{run}@{step}', stored, like)
    same = {path: path for path in like}
    part = _parts(stored, same, like)
    train = checkpoint.restore_item(run, step, 'train', part)
    return opt_state.fill(wanted, same, opt_state.by_path(train))
  plan = opt_state.plan(
    stored.get('opt_state', ()), abstract.opt_state, abstract.params, policy
  )
  if jax.process_index() == 0:
    print(f'The optimizer state of {run}@{step}:')
    print(*(f'  {line}' for line in plan.lines), sep='\n')
  places = {
    ('opt_state', *old): ('opt_state', *new) for new, old in plan.source.items()
  }
  part = _parts(stored, places, like)
  train = checkpoint.restore_item(run, step, 'train', part)
  arrays = opt_state.by_path(train.pop('opt_state', ()))
  return {
    **train,
    'opt_state': opt_state.fill(fresh().opt_state, plan.source, arrays),
  }


def _tell_casts(where, stored, like):
  old = opt_state.by_path(stored)
  cast = {
    f'{x.dtype} to {like[path].dtype}': path
    for path, x in old.items()
    if x.dtype != like[path].dtype
  }
  if jax.process_index() == 0:
    for dtypes, path in cast.items():
      print(f'Cast from {dtypes}, of {where}: {"/".join(path)} and its like.')


def _parts(stored, places, like):
  """What to read of stored leaves: nothing, or onto their shardings here."""

  def one(path, x):
    path = axes.keys(path)
    if path[0] == 'opt_state' and path not in places:
      return checkpoint.PLACEHOLDER
    place = like[places.get(path, path)].sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  return jax.tree_util.tree_map_with_path(one, stored)


def _other_model(config, text):
  """Says what makes another function of the same parameters."""
  run = address.locate(text).run
  if not (run / 'config.json').is_file():  # a merge of another program's
    return ''
  there = card.other_model(config, ConfigDict(log.read_config(run)))
  return f' (trained with {there})' if there else ''


def _params(text: str, abstract: TrainState) -> Any:
  ref = address.locate(text)
  if ref.step is None:
    return checkpoint.restore_merged(ref.item, abstract.params)
  return checkpoint.restore_item(ref.run, ref.step, 'params', abstract.params)
