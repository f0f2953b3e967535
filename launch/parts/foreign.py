"""Checkpoints of other programs: what to merge of them (not a command)."""

import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch.parts.emulation import Plan
from lm import card, log, spec
from lm.errors import UserError, did_you_mean
from merging.engine import coefficients, items, safetensors

# Orbax items of a checkpoint that hold parameters, the likeliest first:
# ours, nanodo's and simply's, MaxText's, a CheckpointManager's, plain Orbax's.
_ITEMS = ('params', 'state', 'items', 'default', 'model', 'pytree')
# Which fields of a config.json do not say which model it is.
_SAME = re.compile(
  r'(torch_)?dtype|_name_or_path|transformers_version|use_cache|\w+_token_id'
).fullmatch


class Inputs(NamedTuple):
  """Checkpoints in the order of their steps.

  paths: Orbax items or safetensors folders.
  tree: the part of their trees to merge; '' = all.
  item: the name of the item in a checkpoint; '' where they are the same.
  """

  paths: list[pathlib.Path]
  steps: list[int]
  tree: str
  item: str


def plan(found: Inputs, method: Mapping[str, Any]) -> Plan:
  """Gives them the coefficients of a method.

  Raises:
    UserError: from_run, which needs the learning rates of a run.
  """
  if method['name'] == 'from_run':
    raise UserError('--method=from_run needs --run, which knows its rates.')
  c = spec.build('merging', method, found.steps)
  c = coefficients.checked(c, found.steps, method['name'])
  pairs = [(p, float(x)) for p, x in zip(found.paths, c, strict=True)]
  return Plan(pairs, np.array([]), {})


def inputs(paths: Sequence[str], steps: Sequence[int], tree: str) -> Inputs:
  """Finds the checkpoints that --inputs, --steps and --tree name.

  Args:
    paths: checkpoints, or one folder whose subfolders are steps.
    steps: of the checkpoints; of those in the folder to take.
    tree: where the parameters are, as 'state.params': an Orbax item, if there
      are several, then keys of its tree; '' = find them.

  Raises:
    UserError: no such checkpoint, steps that are not known or not different,
      trees in which the parameters cannot be told from the rest.
  """
  found = [pathlib.Path(p) for p in paths]
  for path in found:
    if not path.exists():
      raise UserError(f"--inputs: '{path}' does not exist.")
  if len(found) == 1 and not _is_checkpoint(found[0]):
    found, steps = _in_folder(found[0], steps)
  if len(found) < 2:
    raise UserError(f'--inputs: {len(found)} checkpoint; a merge needs two.')
  numbers = list(steps) or _steps(found)
  if len(numbers) != len(found):
    raise UserError(f'--steps has {len(numbers)} for {len(found)} inputs.')
  if len(set(numbers)) < len(numbers):
    given = 'as given' if steps else 'of the names; or --steps=1,2,...'
    raise UserError(
      f'--steps={numbers} ({given}): each checkpoint has its own step.'
    )
  pairs = sorted(zip(numbers, found, strict=True))
  if [p for _, p in pairs] != found and not steps:
    print(
      '--inputs are ordered by the numbers that end their names; or --steps.'
    )
  other = [
    p for p in found if safetensors.found(p) != safetensors.found(found[0])
  ]
  if other:
    raise UserError(
      f"--inputs: '{found[0]}' and '{other[0]}' have different formats: one is "
      'safetensors, the other Orbax.'
    )
  places = [_item(p, tree) for _, p in pairs]
  trees = {t for _, t in places}
  if len(trees) > 1:
    raise UserError(
      f'--inputs have their parameters in different places: {sorted(trees)}; '
      'name one with --tree.'
    )
  paths = [p for p, _ in places]
  _check_models(paths)
  item = paths[-1].name if paths[-1] != pairs[-1][1] else ''
  return Inputs(paths, [n for n, _ in pairs], trees.pop(), item)


def _check_models(paths):
  """Refuses checkpoints that are of different models by their config.json."""
  said = list(filter(None, map(_said, paths)))
  for (one, model), (other, its) in itertools.pairwise(said):
    for name, (a, b) in card.diff(model, its).items():
      raise UserError(
        f"--inputs: '{other}/config.json' has {name}={b!r}, '{one}/config.json'"
        f' has {a!r}: another model.'
      )


def _said(path):
  """Returns (folder, what its config.json says of the model), if it has one."""
  if safetensors.found(path):
    folder = path.parent if path.is_file() else path
    if not (folder / 'config.json').is_file():
      return None
    config = log.read_json(folder / 'config.json')
    return folder, {k: v for k, v in config.items() if not _SAME(k)}
  run = path.resolve().parent.parent.parent  # of RUN/checkpoints/STEP/params
  if not all((run / f'{name}.json').is_file() for name in ('config', 'meta')):
    return None
  return run, card.of_model(log.read_config(run))


