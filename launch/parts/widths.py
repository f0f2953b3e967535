"""A config at several widths: short runs, growth of numbers (not a command)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure
from ml_collections import ConfigDict
from rich import progress

from launch.parts import look
from lm import loop, mesh, model, spec, step
from lm.errors import UserError, did_you_mean
from optimizers.parts import roles

GROW = {'heads': ('num_heads', 'num_kv_heads'), 'head_dim': ('head_dim',)}
_SEQUENCES = 8  # on which activations are measured

Numbers = dict[str, float]


class Trained(NamedTuple):
  """A short run; `before` and `after` are its parameters, on the host."""

  config: ConfigDict
  model: model.Model
  tokens_BT: np.ndarray
  before: Any
  after: Any


def at_width(config: ConfigDict, width: int, grow: str) -> ConfigDict:
  """Returns the config with d_model = width, d_ff and heads in proportion.

  Raises:
    UserError: a size would not be whole, or `grow` is none of GROW.
  """
  if grow not in GROW:
    raise UserError(
      f"--grow='{grow}' does not exist.{did_you_mean(grow, GROW)}"
    )
  c = ConfigDict(config.to_dict())
  old = c.model.d_model
  for name in ('d_ff', *GROW[grow]):
    size, rest = divmod(c.model[name] * width, old)
    if rest or not size:
      raise UserError(
        f'--widths: at d_model={width}, model.{name}={c.model[name]} x {width}/'
        f'{old} is not whole; legal: widths at which it is.'
      )
    c.model[name] = size
  c.model.d_model = width
  c.model.scan_layers, c.model.remat = False, 'none'
  c.schedule = spec.spec('schedules', 'constant')
  c.follow = c.eval.merged = ''
  c.checkpoint.update(mean=False, moment=False, ema='')
  return c.lock()


def train(config: ConfigDict, num_steps: int) -> Trained:
  """Takes `num_steps` at the peak learning rate; writes nothing.

  Raises:
    UserError: a step was not finite.
  """
  built = loop.build(config)
  mesh.check_memory(built.abstract)
  width = f'd_model={config.model.d_model}'
  with jax.set_mesh(built.mesh):
    state = built.init()
    before = jax.device_get(state.params)
    for n in progress.track(range(num_steps), width, transient=True):
      tokens = built.batch(n)
      state, _ = built.train_step(state, tokens, step.floats(config))
    after = jax.device_get(state.params)
  if int(state.bad_steps):
    raise UserError(
      f'{int(state.bad_steps)} of {num_steps} steps at {width} were not '
      f'finite; lower --config.learning_rate={config.learning_rate}.'
    )
  tokens_BT = built.data.eval_tokens_ES[:_SEQUENCES, :-1]
  return Trained(config, built.model, tokens_BT, before, after)


def activations(run: Trained) -> tuple[Numbers, Numbers]:
  """Returns RMS of activations after the run, and RMS of their change in it.

  Of each kind of sublayer, over its layers: 'attn', 'mlp', 'block' (residual
  stream), 'final_norm' and 'logits'.
  """

  @jax.jit
  def outputs(params):
    found = model.activations(run.config.model, params, run.tokens_BT)
    logits = run.model.apply(params, run.tokens_BT)
    return {**found['intermediates'], 'logits': logits}

  before, after = outputs(run.before), outputs(run.after)
  change = jax.tree.map(jnp.subtract, after, before)
  return _rms(after, _sublayer), _rms(change, _sublayer)


def singular_values(run: Trained) -> tuple[Numbers, Numbers]:
  """Returns the top singular value of matrices before the run, and after.

  Of each kind of matrix, the root mean square over its layers.
  """

  def top(params):
    axes = roles.of(params, run.model.axes)
    pairs = zip(*map(jax.tree.leaves, (params, axes)), strict=True)
    tree = jax.tree.structure(params)
    norm = lambda x: np.linalg.norm(np.asarray(x), 2, axis=(-2, -1))
    return tree.unflatten(
      [norm(roles.to_matrices(x, a)) if a.inputs else None for x, a in pairs]
    )

  last = lambda names: names[-1]
  return _rms(top(run.before), last), _rms(top(run.after), last)


def _sublayer(names):
  """'attn' of block_3/attn/__call__/0; the model's own output is final_norm."""
  names = [n for n in names if not n.isdigit() and n != '__call__']
  return re.sub(r'_\d+$', '', names[-1]) if names else 'final_norm'


def _rms(tree, name):
  groups = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    key = name([jax.tree_util.keystr((k,), simple=True) for k in path])
    square = jnp.mean(jnp.square(jnp.asarray(x, jnp.float32)))
    groups.setdefault(key, []).append(float(square))
  return {k: float(np.sqrt(np.mean(v))) for k, v in sorted(groups.items())}


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
  """Returns the slope of a line through (log width, log value)."""
  tiny = np.finfo(np.float32).tiny
  return float(
    np.polyfit(np.log(widths), np.log(np.maximum(values, tiny)), 1)[0]
  )


def draw(
  widths: Sequence[int], panels: Mapping[str, Sequence[Numbers]]
) -> figure.Figure:
  """Draws each panel {title: numbers at each width}, both axes logarithmic."""
  fig = figure.Figure(figsize=(5 * len(panels), 3.4), layout='constrained')
  axes = fig.subplots(1, len(panels), squeeze=False)[0]
  for ax, (title, numbers) in zip(axes, panels.items(), strict=True):
    for i, kind in enumerate(numbers[0]):
      values = [n[kind] for n in numbers]
      label = f'{kind} {slope(widths, values):+.2f}'
      ax.loglog(widths, values, label=label, **look.style(i))
    ax.set_xticks(widths, [str(w) for w in widths])
    ax.set_xticks([], minor=True)
    look.logarithmic(ax, 'y')
    ax.set(xlabel='d_model', title=title)
    ax.legend(fontsize=8, title='slope', title_fontsize=8, frameon=False,
              loc='upper left', bbox_to_anchor=(1, 1))  # fmt: skip
  return fig
