"""Optimizer states of another layout: found by meaning, never by position.

A state is a tree of units, the NamedTuples of its transformations. A leaf of a
unit means (field, parameter, what is below it): mu of block_0/attn/q; a counter
belongs to no parameter. A unit is found in another state by what its leaves
mean, its place in a chain counts for nothing. Policies:

  ''          of the same optimizer; its code may have gained, lost or moved a
              transformation or a field. Refused if a parameter would lose one
              leaf and get another, new one: a field that was renamed?
  'discard'   nothing is taken over.
  'keep'      units whose leaves all exist in the old state under the same
              names: of AdamW for Muon, AdamW's state of all but the matrices.
  'carry_mu'  as 'keep', and a mean of gradients becomes a mean of gradients of
              another name (MEANS), with its counter.

Counters of no parameter that a branch cannot tell apart start afresh.
A unit of a new optimizer is taken over whole or not at all: a counter that
says 1000 beside a moment of zero would be a wrong bias correction.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import axes
from lm.errors import UserError, did_you_mean

POLICIES = ('', 'discard', 'keep', 'carry_mu')
# Fields that hold a running mean of gradients, with weights that sum to one.
MEANS = ('mu', 'momentum', 'ema')

Path = tuple[str, ...]


class Leaf(NamedTuple):
  """What a leaf means; `param` is empty for a counter."""

  field: str
  param: Path
  below: Path
  shape: tuple[int, ...]


class Unit(NamedTuple):
  """The state of one transformation: its place, and {meaning: path}."""

  place: Path
  leaves: dict[Leaf, Path]

  @property
  def names(self) -> Path:
    """The place without positions."""
    return tuple(k for k in self.place if not k.isdigit())


class Plan(NamedTuple):
  """Where each leaf of the new state comes from.

  source: path in the new state -> path in the old one; others are initialised.
  lines: what is kept, initialised and dropped, for people.
  """

  source: dict[Path, Path]
  lines: list[str]


def plan(old: Any, new: Any, params: Any, policy: str = '') -> Plan:
  """Finds the leaves of `new` in `old`.

  Args:
    old, new: optimizer states, of arrays or of shapes; `old` may have lost its
      types, as in a checkpoint.
    params: the parameters, or their shapes.
    policy: one of POLICIES.

  Raises:
    UserError: the policy does not exist, two units of the old state cannot be
      told apart, or the policy '' would lose something.
  """
  if policy not in POLICIES:
    hint = did_you_mean(policy, POLICIES)
    raise UserError(f"branch_state='{policy}' does not exist.{hint}")
  before, after = _units(old, params), _units(new, params)
  source = {} if policy == 'discard' else _match(before, after, policy)
  lost = _meanings(before, source.values())
  fresh = _meanings(after, source)
  renamed = {x.param for x in lost} & {x.param for x in fresh if x.param}
  if policy == '' and renamed:
    dropped, made = (sorted({x.field for x in y}) for y in (lost, fresh))
    undo = 'rename the field back'
    if dropped == made:  # of another shape, of which the first is shown
      x, y = (next(z for z in w if z.param in renamed) for w in (lost, fresh))
      dropped, made = [f'{x.field} {x.shape}'], [f'{y.field} {y.shape}']
      undo = 'undo the change'
    raise UserError(
      f'The optimizer now has {", ".join(made)} in place of '
      f'{", ".join(dropped)}, which would be lost; {undo}, or '
      "say so with a branch and branch_state='keep' or 'discard'."
    )
  lines = _lines(before, after, source, params)
  if policy in ('keep', 'carry_mu') and not source:
    lines.insert(0, f"branch_state='{policy}' finds nothing to keep")
  elif policy == 'carry_mu':
    field = {p: x.field for u in [*before, *after] for x, p in u.leaves.items()}
    if all(field[new] == field[old] for new, old in source.items()):
      lines.insert(0, "branch_state='carry_mu' finds no mean of another name")
  return Plan(source, lines)


def fill(fresh: Any, source: dict[Path, Path], arrays: dict[Path, Any]) -> Any:
  """Returns `fresh` with the leaves that have a source replaced by `arrays`."""
  used = set()

  def one(path, x):
    at = source.get(axes.keys(path))
    if at is None:
      return x
    y = jnp.asarray(arrays[at], x.dtype)
    y = jnp.copy(y) if at in used else y  # a state is donated: no buffer twice
    used.add(at)
    return y

  return jax.tree_util.tree_map_with_path(one, fresh)


def by_path(tree: Any) -> dict[Path, Any]:
  """Returns {path: leaf}; a path is the same with and without types."""
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {axes.keys(path): leaf for path, leaf in flat}


def _units(tree, params):
  known = set(by_path(params))
  sizes = sorted({len(p) for p in known}, reverse=True)

  def cut(keys):
    """Place of the unit and its field, parameter, below."""
    for n in sizes:
      for i in range(len(keys) - n + 1):
        if keys[i : i + n] in known:
          return *_field(keys[:i]), keys[i : i + n], keys[i + n :]
    return *_field(keys), (), ()

  found = {}
  for keys, x in by_path(tree).items():
    place, field, param, below = cut(keys)
    leaf = Leaf(field, param, below, tuple(x.shape))
    found.setdefault(place, {})[leaf] = keys
  return [Unit(place, leaves) for place, leaves in found.items()]


def _field(keys):
  """Splits a path at its last name; numbers behind it belong to the field."""
  names = [i for i, k in enumerate(keys) if not k.isdigit()]
  last = names[-1] if names else 0
  return keys[:last], '.'.join(keys[last:])


def _match(before, after, policy):
  """{path in the new state: path in the old one}, whole units first."""
  source = {}
  rest, units = list(after), list(before)
  for same in (
    lambda u: (u.names, frozenset(u.leaves)),
    lambda u: frozenset(u.leaves),
  ):
    for key in {same(u): None for u in rest}:
      new = [u for u in rest if same(u) == key]
      old = [u for u in units if same(u) == key]
      if old and len(old) != len(new):
        # Counters alone, as of random masks, may begin anew at a branch.
        if policy and not any(leaf.param for leaf in new[0].leaves):
          continue
        raise _ambiguous(old, new)
      # Alike units, as two means of other rates, keep their order.
      for u, v in zip(new, old, strict=False):  # as many, or none
        source |= {u.leaves[x]: v.leaves[x] for x in u.leaves}
        rest.remove(u)
        units.remove(v)
  free = {path for u in units for path in u.leaves.values()}
  for u in rest:
    found = [o for o in (_offers(u, v, free, policy) for v in units) if o]
    if len(found) > 1:
      raise _ambiguous(units, [u])
    source |= found[0] if found else {}
    free -= {v for k, v in source.items() if _is_param(u, k)}
  return source


def _offers(new, old, free, policy):
  """What `old` has for `new`: {path: path}, empty if it shall not be used."""
  found = {}
  for leaf, path in new.leaves.items():
    fields = [leaf.field]
    if policy == 'carry_mu' and leaf.param and leaf.field in MEANS:
      fields += [x for x in MEANS if x != leaf.field]
    for field in fields:
      at = old.leaves.get(leaf._replace(field=field))
      if at in free:
        found[path] = at
        break
  whole = len(found) == len(new.leaves)
  useful = any(_is_param(new, path) for path in found)
  return found if useful and (whole or policy == '') else {}


def _is_param(unit, path):
  return any(leaf.param for leaf, p in unit.leaves.items() if p == path)


def _ambiguous(old, new):
  text = lambda units: ', '.join('.'.join(u.place) or 'state' for u in units)
  return UserError(
    f'{len(old)} transformations of the old optimizer state ({text(old)}) are '
    f'alike and fit {len(new)} of the new one ({text(new)}); which is meant '
    "cannot be told. A branch with branch_state='discard' begins a new state."
  )


def _meanings(units, paths):
  """The leaves whose path is not among `paths`."""
  paths = set(paths)
  return [x for u in units for x, path in u.leaves.items() if path not in paths]


def _lines(before, after, source, params):
  """One line for each field of each unit and what becomes of it."""
  origin = {p: _title(u, x) for u in before for x, p in u.leaves.items()}
  groups = {}
  for u in after:
    for leaf, path in u.leaves.items():
      title, was = _title(u, leaf), origin.get(source.get(path))
      kind = 'kept' if was else 'initialised'
      text = f'{title} <- {was}' if was and was != title else title
      groups.setdefault((kind, text), set()).add('/'.join(leaf.param))
  for u in before:
    for leaf in _meanings([u], source.values()):
      key = ('dropped', _title(u, leaf))
      groups.setdefault(key, set()).add('/'.join(leaf.param))
  everything = {'/'.join(p) for p in by_path(params)}
  return [
    f'{kind:<12} {text}{_which(names, everything)}'
    for wanted in ('kept', 'initialised', 'dropped')
    for (kind, text), names in groups.items()
    if kind == wanted
  ]


def _title(unit, leaf):
  return '.'.join((*unit.names, leaf.field)) or 'state'


def _which(names, everything):
  """' of block_*/attn/q, head': layers are written as one."""
  if names == {''}:
    return ''
  if names == everything:
    return ' of all parameters'
  short = {re.sub(r'(?<=_)\d+(?=/)', '*', name) for name in names}
  return f' of {", ".join(sorted(short))}'
