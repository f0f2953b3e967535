"""A run directory, for notebooks and tools: everything by one object.

run = Run('runs/a')
step, loss = run.metrics['train/loss']
params = run.params(1000)
logits = run.model.apply(params, tokens_BT)
"""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import address, branch, checkpoint, log
from lm import data as data_lib
from lm import evaluate as evaluate_lib
from lm import mesh as mesh_lib
from lm import model as model_lib
from lm import step as step_lib
from lm.errors import UserError, did_you_mean
from lm.foreign_logs import Series


class Run:
  """Reads a run directory; never writes.

  Raises:
    UserError: `path` is not a run directory.
  """

  def __init__(self, path: str | pathlib.Path) -> None:
    self.path = pathlib.Path(path)
    if not (self.path / 'config.json').is_file():
      raise UserError(
        f"'{path}' is not a run directory: it has no config.json."
      )

  @functools.cached_property
  def config(self) -> ConfigDict:
    return ConfigDict(log.read_config(self.path)).lock()

  @property
  def meta(self) -> dict[str, Any]:
    return log.read_meta(self.path)

  @property
  def metrics(self) -> dict[str, Series]:
    """All metrics by tag; an unknown tag is answered with the legal ones."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_lines(self.path / 'metrics.jsonl'):
      for tag, value in line.items():
        if tag != 'step':
          found.setdefault(tag, []).append((line['step'], value))
    tags = _Tags(
      (k, Series(*(np.array(x) for x in zip(*v, strict=True))))
      for k, v in found.items()
    )
    tags.run = self.path
    return tags

  @property
  def steps(self) -> list[int]:
    """Steps of the finished checkpoints."""
    return address.steps(self.path)

  @property
  def merged(self) -> list[str]:
    """Names of the merges."""
    found = self.path.glob('merged/*/merge.json')
    return sorted(p.parent.name for p in found)

  @functools.cached_property
  def model(self) -> model_lib.Model:
    """The model of the run, also without the GPU that it was trained on."""
    config = self.config.model.copy_and_resolve_references()
    if config.attention == 'cudnn' and jax.default_backend() != 'gpu':
      config.attention = 'auto'
    return model_lib.build(config)

  def params(self, at: int | str | None = None) -> Any:
    """Returns parameters on this process's device, whatever wrote them.

    Args:
      at: a step, the name of a merge, or None for the newest checkpoint.
    """
    if isinstance(at, str):
      text = f'{self.path}/merged/{at.removeprefix("merged/")}'
    else:
      text = str(self.path) if at is None else f'{self.path}@{at}'
    ref = address.locate(text)
    abstract = checkpoint.abstract_item(ref.item)
    if ref.step is None:
      return checkpoint.restore_merged(ref.item, abstract)
    return checkpoint.restore_item(ref.run, ref.step, 'params', abstract)

  def mean(self, step: int) -> Any:
    """Returns the mean of the iterates of the interval that ends at `step`."""
    ref = address.locate(f'{self.path}@{step}')
    if step == branch.first_step(self.config):
      raise UserError(f'{self.path} begins at step {step}: no mean ends there.')
    path = address.item(ref.run, step, 'mean')
    if not path.is_dir():
      raise UserError(f'{self.path} has no means: checkpoint.mean=False.')
    abstract = checkpoint.abstract_item(path)
    return checkpoint.restore_item(ref.run, step, 'mean', abstract)

  def schedule(self) -> np.ndarray:
    """Returns the multiplier of every update, float64 (num_steps,)."""
    stored = log.read_multipliers(self.path)  # a file may have changed since
    if stored is None or len(stored) != self.config.num_steps:
      return step_lib.multipliers(self.config)
    return stored.astype(np.float64)

  def learning_rates(self) -> np.ndarray:
    """Returns the learning rate of every update, float64 (num_steps,).

    Those before a branch began are its parent's, while it is there.
    """
    rates = self.config.learning_rate * self.schedule()
    if parent := branch.parent(self.config):
      first = branch.first_step(self.config)
      rates[:first] = Run(parent).learning_rates()[:first]
    return rates

  @functools.cached_property
  def data(self) -> data_lib.Data:
    """The data as they are now; warns if the run was trained on others."""
    found = data_lib.build(self.config)
    known = found.fingerprint
    if (self.path / 'meta.json').is_file():
      known = self.meta.get('data_fingerprint', known)
    if known != found.fingerprint:
      print(
        f'warning: the data of {self.path} have changed: it was trained on '
        f'{known}, its losses are measured on {found.fingerprint}.'
      )
    return found

  def losses(self, params: Any) -> np.ndarray:
    """Returns the loss of each validation batch in nats, float64."""
    return np.asarray(self._losses(params), np.float64)

  @functools.cached_property
  def _losses(self):
    mesh = mesh_lib.single()
    return evaluate_lib.build_losses(self.config, self.model, self.data, mesh)


class _Tags(dict):
  run: pathlib.Path

  def __missing__(self, tag: str) -> Series:
    hint = did_you_mean(tag, self)
    raise UserError(f"{self.run} has no metric '{tag}'.{hint}")
