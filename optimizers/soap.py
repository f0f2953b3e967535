"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import layout

from optimizers.parts import choices, hybrid, roles


class SoapState(NamedTuple):
  count: jax.Array
  mu: Any
  factors: Any  # for each matrix: second moment nu, sides (left, right)


class Factors(NamedTuple):
  """Of a stack of B matrices (M, N); None for a side that is too large."""

  nu: jax.Array  # (B, M, N), in the rotated coordinates
  grams: tuple[jax.Array | None, ...]  # means of G G^T and G^T G
  bases: tuple[jax.Array | None, ...]  # their eigenvectors, nearly


def soap(
  learning_rate,
  axes=None,
  peak=None,
  *,
  momentum: float = 0.95,
  nu_b2: float = 0.95,
  shampoo_b2: float = 0.95,
  refresh_every: int = 10,
  max_dim: int = 10_000,
  weight_decay: float = 0.01,
  decay: str = 'decoupled',
  adam_lr_ratio: float = 1.0,
  b1: float = 0.95,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """SOAP (2409.11321, algorithm 3) for hidden matrices, AdamW for the rest.

    mu <- momentum mu + (1 - momentum) G;  G' = L^T G R
    nu <- nu_b2 nu + (1 - nu_b2) G'^2
    u = L (L^T mu R / sqrt(nu)) R^T, both moments bias-corrected
    grams: means of G G^T and G^T G by shampoo_b2; every refresh_every steps
    L and R take one power iteration (QR), sorted by eigenvalue

  A side above max_dim is not rotated. State: count; mu; nu, grams, bases.
  The first gradient gives L and R; only decay moves, as in the authors' code:
  in its own basis all but its singular values is rounding, which a division by
  sqrt(nu) would make as large as they are.
  Differs from the paper: that first step; AdamW for all but hidden matrices.
  QR amplifies rounding: 20 steps on 1 and 4 devices differ by 1e-3 in the loss.
  """
  choices.at_least(1, refresh_every=refresh_every)
  choices.at_least(0, max_dim=max_dim)

  def method(axes):
    return scale_by_soap(
      axes, momentum, nu_b2, shampoo_b2, eps, refresh_every, max_dim
    )

  return hybrid.with_adamw(
    method,
    learning_rate,
    axes,
    peak,
    weight_decay=weight_decay,
    decay=decay,
    adam_lr_ratio=adam_lr_ratio,
    b1=b1,
    b2=b2,
    eps=eps,
  )


def scale_by_soap(
  axes, b1, b2, shampoo_b2, eps, refresh_every, max_dim
) -> optax.GradientTransformation:
  """The direction of SOAP; every leaf must be a matrix or a stack of them."""

  def new(x, a):
    x = roles.to_matrices(x, a)
    side = lambda n: jnp.zeros((len(x), n, n), x.dtype)
    zeros = tuple(side(n) if n <= max_dim else None for n in x.shape[1:])
    return Factors(jnp.zeros_like(x), zeros, jax.tree.map(jnp.array, zeros))

  def init(params):
    mu = jax.tree.map(jnp.zeros_like, params)
    factors = jax.tree.map(new, params, roles.of(params, axes))
    return SoapState(jnp.zeros((), jnp.int32), mu, factors)

  def one(g, mu, f, a, t):
    shape, g = g.shape, roles.to_matrices(g, a)
    n = jnp.maximum(t, 1)
    rotated = _rotate(jnp.where(t > 0, g, 0), f.bases)
    nu = b2 * f.nu + (1 - b2) * rotated**2
    u = _rotate(roles.to_matrices(mu, a) / (1 - b1**n), f.bases)
    u = u / (jnp.sqrt(nu / (1 - b2**n)) + eps)
    u = roles.from_matrices(_rotate(u, f.bases, back=True), a, shape)
    products = _exact('bij,bkj->bik', g, g), _exact('bji,bjk->bik', g, g)
    grams = tuple(
      None if old is None else shampoo_b2 * old + (1 - shampoo_b2) * p
      for old, p in zip(f.grams, products, strict=True)
    )
    return u, Factors(nu, grams, f.bases)

  def update(updates, state, params=None):
    del params
    t = state.count  # gradients seen, steps done after the first
    ema = lambda g, m: b1 * m + (1 - b1) * jnp.where(t > 0, g, 0)
    mu = jax.tree.map(ema, updates, state.mu)
    out = jax.tree.map(
      lambda g, m, f, a: one(g, m, f, a, t),
      updates,
      mu,
      state.factors,
      roles.of(updates, axes),
    )
    u = jax.tree.map(lambda _, o: o[0], updates, out)
    factors = jax.tree.map(lambda _, o: o[1], updates, out)
    what = jnp.where(t > 0, t % refresh_every == 0, 2)
    return u, SoapState(t + 1, mu, _turn(what, factors))

  return optax.GradientTransformation(init, update)


def _turn(what, factors):
  """Keeps the bases (what = 0), refreshes them (1) or makes the first (2).

  One choice for all matrices takes 0.7 of the time to compile one for each.
  """
  leaves, treedef = jax.tree.flatten(
    factors, is_leaf=lambda x: isinstance(x, Factors)
  )
  keep = lambda f: (f.nu, f.bases)
  first = lambda f: (f.nu, jax.tree.map(_eigenvectors, f.grams))
  each = lambda fn: lambda: [fn(f) for f in leaves]
  done = jax.lax.switch(what, [each(keep), each(_refresh), each(first)])
  return treedef.unflatten(
    [
      f._replace(nu=nu, bases=bases)
      for f, (nu, bases) in zip(leaves, done, strict=True)
    ]
  )


def _eigenvectors(gram):
  """As columns, in any order."""
  vectors = lambda x: jnp.linalg.eigh(x, symmetrize_input=False)[1]
  return _rows(_of_each(vectors, gram))


def _of_each(function, x_BMN):
  """Applies LAPACK to each matrix; on a CPU in turn, which takes no longer.

  At once, as under `lax.switch` here, matrices of 8 virtual devices waited for
  each other for ever (jax 0.10.2).
  """
  if len(x_BMN) == 1:
    return function(x_BMN)
  in_turn = functools.partial(jax.lax.map, function)
  return jax.lax.platform_dependent(x_BMN, cpu=in_turn, default=function)


def _rows(x_BMN):
  """Not LAPACK's columns: every step would transpose what it keeps."""
  return layout.with_layout_constraint(x_BMN, layout.Layout((0, 1, 2)))


def _exact(formula, a, b):
  """Not in TF32 or bfloat16, the default of accelerators: see `soap`."""
  return jnp.einsum(formula, a, b, precision='highest')


def _rotate(x_BMN, bases, back=False):
  left, right = bases
  if left is not None:
    formula = 'bij,bjk->bik' if back else 'bji,bjk->bik'
    x_BMN = _exact(formula, left, x_BMN)
  if right is not None:
    formula = 'bij,bkj->bik' if back else 'bij,bjk->bik'
    x_BMN = _exact(formula, x_BMN, right)
  return x_BMN


def _refresh(f):
  """One step of orthogonal iteration; nu follows the order of the columns."""
  nu, new = f.nu, []
  take = functools.partial(jnp.take_along_axis, mode='promise_in_bounds')
  for axis, gram, basis in zip((1, 2), f.grams, f.bases, strict=True):
    if basis is None:
      new.append(None)
      continue
    turned = _exact('bij,bjk->bik', gram, basis)
    values = jnp.sum(basis * turned, 1)
    _, order = jax.lax.top_k(values, values.shape[1])  # by falling value
    turned = take(turned, order[:, None, :], 2)
    nu = take(nu, order[:, :, None] if axis == 1 else order[:, None, :], axis)
    new.append(_rows(_of_each(lambda x: jnp.linalg.qr(x)[0], turned)))
  return _rows(nu), tuple(new)
