"""Against PyTorch and the packages of others, in float64, over ten steps.

  requirements-oracle.txt says what to install
  python -m pytest -m oracle tests/test_oracles.py

Weights are (outputs, inputs) as PyTorch has them, which axes express. Where a
package computes something else than its paper, the case says what, and is
compared after that has been allowed for. Tolerances are absolute, of parameters
of size 1 that move by about 0.1; those above 1e-12 are explained.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import spec
from optimizers import adamuon
from optimizers.parts import roles, schedule_free
from tests import optimizer_problem as problem

pytestmark = pytest.mark.oracle
SHAPE = (6, 8)
LAYOUT = roles.Axes(('out', 'in'), 'matrix', (1,), (0,))
X = np.linspace(-1, 1, 48).reshape(SHAPE)
GRADS = problem.normal(SHAPE, 10)


def _ours(name, learning_rate=0.01, peak=None, **knobs):
  return spec.get('optimizers', name)(learning_rate, LAYOUT, peak, **knobs)


def _theirs(make, x=X, grads=GRADS):
  """Returns the parameters after each step of a torch optimizer, float64."""
  import torch

  p = torch.nn.Parameter(torch.tensor(x))
  optimizer, out = make([p]), []
  for g in grads:
    p.grad = torch.tensor(g)
    optimizer.step()
    out.append(p.detach().numpy().copy())
  return np.stack(out)


def _close(ours, theirs, atol, x=X, grads=GRADS):
  got = problem.run(ours, x, grads)
  np.testing.assert_allclose(got, theirs, rtol=0, atol=atol)
  assert np.abs(got[-1] - x).max() > 0.01


@pytest.mark.parametrize(
  'name, knobs, theirs, options, atol',
  [
    ('adamw', {}, 'AdamW', {'betas': (0.9, 0.95), 'weight_decay': 0.1}, 1e-12),
    (
      'adamw',
      {'decay': 'coupled'},
      'Adam',
      {'betas': (0.9, 0.95), 'weight_decay': 0.1},
      1e-12,
    ),
    (
      'sgdw',
      {'decay': 'coupled'},
      'SGD',
      {'momentum': 0.9, 'weight_decay': 1e-3},
      1e-12,
    ),
    (
      'sgdw',
      {'decay': 'coupled', 'nesterov': True},
      'SGD',
      {'momentum': 0.9, 'weight_decay': 1e-3, 'nesterov': True},
      1e-12,
    ),
    (
      'nadamw',
      {},
      'NAdam',
      # Its momentum grows from b1 / 2 by this rate: at once to b1.
      {
        'betas': (0.9, 0.95),
        'weight_decay': 0.1,
        'momentum_decay': 1e6,
        'decoupled_weight_decay': True,
      },
      1e-7,  # its products of momenta are float32
    ),
    (
      'adafactor',
      {'min_dim_size_to_factor': 1},
      'Adafactor',
      {'eps': (1e-30, 1e-3)},
      1e-8,  # the rate of our second moment is float32
    ),
  ],
)
def test_torch(name, knobs, theirs, options, atol):
  import torch

  make = lambda p: getattr(torch.optim, theirs)(p, lr=0.01, **options)
  _close(_ours(name, **knobs), _theirs(make), atol)


@pytest.mark.parametrize('wide', [False, True])
@pytest.mark.parametrize(
  'scale, theirs', [('keller', 'original'), ('moonlight', 'match_rms_adamw')]
)
def test_muon_of_torch(monkeypatch, scale, theirs, wide):
  """Its Newton-Schulz casts to bfloat16: taken away, then with it.

  1e-7: it does not add 1e-8 to the norm. 0.02: bfloat16 has 8 bits.
  """
  import torch

  x, grads = (X, GRADS) if wide else (X.T.copy(), GRADS.swapaxes(1, 2))
  make = lambda p: torch.optim.Muon(p, lr=0.02, adjust_lr_fn=theirs)
  ours = _ours('muon', 0.02, scale=scale)
  _close(ours, _theirs(make, x, grads), 0.02, x, grads)
  monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda x: x)
  _close(ours, _theirs(make, x, grads), 1e-7, x, grads)


# case -> what of ours; class of pytorch_optimizer, its options; tolerance
_CASES = {
  'lion': ({}, 'Lion', {'betas': (0.9, 0.99), 'weight_decay': 1.0}, 1e-12),
  'signum': ({}, 'SignSGD', {'momentum': 0.9, 'weight_decay': 0.1}, 1e-12),
  'sgdw': ({}, 'SGDW', {'momentum': 0.9, 'weight_decay': 1e-3}, 1e-12),
  'ademamix': (
    {},
    'AdEMAMix',
    {'alpha': 8.0, 'weight_decay': 0.1, 'weight_decouple': True},
    1e-12,
  ),
  'ademamix with warm-up': (  # 1e-7: our b3 of a step is float32
    {'warmup_steps': 5},
    'AdEMAMix',
    {
      'alpha': 8.0,
      'weight_decay': 0.1,
      'weight_decouple': True,
      't_alpha_beta3': 5,
    },
    1e-7,
  ),
  'cautious_adamw': (  # AdEMAMix without its second momentum
    {'normalization': 'sum', 'decay': 'none', 'b2': 0.999},
    'AdEMAMix',
    {'alpha': 0.0, 'cautious': True},
    1e-12,
  ),
  'cautious_lion': (
    {'decay': 'none'},
    'Lion',
    {'cautious': True},
    1e-12,
  ),
  'mars': ({}, 'MARS', {'weight_decay': 0.1}, 5e-7),  # sqrt(nu + 1e-15)
  'marsm': (  # 1e-7: what is added to the norm
    {'scale': 'keller', 'decay': 'none'},
    'MARS',
    {'mars_type': 'shampoo'},
    1e-7,
  ),
  'muon': ({}, 'Muon', {'weight_decay': 0.1}, 1e-7),
  'normuon': ({}, 'NorMuon', {'weight_decay': 0.1}, 1e-7),
}


@pytest.mark.parametrize('case', _CASES)
def test_pytorch_optimizer(monkeypatch, case):
  """Newton-Schulz in float64; 'original' coefficients are Keller Jordan's."""
  import pytorch_optimizer
  import torch
  from pytorch_optimizer.optimizer.utils import matrix

  f = matrix.zero_power_via_newton_schulz_5
  defaults = (*f.__defaults__[:-1], torch.float64)
  monkeypatch.setattr(f, '__defaults__', defaults)
  knobs, theirs, options, atol = _CASES[case]

  def make(p):
    p = [{'params': p, 'use_muon': True}]
    return getattr(pytorch_optimizer, theirs)(p, lr=0.01, **options)

  _close(_ours(case.split()[0], **knobs), _theirs(make), atol)


