"""Components from signatures, and the configs that are made of them."""

import importlib
import json
import pathlib
import re

import jax
import pytest
from ml_collections import ConfigDict

import optimizers
from configs import base, resolved, sizes
from lm import card, loop, spec
from lm.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(
  p
  for p in ROOT.glob('configs/**/*.py')
  if p.name not in ('__init__.py', 'sizes.py', 'resolved.py')
)


@pytest.fixture
def component(tmp_path, monkeypatch):
  """Writes a component file, beside those of `optimizers/`, for one test."""
  monkeypatch.setattr(
    optimizers, '__path__', [*optimizers.__path__, str(tmp_path)]
  )

  def write(name, text):
    (tmp_path / f'{name}.py').write_text(text)
    importlib.invalidate_caches()

  return write


def test_names_are_the_modules_and_not_the_subpackages():
  files = {p.stem for p in (ROOT / 'optimizers').glob('*.py')} - {'__init__'}
  assert set(spec.names('optimizers')) == files
  assert 'parts' not in spec.names('optimizers')


@pytest.mark.parametrize('package', ['optimizers', 'schedules', 'merging'])
def test_every_file_defines_its_function(package):
  for name in spec.names(package):
    function = spec.get(package, name)
    assert function.__name__ == name
    assert function.__doc__, f'{package}/{name}.py has no docstring'
    assert len(spec.spec(package, name)) == 1 + len(spec.knobs(package, name))


@pytest.mark.parametrize(
  ('name', 'rate'), [('adamw', 3e-3), ('prodigy', 1.0), ('sgdw', 0.1)]
)
def test_an_optimizer_may_state_its_learning_rate(name, rate):
  config = base.get_config(f'size=debug,optimizer={name}')
  assert config.learning_rate == rate
  assert 'learning_rate' not in config.optimizer


@pytest.mark.parametrize(
  ('name', 'signature', 'message'),
  [
    ('as_text', "learning_rate='0.1'", "is '0.1'; legal: a number"),
    ('as_none', 'learning_rate=None', 'is None; legal: a number'),
    ('as_bool', 'learning_rate=True', 'is True; legal: a number'),
    ('as_knob', '*, learning_rate=0.1', 'must stand before the'),
  ],
)
def test_a_learning_rate_that_cannot_be_stated(
  component, name, signature, message
):
  component(name, f'def {name}({signature}):\n  """Doc."""\n')
  with pytest.raises(UserError, match=message):
    base.get_config(f'size=debug,optimizer={name}')


def test_spec_holds_every_default_and_refuses_others():
  s = spec.spec('optimizers', 'adamw', b2=0.99)
  assert (s.name, s.b1, s.b2) == ('adamw', 0.9, 0.99)
  with pytest.raises(UserError, match=r"no knob 'b3'. Did you mean 'b[12]'"):
    spec.spec('optimizers', 'adamw', b3=1.0)
  with pytest.raises(UserError, match=r"b2='x' must be of type float"):
    spec.spec('optimizers', 'adamw', b2='x')
  with pytest.raises(UserError, match=r"Did you mean 'adamw'\?"):
    spec.spec('optimizers', 'adamv')
  with pytest.raises(AttributeError):
    s.b3 = 1.0


def test_build_passes_what_the_component_declares(component):
  component('zz_one', 'def zz_one(learning_rate, *, x: float = 1):\n'
            '  """Doc."""\n  return learning_rate, x\n')  # fmt: skip
  s = spec.spec('optimizers', 'zz_one')
  assert isinstance(s.x, float)  # an annotation decides, not the literal 1
  assert spec.build('optimizers', s, 'lr', 'axes', 'peak') == ('lr', 1.0)
  assert spec.build('optimizers', s, 'lr', floats={'x': 5}) == ('lr', 5)
  assert spec.floats('optimizers', s) == {'x': 1.0}


@pytest.mark.parametrize('x', ['x', 'x: float'])
def test_a_component_with_a_bad_default_is_named(component, x):
  component('zz_bad', f'def zz_bad(learning_rate, *, {x}=None):\n  pass\n')
  with pytest.raises(UserError, match=r"zz_bad.py: the default of 'x' is None"):
    spec.spec('optimizers', 'zz_bad')
  component('zz_worse', 'def other():\n  pass\n')
  with pytest.raises(UserError, match=r"defines no function 'zz_worse'"):
    spec.spec('optimizers', 'zz_worse')


@pytest.mark.parametrize(
  ('text', 'cause'),
  [
    ('x = (\n', "line 1: '(' was never closed."),
    ('\nimport zz_gone\n', 'line 2: ModuleNotFoundError: No module named'),
    ('import numpy\nnumpy.ones(-1)\n', 'line 2: ValueError: negative dim'),
    ('import json\njson.loads("{")\n', 'line 2: JSONDecodeError: Expecting'),
    ('x = 1\n\nx += ""\n', 'line 3: TypeError: unsupported operand'),
  ],
)
def test_a_component_that_raises_is_named_with_its_line(component, text, cause):
  name = f'zz_{abs(hash(text))}'
  component(name, text)
  sentence = re.escape(f"{name}.py', {cause}")
  with pytest.raises(UserError, match=sentence) as e:
    spec.get('optimizers', name)
  assert e.value.__cause__


@pytest.mark.parametrize(
  'signature, sentence',
  [
    ('learning_rate, momentum=0.9', "'momentum' must stand behind a `*`"),
    ('learning_rate, peak=None, axes=None', "'peak' must stand behind"),
    ('lr, axes', "'lr' must stand behind a `*`; by position a run gives learn"),
  ],
)
def test_a_knob_among_the_positions_is_named(component, signature, sentence):
  name = f'zz_{abs(hash(signature))}'
  component(name, f'def {name}({signature}):\n  pass\n')
  with pytest.raises(UserError, match=re.escape(sentence)):
    spec.spec('optimizers', name)


def test_parse():
  assert spec.parse('', size='tiny') == {'size': 'tiny'}
  chosen = spec.parse('a=1,b=2', a='', b='', c='3')
  assert chosen == {'a': '1', 'b': '2', 'c': '3'}
  for bad in ('siz=tiny', 'size', 'size=', '=x', 'size=a,size=b'):
    with pytest.raises(UserError, match='size'):
      spec.parse(bad, size='tiny')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds(path):
  module = importlib.import_module(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  )
  config = module.get_config()
  assert config.is_locked
  assert module.__doc__
  built = loop.build(config)
  assert jax.tree.leaves(built.abstract.params)


@pytest.mark.parametrize('optimizer', spec.names('optimizers'))
def test_every_choice_of_base_survives_json(optimizer, tmp_path):
  config = base.get_config(f'optimizer={optimizer},size=debug')
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(card.as_dict(config)))
  again = resolved.get_config(str(path))
  assert card.diff(card.as_dict(config), card.as_dict(again)) == {}
  jax.tree.map(lambda a, b: type(a) is type(b) or pytest.fail(f'{a} {b}'),
               config.to_dict(), again.to_dict())  # fmt: skip


def test_sizes_are_overrides_of_known_fields():
  for name in sizes.SIZES:
    base.get_config(f'size={name}')
  with pytest.raises(UserError, match=r"Did you mean '124m'"):
    base.get_config('size=125m')


def test_diff_flattens():
  old = ConfigDict({'a': 1, 'b': {'c': 0.95, 'd': 2}}).to_dict()
  new = ConfigDict({'a': 1, 'b': {'c': 0.99, 'e': 3}}).to_dict()
  assert card.diff(old, new) == {
    'b.c': (0.95, 0.99),
    'b.d': (2, None),
    'b.e': (None, 3),
  }
