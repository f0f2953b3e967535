"""The training loop: whatever does I/O in training is called from here."""

import contextlib
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lm import (
  address,
  branch,
  card,
  checkpoint,
  data,
  evaluate,
  follow,
  log,
  mesh,
  model,
  online,
  processes,
  programs,
  restore,
  spec,
  state,
  step,
  width,
)
from lm.errors import UserError
from lm.preemption import Preemption


class Built(NamedTuple):
  """What a run consists of, before anything is computed."""

  mesh: jax.sharding.Mesh
  data: data.Data
  model: model.Model
  abstract: state.TrainState  # shapes, dtypes and shardings
  init: Any  # (parameters or None) -> TrainState
  train_step: Any  # (TrainState, tokens_BS, floats) -> (TrainState, metrics)
  evaluate: Any  # params -> {'eval/loss': ..., ...}
  batch_sharding: NamedSharding

  def batch(self, n: int) -> jax.Array:
    """Returns the batch of step n; each device reads its own rows."""
    read = lambda index: self.data.train.batch(n, index[0])
    shape = self.data.train.shape
    return jax.make_array_from_callback(shape, self.batch_sharding, read)


def build(config: ConfigDict, like: Built | None = None) -> Built:
  """Builds a run from its config; compiles and allocates nothing.

  Args:
    config: of the run.
    like: of a config with equal `programs.statics`, to use its programs.
  """
  _check(config)
  step.check_schedules(config)
  online.parse(config)
  traced = step.floats(config)
  if like is not None:
    state.optimizer(config, like.model.axes, config.learning_rate)  # may refuse
    tokens, change = data.build(config), {}
    if not np.array_equal(tokens.eval_tokens_ES, like.data.eval_tokens_ES):
      change['evaluate'] = evaluate.build(config, like.model, tokens, like.mesh)
    init = functools.partial(like.init.func, np.uint32(config.seed), traced)
    return like._replace(data=tokens, init=init, **change)
  devices = mesh.make(config.mesh)
  mesh.check_batch(
    devices, 'batch_size', config.batch_size, config.grad_accum_steps
  )
  tokens = data.build(config)
  net = width.apply(config, model.build(config.model))

  def init(seed, traced, params=None):
    key = jax.random.key(seed)
    return state.init(config, net, key, params, traced=traced)

  shapes = jax.eval_shape(lambda: init(config.seed, None))
  zero = config.mesh.zero
  shardings = mesh.state_shardings(devices, net.axes, shapes, zero)
  grads = mesh.gradient_shardings(devices, net.axes, shapes.params, zero)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  sharding = mesh.batch_sharding(devices)
  train_step = jax.jit(
    step.build_train(config, net, grads),
    in_shardings=(shardings, sharding, None),
    out_shardings=(shardings, NamedSharding(devices, P())),
    donate_argnums=0,
  )
  return Built(
    devices,
    tokens,
    net,
    abstract,
    functools.partial(
      jax.jit(init, out_shardings=shardings), np.uint32(config.seed), traced
    ),
    train_step,
    evaluate.build(config, net, tokens, devices),
    sharding,
  )


# Fields with the least and the largest legal value; both ends are legal.
_RANGES = {
  'num_steps': (1, 2**31 - 1),
  'seed': (0, 2**32 - 1),
  'seq_len': (1, 2**31 - 1),
  'learning_rate': follow.legal('learning_rate'),
  **dict.fromkeys(('clip_norm', 'z_loss', *step.OPTIONAL), (0.0, 1e30)),
  'width.lr_power': (-10.0, 10.0),
  **dict.fromkeys(('width.embedding_decay', 'width.head_decay'), (0.0, 1e30)),
  'eval.batch_size': (1, 2**31 - 1),
  'eval.every_steps': (0, 2**31 - 1),
  'checkpoint.every_steps': (1, 2**31 - 1),
  'checkpoint.keep_latest': (0, 2**31 - 1),
  'checkpoint.keep_every_steps': (0, 2**31 - 1),
  'log_every_steps': (1, 2**31 - 1),
  'max_bad_steps': (0, 2**31 - 1),
}


def _check(config):
  """Refuses numbers that no run can have, NaN among them."""
  state.check(config)
  ranges = dict(_RANGES)
  for knob in spec.floats('optimizers', config.optimizer):
    ranges[f'optimizer.{knob}'] = follow.legal(knob)
  for name, (least, most) in ranges.items():
    value = functools.reduce(getattr, name.split('.'), config)
    if not least <= value <= most:
      raise UserError(f'{name}={value} must be from {least} to {most}.')