def _is_checkpoint(path):
  # An item that is named <step> or <name>-<step> is itself a checkpoint.
  step = lambda name: name.rpartition('-')[2].isdecimal()
  within = [step(p.name) for p in _sub(path) if _is_item(p)]
  named = bool(within) and not any(within)
  return safetensors.found(path) or _is_item(path) or named


def _is_item(path):
  return (path / '_METADATA').is_file()


def _sub(path):
  return (
    sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
  )


def _in_folder(folder, steps):
  """Returns the checkpoints FOLDER/<step> or FOLDER/<name>-<step>."""
  saved = {}
  for path in filter(_is_checkpoint, _sub(folder)):
    merge = (path / 'merge.json').is_file() and not _number(path.name)
    temporary = '.orbax-checkpoint-tmp' in path.name
    # Where the steps are chosen, others are left out; else none is guessed.
    if not (temporary or merge or (steps and not _number(path.name))):
      saved.setdefault(_step(path, within=False), []).append(path)
  missing = [s for s in steps if s not in saved]
  if missing or not saved:
    legal = ', '.join(map(str, sorted(saved))) or 'none'
    what = f'step {missing[0]}' if missing else 'checkpoints'
    raise UserError(f"--inputs: '{folder}' has no {what}; it has: {legal}.")
  chosen = list(steps) or sorted(saved)
  for step in chosen:
    if len(saved[step]) > 1:
      names = ', '.join(p.name for p in saved[step])
      raise UserError(f"--inputs: '{folder}' has step {step} twice: {names}.")
  return [saved[s][0] for s in chosen], chosen


def _steps(paths):
  """Returns the steps in the names; without any, the places in the list."""
  parents = {p.absolute().parent.name for p in paths}
  in_steps = len(parents) == len(paths) and any(map(_number, parents))
  if in_steps or any(_number(p.name) for p in paths):
    return [_step(path, within=in_steps) for path in paths]
  print(f'The names of --inputs have no steps: taken as 1 to {len(paths)}.')
  return list(range(1, len(paths) + 1))


def _number(name):
  return re.search(r'(\d+)$', pathlib.Path(name).stem)


def _step(path, within):
  """Returns the number at the end of a name, or, `within` a step, of that."""
  for name in (path.name, *([path.absolute().parent.name] if within else [])):
    if digits := _number(name):
      return int(digits[1])
  raise UserError(
    f"--inputs: '{path}' does not end in a step; name those to take with "
    '--steps=1,2,...'
  )


def _item(path, tree):
  """Returns the item below a checkpoint, and the part of its tree."""
  if safetensors.found(path):
    return path, tree
  if _is_item(path):
    return path, tree or _parameters(path)
  names = [p.name for p in _sub(path) if _is_item(p)]
  heads = [n for n in names if f'{tree}.'.startswith(f'{n}.')]
  if heads:
    head = max(heads, key=len)  # a name may have dots
    return path / head, tree[len(head) + 1 :] or _parameters(path / head)
  likely = [n for n in _ITEMS if n in names] or names
  if tree and len(likely) == 1:
    return path / likely[0], tree
  if tree:
    raise UserError(
      f"--tree={tree}: '{path}' has no such item; it has: "
      f'{", ".join(names) or "none"}.{did_you_mean(tree, names)}'
    )
  if not names:
    raise UserError(
      f"'{path}' is no checkpoint: neither it nor a folder in it has the "
      '_METADATA of Orbax or *.safetensors.'
    )
  if likely[0] not in _ITEMS and len(likely) > 1:
    raise UserError(
      f"'{path}' has the items {names}; name one with --tree=ITEM."
    )
  return path / likely[0], _parameters(path / likely[0])


def _parameters(item):
  """Returns where the tree has 'params' beside other things, '' = all.

  It is the one nearest to the top that is no part of an optimizer's state.
  """
  keys = list(items.Item(item.resolve()).leaves.values())
  other = re.compile(r'opt|step|tx$|rng').match
  heads = {k[: k.index('params') + 1] for k in keys if 'params' in k}
  heads = sorted((h for h in heads if not any(map(other, h))), key=len)
  heads = [h for h in heads if len(h) == len(heads[0])]
  rest = [k for k in keys if not any(k[: len(h)] == h for h in heads)]
  if rest and len(heads) == 1:
    return '.'.join(heads[0])
  others = [k for k in rest if other(k[0])] or (rest if heads else [])
  if others:
    names = {'.'.join(h) for h in heads} or {k[0] for k in keys}
    raise UserError(
      f"'{item}' holds more than parameters ('{'.'.join(others[0])}'); name "
      f'them with --tree: {", ".join(sorted(names))}.'
    )
  return ''