def test_adamuon_of_pytorch_optimizer(monkeypatch):
  """It has no signs and no Nesterov (the paper's first version): so here."""
  import pytorch_optimizer
  import torch
  from pytorch_optimizer.optimizer.utils import matrix

  f = matrix.zero_power_via_newton_schulz_5
  defaults = (*f.__defaults__[:-1], torch.float64)
  monkeypatch.setattr(f, '__defaults__', defaults)
  make = lambda p: pytorch_optimizer.AdaMuon(
    [{'params': p, 'use_muon': True}],
    lr=0.01, betas=(0.95, 0.95), weight_decay=0.1,
  )  # fmt: skip
  with_signs = adamuon.scale_by_muon
  monkeypatch.setattr(
    adamuon,
    'scale_by_muon',
    lambda axes, **knobs: with_signs(
      axes, **{**knobs, 'sign': False, 'nesterov': False}
    ),
  )
  # 1e-7: what is added to the norm and to the root.
  _close(_ours('adamuon', weight_decay=0.1), _theirs(make), 1e-7)


def test_adamc_of_pytorch_optimizer():
  """At half of the peak; 1e-8: our peak is float32."""
  import pytorch_optimizer

  def make(p):
    group = [{'params': p, 'normalized': True}]
    optimizer = pytorch_optimizer.AdamC(
      group, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1
    )
    optimizer.param_groups[0]['lr'] = 0.005
    return optimizer

  _close(_ours('adamw', 0.005, 0.01, decay='corrected'), _theirs(make), 1e-8)


def test_schedule_free():
  """y, the parameters, and x, what is evaluated; 1e-8: float32 weights."""
  import schedulefree

  kept = []

  def make(p):
    kept.append(
      schedulefree.AdamWScheduleFree(
        p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1
      )
    )
    kept[0].train()
    return kept[0]

  ours = _ours('schedule_free_adamw')
  _close(ours, _theirs(make), 1e-8)
  kept[0].eval()
  want = kept[0].param_groups[0]['params'][0].detach().numpy()
  with jax.enable_x64(True):
    y = jnp.asarray(X)
    state = ours.init(y)
    for g in GRADS:
      updates, state = ours.update(jnp.asarray(g), state, y)
      y = y + updates
    got = schedule_free.eval_params(state, y, 0.9)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)
  assert np.abs(got - y).max() > 1e-3


@pytest.mark.parametrize('safeguard', [False, True])
def test_prodigy(safeguard):
  """A large d0, so that x moves and d grows within ten steps."""
  import prodigyopt

  make = lambda p: prodigyopt.Prodigy(
    p, lr=1.0, d0=1e-2, use_bias_correction=True, safeguard_warmup=safeguard
  )
  ours = _ours('prodigy', 1.0, d0=1e-2, safeguard_warmup=safeguard)
  _close(ours, _theirs(make), 1e-12)


@pytest.mark.parametrize('role', ['matrix', 'head', 'vector'])
def test_scion_of_pytorch_optimizer(monkeypatch, role):
  """Its norms by name; 1e-6: what is added to norms, times the radius."""
  import torch
  from pytorch_optimizer import SCION
  from pytorch_optimizer.optimizer import scion
  from pytorch_optimizer.optimizer.utils import matrix

  f = matrix.zero_power_via_newton_schulz_5
  defaults = (*f.__defaults__[:-1], torch.float64)
  monkeypatch.setattr(f, '__defaults__', defaults)
  norm, scale = {
    'matrix': (scion.LMONorm.SPECTRAL, 50.0),
    'head': (scion.LMONorm.SIGN, 3000.0),
    'vector': (scion.LMONorm.BIAS, 1.0),
  }[role]
  x, grads, layout = X, GRADS, dataclasses.replace(LAYOUT, role=role)
  if role == 'vector':
    x, grads, layout = X[0], GRADS[:, 0], roles.infer((8,))
  # A vector does not decay with us.
  make = lambda p: SCION(
    p, lr=2**-8, norm_type=norm, scale=scale, constraint=role != 'vector'
  )
  ours = spec.get('optimizers', 'scion')(2**-8, layout)
  _close(ours, _theirs(make, x, grads), 1e-6, x, grads)


def test_soap_of_pytorch_optimizer():
  """1e-5: it takes QR in float32. Square, because no one chooses a basis of
  what a gradient of low rank leaves out."""
  import pytorch_optimizer

  square, grads = X[:, :6].copy(), GRADS[:, :, :6].copy()
  make = lambda p: pytorch_optimizer.SOAP(
    p, lr=0.02, precondition_frequency=3, weight_decay=0.0
  )
  ours = _ours('soap', 0.02, refresh_every=3, decay='none')
  _close(ours, _theirs(make, square, grads), 1e-5, square, grads)
