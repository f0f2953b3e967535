"""Components from signatures: a file in a folder is a method.

`optimizers/lion.py` defines `lion(learning_rate, axes=None, *, b1=0.9, ...)`.
Positional parameters are what the run provides, keyword-only parameters are
the knobs of the config: float knobs are traced, all others are static.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import numbers
import pathlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lm.errors import UserError, did_you_mean, of_code

_STATIC = (bool, int, str, tuple)

# What a run gives by position; all other parameters are knobs.
_GIVEN = {
  'optimizers': ('learning_rate', 'axes', 'peak'),
  'schedules': ('num_steps',),
}


def names(package: str) -> list[str]:
  """Returns the components of a folder: its modules, not its subpackages."""
  found = pkgutil.iter_modules(importlib.import_module(package).__path__)
  return sorted(m.name for m in found if not m.ispkg)


def get(package: str, name: str) -> Callable[..., Any]:
  """Returns the function `name` of `package/name.py`."""
  if name not in names(package):
    hint = did_you_mean(name, names(package))
    raise UserError(f'{package}/{name}.py does not exist.{hint}')
  with of_code(f'{package}/{name}.py'):
    module = importlib.import_module(f'{package}.{name}')
  function = getattr(module, name, None)
  if not callable(function):
    raise UserError(f"{package}/{name}.py defines no function '{name}'.")
  return function


def knobs(package: str, name: str) -> dict[str, Any]:
  """Returns the keyword-only parameters of a component with their defaults."""
  found = {}
  signature = inspect.signature(get(package, name), eval_str=True)
  parameters = list(signature.parameters.values())
  by_position = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
  for i, p in enumerate(by_position if package in _GIVEN else ()):
    if p.name not in _GIVEN[package][i : i + 1]:
      raise UserError(
        f"{package}/{name}.py: '{p.name}' must stand behind a `*`; by position "
        f'a run gives {", ".join(_GIVEN[package])}.'
      )
  for p in parameters:
    if p.kind is not p.KEYWORD_ONLY:
      continue
    if p.name in _GIVEN.get(package, ()):
      raise UserError(
        f"{package}/{name}.py: '{p.name}' must stand before the `*`; a run "
        'gives it by position.'
      )
    if p.default is p.empty:
      raise UserError(
        f"{package}/{name}.py: the keyword '{p.name}' needs a default."
      )
    known = isinstance(p.default, numbers.Real)
    value = float(p.default) if p.annotation is float and known else p.default
    if not isinstance(value, (float, *_STATIC)):
      raise UserError(
        f"{package}/{name}.py: the default of '{p.name}' is {value!r}; "
        'legal: a float (traced) or a bool, int, str or tuple (static).'
      )
    found[p.name] = value
  return found


def learning_rate(name: str, otherwise: float) -> float:
  """Returns the default of an optimizer's `learning_rate`, if it has one."""
  parameters = inspect.signature(get('optimizers', name)).parameters
  empty = inspect.Parameter.empty
  own = getattr(parameters.get('learning_rate'), 'default', empty)
  if own is empty:
    return otherwise
  if isinstance(own, bool) or not isinstance(own, numbers.Real):
    raise UserError(
      f'optimizers/{name}.py: the default of learning_rate is {own!r}; legal: '
      'a number, or no default.'
    )
  return float(own)


def spec(package: str, name: str, **overrides: Any) -> ConfigDict:
  """Returns a locked config: the name and every knob of a component."""
  config = ConfigDict({'name': name, **knobs(package, name)})
  for key, value in overrides.items():
    _check_knob(package, name, key, config)
    try:
      config[key] = value
    except TypeError as e:
      raise UserError(
        f'{package}/{name}.py: {key}={value!r} must be of type '
        f'{type(config[key]).__name__}, like its default {config[key]!r}.'
      ) from e
  return config.lock()


def floats(package: str, config: Mapping[str, Any]) -> dict[str, float]:
  """Returns the traced knobs that a config has: their default is a float."""
  known = knobs(package, config['name'])
  traced = [k for k, v in known.items() if isinstance(v, float)]
  return {k: config[k] for k in traced if k in config}


def build(
  package: str,
  config: Mapping[str, Any],
  *args: Any,
  floats: Mapping[str, Any] | None = None,
) -> Any:
  """Calls the component that a config names.

  Args:
    package: 'optimizers', 'schedules' or 'merging'.
    config: as made by `spec`.
    *args: what the run provides, in the package's order; a component takes as
      many of them as its signature declares.
    floats: traced values that replace the config's float knobs.

  Raises:
    UserError: an unknown name or knob, or a value the component refuses.
  """
  name = config['name']
  function = get(package, name)
  legal = knobs(package, name)
  kwargs = {k: v for k, v in dict(config).items() if k != 'name'}
  for key in kwargs:
    _check_knob(package, name, key, legal)
  positional = [
    p
    for p in inspect.signature(function).parameters.values()
    if p.kind is p.POSITIONAL_OR_KEYWORD
  ]
  for key, value in kwargs.items():
    if isinstance(value, int) and abs(value) >= 2**31:
      raise UserError(f'{package}/{name}.py: {key}={value} is beyond int32.')
  try:
    return function(*args[: len(positional)], **{**kwargs, **(floats or {})})
  except ValueError as e:
    if type(e) in (ValueError, UserError):
      raise UserError(f'{package}/{name}.py: {e}') from e
    raise


