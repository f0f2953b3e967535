"""What all commands share: flags, --help, one-sentence errors, exit codes.

Exit codes: 0 done, 1 diverged, 2 a mistake of the user, 130 interrupted, 141
nobody reads the output, 143 preempted or terminated.
Imports of this file are light, so that --help answers at once.
"""

import contextlib
import importlib.util
import inspect
import os
import pathlib
import platform
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch.parts import fields
from lm import noise, spec
from lm.errors import FULL, UserError, did_you_mean, of_code, of_flag

ROOT = pathlib.Path(__file__).parents[1]
PARSERS = {bool: (flags.BooleanParser(), 'true or false'),
           int: (flags.IntegerParser(), 'an integer'),
           float: (flags.FloatParser(), 'a number')}  # fmt: skip


def define_config() -> Any:
  """Defines --config and --config.a.b=v; its `.value` is the config."""
  return config_flags.DEFINE_config_file('config', lock_config=True)


def run(
  main: Callable[[], int | None],
  default_config: str = '',
  more_help: Callable[[], str] = lambda: '',
) -> None:
  """Parses flags, runs `main`, and exits with its code.

  Args:
    main: the command; it may raise UserError.
    default_config: of a command that has --config, else empty.
    more_help: returns what --help shows below the flags.
  """
  _compilation_cache()  # before anything imports jax
  noise.quiet()
  before = signal.signal(signal.SIGTERM, _terminate)
  trains = bool(default_config)
  try:
    argv = _resolve(sys.argv, default_config)
    if {'--help', '-h', '--helpfull'} & set(argv):
      print(_help(main, argv[0], default_config))
      print(_knobs(sys.argv, argv) if default_config else '', end='')
      print(more_help(), end='')
      main = int
    else:
      check_overrides(argv)
      extra = flags.FLAGS(argv)[1:]
      _check_lists(argv[0])
      if extra:
        raise UserError(f"'{extra[0]}' is not a flag; flags begin with --.")
    code = main()
    sys.stdout.flush()
  except BrokenPipeError:
    os._exit(141)  # who reads, as `head`, has enough
  except (flags.Error, UserError, OSError) as e:
    text = _no_space(e) or of_flag(' '.join(str(e).split()))
    print(f'error: {text}', file=sys.stderr)
    code = 2
  except KeyboardInterrupt as e:
    more = ', and a run goes on from its newest checkpoint'
    text = f'interrupted; the same command starts again{more * trains}.'
    print(text, file=sys.stderr, flush=True)
    # As kill -9: a save that was cut would print or hang.
    os._exit(143 if e.args == (signal.SIGTERM,) else 130)
  except Exception as e:
    print(f'error: {_of_library(e)}', file=sys.stderr)
    code = 2
  finally:
    signal.signal(signal.SIGTERM, before)
  sys.exit(code or 0)


def _check_lists(program: str) -> None:
  """Refuses a list flag that is given twice: absl would take the last."""
  for flag in flags.FLAGS.flags_by_module_dict().get(program, []):
    if isinstance(flag.parser, flags.ListParser) and flag.present > 1:
      raise UserError(f'--{flag.name} is given twice; say --{flag.name}=A,B.')


def _terminate(number, frame):
  """Ends a command as Ctrl-C does, so that it removes what is half done."""
  raise KeyboardInterrupt(number)


def _of_library(e: Exception) -> str:
  """Returns the sentence for what libraries raise when the machine is full.

  Anything else is raised again: it is a mistake of ours.
  """
  if text := _no_space(e):
    return text
  if 'RESOURCE_EXHAUSTED' in str(e) or isinstance(e, MemoryError):
    line, _, _ = str(e).partition('\n')
    return (
      f'not enough memory: {line} Less is needed with a smaller batch_size, '
      'with grad_accum_steps and with model.remat=full.'
    )
  raise e


def _no_space(e: Exception) -> str:
  """Returns the sentence for a full disk, or ''."""
  if not (found := FULL.search(str(e))):
    return ''
  place = re.search(r"""["']([^"']*/[^"']*)["']""", str(e))
  where = f' for {place[1]}' if place else ''
  return f'{found[0].lower()}{where}; make room and the same command goes on.'


def load_config(text: str) -> ConfigDict:
  """Loads 'configs/x.py', 'configs/x.py:arg' or '<run>/config.json'.

  Raises:
    UserError: no such file, what it raises, a choice that does not exist, or
      fields that are not those of configs/base.py.
  """
  path, _, arg = resolved(text).partition(':')
  module = load_module(path)
  if not hasattr(module, 'get_config'):
    raise UserError(f"'{path}' has no get_config().")
  with of_code(path):
    config = module.get_config(arg) if arg else module.get_config()
  fields.check(config, path)
  return config


def load_module(path: str) -> types.ModuleType:
  """Runs a config file.

  Raises:
    UserError: no such file, or what it raises.
  """
  if not pathlib.Path(path).is_file():
    known = sorted(map(os.path.relpath, ROOT.glob('configs/[!_]*.py')))
    if pathlib.Path(path, 'config.json').is_file():
      known.append(f'{path}/config.json')
    what = 'is no file' if pathlib.Path(path).exists() else 'does not exist'
    raise UserError(f"'{path}' {what}.{did_you_mean(path, known)}")
  if not path.endswith('.py'):
    raise UserError(f"'{path}' is not a .py config or a run's config.json.")
  sys.path += {str(pathlib.Path(path).parent)} - {*sys.path}  # is importable
  module_spec = importlib.util.spec_from_file_location('config_file', path)
  module = importlib.util.module_from_spec(module_spec)
  with of_code(path):
    module_spec.loader.exec_module(module)
  return module