def train(
  config: ConfigDict, workdir: str, earlier: dict[str, Built] | None = None
) -> str:
  """Trains, or continues to train, the run of a config in `workdir`.

  With `earlier`, the runs of this process by `programs.statics`, it uses the
  programs of one of them, or adds itself.

  Returns:
    The status: 'done', 'diverged' or 'preempted'.

  Raises:
    UserError: a config that makes no run, or not the one in `workdir`.
  """
  run = pathlib.Path(workdir)
  kind, earlier = programs.statics(config), {} if earlier is None else earlier
  like = earlier.get(kind)
  first, built = processes.together(
    lambda: (branch.begin(config, run), build(config, like))
  )
  processes.together(lambda: mesh.check_memory(built.abstract))
  steps = address.steps(run)
  if not steps:
    processes.together(lambda: restore.check_shapes(config, built.abstract))
  card.check_processes(config, built.data.fingerprint)
  main = jax.process_index() == 0
  notes = processes.together(
    lambda: card.Card(run, config, built.data.fingerprint) if main else None
  )
  lock = notes or contextlib.nullcontext()
  with lock, jax.set_mesh(built.mesh), Preemption() as preemption:
    processes.check_shared(run / card.LOCK)
    multipliers = step.multipliers(config)
    checkpoints = checkpoint.Checkpoints(run, config.checkpoint)
    earlier[kind] = built
    begins = like is None and config.num_steps not in steps
    if jax.default_backend() == 'cpu' and begins:
      built = built._replace(train_step=programs.compiled_beside(config, built))
    start, origin = restore.restore_or_init(
      config, checkpoints, built.abstract, built.init
    )
    writer = _writer(config, run, int(start.step)) if main else None
    if main:
      notes.start()
      log.write_multipliers(run, multipliers)
      print(f'{run}: {origin}; {built.data.summary}', flush=True)
    status = 'crashed'
    try:
      ended = _loop(
        config, built, start, first, checkpoints, writer, notes, preemption
      )
      checkpoints.close()
      status = ended
    finally:
      # After a crash it would wait for the others, or for a save that was cut.
      alone = jax.process_count() == 1 and not preemption.at_once
      if status == 'crashed' and alone:
        with contextlib.suppress(Exception):
          checkpoints.close()
      if main:
        writer.close()
        notes.finish(status)
  return status


def _writer(config, run, begin):
  return log.Writer(
    run, begin, config.num_steps,
    tokens=(branch.tokens(config, begin), config.batch_size * config.seq_len),
    flops_per_token=model.flops_per_token(config.model, config.seq_len),
    peak_flops=mesh.peak_flops(),
  )  # fmt: skip


def _loop(
  config, built, current, first, checkpoints, writer, notes, preemption
):
  """Runs the steps; returns the status.

  The order, which makes a resumed run the same run:
    1. evaluate the state before the step;
    2. save it, after the metrics of the step before are on disk;
    3. take the batch only after the save, and dispatch the step;
    4. write the metrics of the step before, while the device works.
  Nothing waits for the device but 4 (for a step that is done) and a save.
  """
  offset = branch.data_offset(config, checkpoints.run)
  traced = step.floats(config)
  begin, end = int(current.step), config.num_steps
  write = _Behind(writer, config)
  evaluation = online.build(config, checkpoints, built.evaluate, first)
  for n in range(begin, end):
    metrics = {}
    if _due(n, config.eval.every_steps):
      metrics = evaluation(current, n)
    stop = preemption.reached(n)
    if n == begin or stop or _due(n, config.checkpoint.every_steps):
      write.flush()
      write.diverged |= not _save(config, checkpoints, notes, current, n, first)
    if stop or write.diverged:
      return 'diverged' if write.diverged else 'preempted'
    current, new = built.train_step(current, built.batch(n - offset), traced)
    write(n, {**metrics, **new})
  write.flush()
  write.diverged |= not _save(config, checkpoints, notes, current, end, first)
  if write.diverged:
    return 'diverged'
  write(end, evaluation(current, end))
  write.flush()
  return 'done'


class _Behind:
  """Writes the metrics of a step when the next step has been dispatched."""

  def __init__(self, writer: log.Writer | None, config: ConfigDict) -> None:
    self._writer, self._config = writer, config
    self._waiting: tuple[int, Any] | None = None
    self.diverged = False

  def __call__(self, n: int, metrics: dict[str, jax.Array]) -> None:
    before, self._waiting = self._waiting, (n, metrics)
    if before:
      self._write(*before)

  def flush(self) -> None:
    """Writes what waits, and puts all lines on disk."""
    if self._waiting:
      self._write(*self._waiting)
      self._waiting = None
    if self._writer:
      self._writer.flush()

  def _write(self, n, metrics):
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    in_a_row = values.pop('train/bad_in_a_row', 0)
    self.diverged |= 0 < self._config.max_bad_steps <= in_a_row
    due = _due(n, self._config.log_every_steps) or 'eval/loss' in values
    if self._writer and (due or self.diverged):
      self._writer.write(n, values)


def _due(n: int, every: int) -> bool:
  return every > 0 and n % every == 0


def _save(config, checkpoints, notes, current, n, first):
  every = config.checkpoint.every_steps
  start = max(first, (n - 1) // every * every) if n > first else n
  finite = checkpoints.save(current, n, {'step': n, 'mean_start': start})
  if notes and finite:
    notes.saved(n)
  return finite