def takes(package: str, name: str, what: str) -> bool:
  """Returns whether a component has a parameter, by position or keyword."""
  return what in inspect.signature(get(package, name)).parameters


def code_hash(package: str, name: str) -> str:
  """Returns 16 hex digits of a component's code and of what it may call.

  That is `package.parts`, and the modules of the package that one of these
  files imports, and so on.
  """
  own = pathlib.Path(importlib.import_module(f'{package}.{name}').__file__)
  folders = [pathlib.Path(p) for p in importlib.import_module(package).__path__]
  found, new = set(), {own}.union(*(f.glob('parts/*.py') for f in folders))
  while new:
    found |= new
    imported = {m for p in new for m in _imports(p.read_bytes(), package)}
    paths = {f / f'{m}.py' for m in imported for f in folders}
    new = {p for p in paths - found if p.is_file()}
  return hash_of_code(sorted(found))


@functools.lru_cache(1 << 10)
def _imports(text, package):
  """Returns the names that a file imports from a package."""
  found = set()
  for node in ast.walk(_tree(text)):
    if isinstance(node, ast.ImportFrom):
      source = node.module or ''
      if node.level or source == package:
        found |= {source.partition('.')[0], *(a.name for a in node.names)}
      elif source.startswith(f'{package}.'):
        found.add(source.split('.')[1])
    elif isinstance(node, ast.Import):
      parts = [a.name.split('.') for a in node.names]
      found |= {p[1] for p in parts if p[0] == package and len(p) > 1}
  return found


def hash_of_code(paths: Sequence[str | pathlib.Path]) -> str:
  """Returns 16 hex digits of Python files, without comments and docstrings."""
  sha = hashlib.sha256()
  for path in paths:
    sha.update(_code(pathlib.Path(path).read_bytes()))
  return sha.hexdigest()[:16]


def _tree(source):
  """Parses it; of what is no Python, which nobody can run, an empty tree."""
  try:
    return ast.parse(source)
  except SyntaxError:
    return ast.Module([], [])


@functools.lru_cache(1 << 10)
def _code(source):
  tree = _tree(source)
  for node in ast.walk(tree):
    body = getattr(node, 'body', None)
    first = body[0] if isinstance(body, list) and body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
      del body[0]
  return hashlib.sha256(ast.dump(tree).encode()).digest()


def extra(package: str, name: str, function: str) -> Callable[..., Any] | None:
  """Returns what else `package/name.py` defines by that name, or None."""
  get(package, name)
  return getattr(importlib.import_module(f'{package}.{name}'), function, None)


def hook(
  package: str,
  config: Mapping[str, Any],
  function: str,
  *args: Any,
  floats: Mapping[str, Any] | None = None,
) -> Any:
  """Calls a function beside a component, with the knobs that it declares.

  Args:
    package, config, floats: as in `build`.
    function: its name, e.g. 'eval_params' in optimizers/schedule_free_adamw.py.
    *args: its positional arguments.

  Returns:
    What it returns; None if the file defines no such function.
  """
  called = extra(package, config['name'], function)
  if called is None:
    return None
  given = {**config, **(floats or {})}
  declared = inspect.signature(called).parameters.values()
  names = [p.name for p in declared if p.kind is p.KEYWORD_ONLY]
  return called(*args, **{name: given[name] for name in names})


def parse(arg: str, **defaults: str) -> dict[str, str]:
  """Parses the part of --config behind the colon: 'size=124m,optimizer=muon'.

  Returns the choices as a dict; those that `arg` leaves out have `defaults`.
  """
  chosen = {}
  for part in filter(None, arg.split(',')):
    key, equals, value = part.partition('=')
    if key in defaults and not value:
      raise UserError(f"'{part}' has no value; write '{key}=NAME'.")
    if not equals or key not in defaults:
      raise UserError(
        f"'{part}' is not a choice of this file, written as KEY=VALUE."
        + did_you_mean(key, defaults)
      )
    if key in chosen:
      raise UserError(f"'{part}': {key} was chosen before.")
    chosen[key] = value
  return {**defaults, **chosen}


def _check_knob(package, name, key, legal):
  if key not in legal:
    hint = did_you_mean(key, [k for k in legal if k != 'name'])
    raise UserError(f"{package}/{name}.py has no knob '{key}'.{hint}")
