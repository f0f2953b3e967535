"""Measures what each optimizer and decay mode subtracts from a parameter x.

Nothing is looked up. One step with a zero gradient is taken at several learning
rates (lr), peaks and weight decays (wd), and the exponents are fitted. For the
modes that mask the decay, steps with a gradient and without one show where.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm import spec
from lm.errors import of_code
from optimizers.parts import decay, decay_masks, roles

_BASE = {'lr': 0.01, 'peak': 0.04, 'wd': 0.25}
_LEAVES = {
  'matrices': roles.infer((4, 6)),
  'embeddings, head': roles.Axes(('', ''), 'embedding', (0,), (1,)),
  'norm scales': roles.infer((6,)),
}
NEEDED = ('axes', 'peak', 'decay', 'weight_decay')
FORMULAS = tuple(m for m in decay.MODES if m not in decay_masks.MODES)


def split(names: Sequence[str]) -> tuple[list[str], list[str]]:
  """Returns the optimizers that can be measured, and the others."""
  can = lambda name: all(spec.takes('optimizers', name, x) for x in NEEDED)
  return [n for n in names if can(n)], [n for n in names if not can(n)]


def table(names: Sequence[str]) -> str:
  """Returns two markdown tables: modes with a formula, and masked modes."""
  groups = {}  # (kinds of parameters, entries) -> optimizers that share them
  for name in names:
    with of_code(f'optimizers/{name}.py'):
      entries = [formulas(name, mode) for mode in FORMULAS]
    kinds = {}
    for leaf in _LEAVES:
      kinds.setdefault(tuple(e[leaf] for e in entries), []).append(leaf)
    for row, leaves in kinds.items():
      groups.setdefault((', '.join(leaves), row), []).append(name)
  lines = [('optimizer', 'parameters', *FORMULAS)]
  for (leaves, row), sharing in sorted(groups.items(), key=lambda x: x[1]):
    lines.append((_who(sharing, names), leaves, *row))
  return f'{_markdown(lines)}\n\n{_masks(names)}'


def _masks(names):
  lines = [('decay', "as 'decoupled', but only where")]
  for mode in decay_masks.MODES:
    found = [masks(name, mode) for name in names]
    words = set.intersection(*found) or {'differs between optimizers'}
    lines.append((mode, ' or '.join(sorted(words))))
  return _markdown(lines)


def _who(sharing, names):
  return 'all' if sharing == names else ', '.join(sharing)


def _markdown(lines):
  lines.insert(1, tuple('---' for _ in lines[0]))
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def formulas(name: str, mode: str) -> dict[str, str]:
  """Returns the measured formula of the decay for each kind of parameter."""
  step = _stepper(name)
  base = step(0.0, **_BASE)[mode]
  doubled = {k: step(0.0, **{**_BASE, k: 2 * _BASE[k]})[mode] for k in _BASE}
  return {
    leaf: _fit(
      np.asarray(_params()[leaf]),
      base[leaf],
      {k: v[leaf] for k, v in doubled.items()},
    )
    for leaf in _LEAVES
  }


# Of u (up to a positive factor), g and x.
_MASKS = {
  'u x >= 0': lambda u, g, x: u * x >= 0,
  'u x > 0': lambda u, g, x: u * x > 0,
  'g x >= 0': lambda u, g, x: g * x >= 0,
  '<u, x> >= 0': lambda u, g, x: (u * x).sum() >= 0,
}


def masks(name: str, mode: str) -> set[str]:
  """Returns all of _MASKS that a mode has, or 'at random' if it has none.

  Seen on first steps with a gradient, the opposite one and none. Where u is the
  sign of g they cannot be told apart: the table asks several optimizers.
  """
  found = set(_MASKS)
  for size in (1.0, -1.0, 0.0):
    moved = _stepper(name)(size, **_BASE)
    for leaf, x in _params().items():
      none = moved['none'][leaf]
      plain, part = moved['decoupled'][leaf] - none, moved[mode][leaf] - none
      on = np.abs(part) > np.abs(plain) / 2
      slack = 1e-5 * np.abs(none).max()  # differences of large updates
      if not np.allclose(part, np.where(on, plain, 0), rtol=0.01, atol=slack):
        return {'another factor'}
      if plain.any():
        u_g_x = none, size * np.asarray(_noise()[leaf]), np.asarray(x)
        found = {k for k in found if (_MASKS[k](*u_g_x) == on).all()}
  return found or {'at random'}


def _params():
  rng = np.random.default_rng(0)
  shapes = {k: (4, 6)[2 - len(a.names) :] for k, a in _LEAVES.items()}
  away = lambda s: rng.uniform(0.5, 2, s) * rng.choice([-1, 1], s)
  return {k: jnp.asarray(away(s), jnp.float32) for k, s in shapes.items()}


def _noise():
  rng = np.random.default_rng(1)
  return {
    k: jnp.asarray(rng.normal(size=x.shape)) for k, x in _params().items()
  }


@functools.cache
def _stepper(name):
  """Jits one step: what each mode subtracts from each kind of parameter.

  Of a method that only looks at its first gradient, it is the second step.
  """
  params, noise = _params(), _noise()
  config = spec.spec('optimizers', name, decay='none')
  built = spec.build('optimizers', config, 1.0, _LEAVES)
  first, _ = built.update(noise, built.init(params), params)
  only_looks = not first['matrices'].any()

  @jax.jit
  def step(size, lr, peak, wd):
    grads = jax.tree.map(lambda g: size * g, noise)

    def subtracted(mode):
      config = spec.spec('optimizers', name, decay=mode)
      tx = spec.build(
        'optimizers', config, lr, _LEAVES, peak, floats={'weight_decay': wd}
      )
      state = tx.init(params)
      if only_looks:
        _, state = tx.update(grads, state, params)
      updates, _ = tx.update(grads, state, params)
      return jax.tree.map(jnp.negative, updates)

    return {mode: subtracted(mode) for mode in decay.MODES}

  return lambda size, **knobs: jax.tree.map(np.asarray, step(size, **knobs))


def _fit(x, base, doubled):
  """Writes `base`, measured at _BASE, as a product of powers of the knobs."""
  if not base.any():
    return '0'
  powers = {k: np.log2(np.abs(v / base)) for k, v in doubled.items()}
  whole = {k: round(float(p.mean())) for k, p in powers.items()}
  if any(np.abs(p - whole[k]).max() > 1e-3 for k, p in powers.items()):
    return 'method of g = wd x'
  rest = base / math.prod(_BASE[k] ** n for k, n in whole.items())
  for what, value in (('x', x), ('sign(x)', np.sign(x))):
    ratio = rest / value
    if np.ptp(ratio) < 1e-4 * abs(ratio.mean()):
      return _write(float(ratio.mean()), whole, what)
  return 'method of g = wd x'


def _write(factor, powers, what):
  """For example 0.2, lr^2 peak^-1 wd^1, x -> '0.2 lr^2/peak wd x'."""
  words = [] if abs(factor - 1) < 1e-3 else [f'{factor:.3g}']
  power = {1: 'lr', 2: 'lr^2', 0: ''}[powers['lr']]
  words.append(power + ('/peak' if powers['peak'] == -1 else ''))
  words += ['wd'] * powers['wd'] + [what]
  return ' '.join(w for w in words if w)
