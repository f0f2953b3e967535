"""Newton-Schulz iterations: the orthogonal factor of a matrix by products.

X <- a X + (b A + c A^2) X with A = X X^T acts on the singular values alone:
U diag(s) V^T becomes U diag(p(s)) V^T with p(s) = a s + b s^3 + c s^5, applied
`steps` times to X / norm(X). Each preset is a choice of (a, b, c) per step.
"""

import functools
import itertools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimizers.parts import choices, owners, roles

PyTree = Any


class Preset(NamedTuple):
  """Coefficients per step; the last row repeats if there are more steps."""

  rows: tuple[tuple[float, float, float], ...]
  safety: float = 1.0  # the matrix is divided by safety * norm + eps first
  eps: float = 1e-8


# fmt: off
_POLAR_EXPRESS_8 = (
  (8.28721201814563, -23.595886519098837, 17.300387312530933),
  (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
  (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
  (3.3184196573706015, -2.488488024314874, 0.51004894012372),
  (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
  (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
  (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
  (1.875, -1.25, 0.375),
)
PRESETS = {
  # Keller Jordan's Muon: fast to leave 0, ends anywhere in [0.68, 1.13].
  'keller': Preset(((3.4445, -4.7750, 2.0315),)),
  # YouJiacheng's: five different steps, ends in [0.98, 1.03].
  'you': Preset((
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
  )),
  # Polar Express (2505.16932): minimax per step; singular values from 1e-3 on.
  'polar_express': Preset((
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
  ), 1.02, 1e-6),
  # The paper's own eight, safety 1.01 in all but the last: exact to 1e-15.
  'polar_express8': Preset((
    *((a / 1.01, b / 1.01**3, c / 1.01**5)
      for a, b, c in _POLAR_EXPRESS_8[:-1]),
    _POLAR_EXPRESS_8[-1],
  ), 1.01, 1e-7),
  # The classical iteration: never overshoots, slow for small values.
  'cubic': Preset(((1.5, -0.5, 0.0),)),
}
# fmt: on
DTYPES = ('float32', 'bfloat16')
FORMS = ('direct', 'gram')


def check(
  coefficients: str, steps: int, dtype: str, form: str = 'direct'
) -> None:
  """Raises ValueError, one sentence, for knobs that `orthogonalize` refuses."""
  choices.check('coefficients', coefficients, PRESETS)
  choices.check('ns_dtype', dtype, DTYPES)
  choices.check('ns_form', form, FORMS)
  if form == 'gram' and (steps > 5 or dtype != 'float32'):
    raise ValueError(
      f"ns_form='gram' needs ns_dtype='float32' and ns_steps <= 5, not "
      f"'{dtype}' and {steps}: rounding grows with every step."
    )
  least = len(PRESETS[coefficients].rows)
  if steps < least:
    raise ValueError(
      f"ns_steps={steps} would drop steps of coefficients='{coefficients}', "
      f'which has {least}; legal: {least} or more.'
    )


def orthogonalize(
  x_BMN: jax.Array,
  *,
  coefficients: str,
  steps: int,
  dtype: str,
  form: str = 'direct',
) -> jax.Array:
  """Replaces each matrix of a stack by (nearly) its orthogonal factor.

  `dtype` is that of the factors of each product ('float32' keeps float64, and
  accelerators multiply as jax_default_matmul_precision says, unless `form` is
  'gram', which TF32 would ruin);
  sums, norms and the result have the dtype of `x_BMN`, which halves the error
  of an iteration in bfloat16 throughout. Cheapest if M <= N. `form` 'gram'
  iterates on M x M matrices alone where that takes fewer flops, N > 1.5 M: its
  squares of singular values lose those below 1e-3 of the norm (errors to 1e-3
  in float32, against 1e-6).
  """
  preset = PRESETS[coefficients]
  rows = preset.rows + preset.rows[-1:] * (steps - len(preset.rows))
  kind = jnp.bfloat16 if dtype == 'bfloat16' else x_BMN.dtype
  wide = 2 * x_BMN.shape[2] > 3 * x_BMN.shape[1]
  iterate = _gram if form == 'gram' and wide else _direct

  def product(x, y):
    return jnp.matmul(
      x.astype(kind),
      y.astype(kind),
      precision='highest' if form == 'gram' else None,
      preferred_element_type=x_BMN.dtype,
    )

  def one(x):  # (..., M, N)
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    xs = _blocks(x / (preset.safety * norm + preset.eps))
    return jnp.concatenate(iterate(xs, rows, product), axis=-2)

  # On 2 CPU cores one product after the other ran at 194 GFLOP/s and batched
  # products at 137 (24 matrices of 384 x 384); accelerators want the batch.
  if jax.default_backend() == 'cpu':
    return jax.lax.map(one, x_BMN)
  return one(x_BMN)


def _direct(xs, rows, product):
  """steps (4 M^2 N + 2 M^3) flops; in two blocks 7/2 M^2 N + 3/2 M^3.

  A loop: as fast as unrolled, and less to compile.
  """

  def step(xs, row):
    a, b, c = row
    p = _polynomial(_gram_of(xs, product), 0.0, b, c, product)
    return [
      a * x + y for x, y in zip(xs, _applied(p, xs, product), strict=True)
    ], None

  return jax.lax.scan(step, xs, jnp.asarray(rows, xs[0].dtype))[0]


def _gram(xs, rows, product):
  """4 M^2 N + (8 steps - 6) M^3 flops: X is read at the ends only.

  With P = a I + b A + c A^2, X <- P X makes A <- P A P, all of them symmetric
  and commuting; the P of all steps are multiplied first.
  """
  gram = _gram_of(xs, product)
  total = None
  for i, row in enumerate(rows):
    p = _polynomial(gram, *row, product)
    total = p if total is None else _times(p, total, product)
    if i + 1 < len(rows):
      gram = _times(_times(p, gram, product), p, product)
  return _applied(total, xs, product)


# Below, X is a list of blocks of rows, and a symmetric matrix the rows of its
# blocks at and left of the diagonal: what lies right of it is not computed.


def _blocks(x):
  """X in two blocks where their products run as fast as whole ones: a CPU.

  By benchmarks/optimizers.py Muon ran at 1.07 to 1.10 of the rate of plain
  products at 124m, at 0.94 without.
  """
  m = x.shape[-2]
  two = jax.default_backend() == 'cpu' and m >= 256 and m % 2 == 0
  return jnp.split(x, 2, axis=-2) if two else [x]


def _block(a, i, j):
  return a[i][j] if i >= j else jnp.swapaxes(a[j][i], -1, -2)


def _gram_of(xs, product):
  return [
    [product(x, jnp.swapaxes(y, -1, -2)) for y in xs[: i + 1]]
    for i, x in enumerate(xs)
  ]


def _times(a, b, product):
  """The product of symmetric matrices that commute, so symmetric as well."""

  def block(i, j):
    parts = [product(_block(a, i, k), _block(b, k, j)) for k in range(len(a))]
    return functools.reduce(operator.add, parts)

  return [[block(i, j) for j in range(i + 1)] for i in range(len(a))]


def _applied(a, xs, product):
  """A X, in the blocks of X."""

  def block(i):
    parts = [product(_block(a, i, k), x) for k, x in enumerate(xs)]
    return functools.reduce(operator.add, parts)

  return [block(i) for i in range(len(xs))]


def _polynomial(a, zeroth, first, second, product):
  """zeroth I + first A + second A^2."""
  square = _times(a, a, product)
  p = jax.tree.map(lambda x, y: first * x + second * y, a, square)
  if zeroth:
    for i, row in enumerate(p):
      row[i] = zeroth * jnp.eye(row[i].shape[-1], dtype=row[i].dtype) + row[i]
  return p


def orthogonalize_tree(updates: PyTree, axes: PyTree, **knobs: Any) -> PyTree:
  """Orthogonalizes every leaf: a matrix, or a stack of them by its axes.

  Leaves of equal matrix shape, up to transposition, run in stacks: less to
  compile and larger batches. Several devices share the work (`owners.py`).
  `knobs` are those of `orthogonalize`.
  """
  leaves, treedef = jax.tree.flatten(updates)
  axes = treedef.flatten_up_to(axes)
  wide = [
    _flip(roles.to_matrices(x, a), a) for x, a in zip(leaves, axes, strict=True)
  ]
  groups: dict[tuple[int, ...], list[int]] = {}
  for i, (x, _) in enumerate(wide):
    groups.setdefault(x.shape[1:], []).append(i)
  for members in _stacks(groups.values()):
    stacks = [wide[i][0] for i in members]
    done = owners.apply(
      functools.partial(orthogonalize, **knobs), jnp.concatenate(stacks)
    )
    ends = list(itertools.accumulate(len(x) for x in stacks))
    for i, y in zip(members, jnp.split(done, ends[:-1]), strict=True):
      y = jnp.swapaxes(y, 1, 2) if wide[i][1] else y
      leaves[i] = roles.from_matrices(y, axes[i], leaves[i].shape)
  return treedef.unflatten(leaves)


def _stacks(groups):
  """Splits groups where matrices run one after the other: alone on a CPU.

  XLA's CPU compiler makes one kernel of all loops that are alike. A loop that
  reads a leaf out of a stack has the leaf's place in it: in short stacks many
  leaves have the same place, and there is less to compile.
  """
  if owners.axes() or jax.default_backend() != 'cpu':
    return groups
  return [x[i : i + 4] for x in groups for i in range(0, len(x), 4)]


def _flip(x_BMN, axes):
  """Returns the stack with its short side first, and whether it was turned.

  Square matrices are turned so that sides of one name lie alike, because the
  stacks of several parameters are concatenated and sides may be sharded.
  """
  sides = [
    (n, *(axes.names[i] for i in dims))
    for n, dims in zip(
      x_BMN.shape[1:], (axes.inputs, axes.outputs), strict=True
    )
  ]
  turned = sides[0] > sides[1]
  return (jnp.swapaxes(x_BMN, 1, 2) if turned else x_BMN), turned
