"""Width rules: knobs that were tuned at one width, used at another.

With `model.base_width`, the knobs of a config are those of the run at that
d_model, m = d_model / base_width (muP: 2203.03466, table 8; 2510.15262):

                   initial std  learning rate  weight decay     forward
  embedding        1            1 *            embedding_decay  1
  matrix           m^-1/2       m^lr_power     DECAYS[decay]    1
  head             1            1 *            head_decay       logits / m
  vector (norms)   1            1              none             1
  attention logits sqrt(base_head_dim) / head_dim, for 1 / sqrt(head_dim)

All entries are factors, 1 at m = 1: that run is the run without a rule, bit for
bit. d_ff and num_heads (or head_dim) are meant to grow like d_model.

lr_power is -1 for methods whose update has entries of one size (AdamW, Lion).
Others state theirs: those with a knob `scale` by SCALES, and a function
`width_power` of its knobs in the optimizer's file: the power of matrices, or
{role: power}; where that is not 0 for * the decay is divided by the rate's
factor, unless it has none, so that it shrinks as much. The rules reach every
optimizer through the axes: a role's lr, peak and wd in
`optimizers/parts/decay.py` are multiplied, u is not touched.
Differs from muP: epsilon of Adam, and SGD's embedding and head, do not scale.
"""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from lm import spec
from lm.errors import UserError, did_you_mean

# Power of m for the weight decay of matrices, with the rate as 1 / m. Top
# singular values go as m^(3/4) sqrt(rate / wd) (2510.15262): 'sqrt' keeps them,
# 'independent' keeps rate * wd, 'inverse_square' is nanochat's for Muon.
DECAYS = {
  'sqrt': 0.5,
  'constant': 0.0,
  'independent': 1.0,
  'inverse_square': -2.0,
}
# Power of m for the rate at which the spectral norm of an update is constant.
SCALES = {'keller': 0.0, 'spectral': 0.0, 'moonlight': -0.5}


def ratio(model: Any) -> float:
  """Returns m of the section `model` of a config; 1 if there is no base."""
  return model.d_model / model.base_width if model.base_width else 1.0


def factors(config: ConfigDict) -> dict[str, tuple[float, float]]:
  """Returns {role: (factor of the learning rate, of the weight decay)}.

  Raises:
    UserError: a decay rule that does not exist.
  """
  c = config.width
  if c.decay not in DECAYS:
    hint = did_you_mean(c.decay, DECAYS)
    raise UserError(f"width.decay='{c.decay}' does not exist.{hint}")
  if min(config.model.base_width, config.model.d_model) <= 0:
    # No rule, or refused by lm/model.py.
    return dict.fromkeys(('matrix', 'embedding', 'head', 'vector'), (1.0, 1.0))
  m = ratio(config.model)
  lr = {role: m**power for role, power in lr_powers(config).items()}
  wd = {'embedding': c.embedding_decay, 'head': c.head_decay, 'vector': 1.0}
  wd['matrix'] = m ** DECAYS[c.decay]
  if config.optimizer.get('decay') == 'independent':
    wd['matrix'] *= lr['matrix']  # this mode does not multiply by the rate
  else:
    wd |= {role: wd[role] / lr[role] for role in ('embedding', 'head')}
  return {role: (lr[role], wd[role]) for role in lr}


def lr_powers(config: ConfigDict) -> dict[str, float]:
  """Returns {role: power of m for the learning rate}."""
  own = spec.hook('optimizers', config.optimizer, 'width_power')
  if own is None:
    own = SCALES.get(config.optimizer.get('scale'), config.width.lr_power)
  if not isinstance(own, dict):
    own = {'matrix': own}
  return dict.fromkeys(('matrix', 'embedding', 'head', 'vector'), 0.0) | own


def apply(config: ConfigDict, net: Any) -> Any:
  """Returns the model with the factors in its axes, for optimizers."""
  found = factors(config)
  scaled = lambda a: dataclasses.replace(
    a, lr_scale=found[a.role][0], decay_scale=found[a.role][1]
  )
  return net._replace(axes=jax.tree.map(scaled, net.axes))


def describe(config: ConfigDict) -> str:
  """Returns what the rule does to this config, in a line."""
  if not config.model.base_width:
    return 'none'
  m, found = ratio(config.model), factors(config)
  lr, wd = found['matrix']
  return (
    f'{m:.4g} x base width {config.model.base_width}: matrices initial std x'
    f'{m**-0.5:.4g}, learning rate x{lr:.4g}, weight decay x{wd:.4g}; '
    f'logits x{1 / m:.4g}, head learning rate x{found["head"][0]:.4g}'
  )