def resolved(text: str) -> str:
  """A run's config.json is read by a config file of ours."""
  ours = str(ROOT / 'configs' / 'resolved.py')
  found = re.fullmatch(r'.*\.json(:[^/]*)?', text)
  return f'{ours}:{text}' if found and not text.startswith(ours) else text


def _resolve(argv: list[str], default: str) -> list[str]:
  """Puts --config=FILE first, the default if it is not given."""
  if not default:
    return argv
  ours = default if pathlib.Path(default).is_file() else str(ROOT / default)
  chosen, rest, after = ours, [], False
  for arg in argv[1:]:
    if after or arg.startswith('--config='):
      chosen, after = arg.removeprefix('--config='), False
    elif arg == '--config':
      after = True
    else:
      rest.append(arg)
  if after:
    raise UserError('--config has no value; for example --config=' + default)
  return [argv[0], f'--config={resolved(chosen)}', *rest]


def check_overrides(argv: list[str]) -> None:
  """Answers a missing file or a misspelt field with one sentence."""
  if not (argv[1:] and argv[1].startswith('--config=')):
    return
  config = load_config(argv[1].removeprefix('--config='))
  for arg in argv[2:]:
    name, _, value = arg.lstrip('-').removeprefix('no').partition('=')
    if arg.startswith('-') and name.startswith('config.'):
      _check_field(config, name.removeprefix('config.'), value)


def _check_field(config: ConfigDict, field: str, value: str) -> None:
  place, seen = config, ''
  for part in field.split('.'):
    if not isinstance(place, ConfigDict) or part not in place:
      legal = list(place) if isinstance(place, ConfigDict) else []
      legal = [k for k in legal if k != 'name']
      hint = did_you_mean(part, legal) if legal else ''
      for section in legal:
        if isinstance(place[section], ConfigDict) and part in place[section]:
          hint = f" Did you mean '{seen}{section}.{part}'?"
      raise UserError(f"The config has no field '{seen}{part}'.{hint}")
    place, seen = place[part], f'{seen}{part}.'
  if isinstance(place, ConfigDict):
    how = f'set its fields, as {field}.{next(iter(place))}'
    if field in ('optimizer', 'schedule'):
      how = f'choose it behind the colon: --config=FILE:{field}=NAME'
    raise UserError(f"'{field}' is a section, which takes no value; {how}.")
  package = {'optimizer.name': 'optimizers', 'schedule.name': 'schedules'}
  if field in package and value != place:
    spec.get(package[field], value)
    raise UserError(
      f'{field}={value} would need other knobs; choose it behind the colon: '
      f'--config=FILE:{field.removesuffix(".name")}={value}.'
    )
  parser, legal = PARSERS.get(type(place), (None, ''))
  try:
    if parser and value:
      parser.parse(value)
  except (TypeError, ValueError) as e:
    raise UserError(f"{field}='{value}' must be {legal}.") from e


def _compilation_cache() -> None:
  """Compiles each program once per machine: a restart begins in seconds."""
  place = ROOT / '.cache' / 'jax' / platform.node()
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(place))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


def _help(main: Any, program: str, default_config: str) -> str:
  # Not of sys.modules: runpy runs a module that is not there.
  text = [inspect.unwrap(main).__globals__['__doc__'].strip(), '', 'Flags:']
  for flag in flags.FLAGS.flags_by_module_dict().get(program, []):
    default = '' if flag.default in (None, '') else f' (default {flag.default})'
    text.append(f'  --{flag.name}: {flag.help}{default}')
  if default_config:
    text[3:3] = [
      f'  --config: a config file with choices (default {default_config})',
      '  --config.FIELD=VALUE: any field of configs/base.py',
    ]
    text += ['', f'Optimizers: {", ".join(spec.names("optimizers"))}']
    text += [f'Schedules:  {", ".join(spec.names("schedules"))}']
    sizes = importlib.import_module('configs.sizes').SIZES
    text += [f'Sizes:      {", ".join(sizes)}']
  return '\n'.join(text)


def _knobs(given: list[str], argv: list[str]) -> str:
  """What the chosen optimizer and schedule are; imports them (slow)."""
  if not any(arg.startswith('--config') for arg in given):
    return 'Their knobs: --config=FILE:optimizer=NAME,schedule=NAME --help\n'
  config = load_config(argv[1].removeprefix('--config='))
  lines = []
  for part in ('optimizer', 'schedule'):
    name = config[part].name
    about = inspect.getdoc(spec.get(f'{part}s', name)) or ''
    lines.append(f'\n{part}s/{name}.py: {about}\n\n')
    lines += [
      f'  --config.{part}.{knob}={value}\n'
      for knob, value in config[part].items()
      if knob != 'name'
    ]
  return ''.join(lines)


def picture(path: str) -> pathlib.Path:
  """Returns the path of --out, which must be that of a PNG."""
  if pathlib.Path(path).suffix != '.png':
    raise UserError(f"--out='{path}' must end in .png.")
  return pathlib.Path(path)


def integers(flag: str, texts: list[str]) -> list[int]:
  """Parses a list flag of steps."""
  for text in texts:
    if not text.strip().isdecimal():
      raise UserError(f"--{flag}: '{text}' is not a number of steps.")
  return [int(text) for text in texts]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Inside, a ValueError of `merging` or `schedules` is a user's mistake."""
  try:
    yield
  except ValueError as e:
    if type(e) is not ValueError:
      raise
    raise UserError(str(e)) from e
