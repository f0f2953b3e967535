"""Each optimizer decays as parts/decay.py says, and so does the README."""

import pathlib
import re

import jax
import pytest

from launch.parts import decay_formulas
from lm import spec
from lm.errors import UserError
from optimizers.parts import decay_masks
from tests import tools

README = pathlib.Path(__file__).parents[1] / 'README.md'
EXPECTED = {
  'decoupled': 'lr wd x',
  'independent': 'lr/peak wd x',
  'corrected': 'lr^2/peak wd x',
  'none': '0',
}
MASKS = {
  'cautious': 'u x >= 0',
  'cautious-strict': 'u x > 0',
  'cautious-gradient': 'g x >= 0',
  'cautious-tensor': '<u, x> >= 0',
  'random-matched': 'at random',
  'random:0.5': 'at random',
}


def test_the_command_prints_the_table(monkeypatch, capsys):
  monkeypatch.setattr(decay_formulas, 'table', lambda names: '| measured |')
  assert tools.call(monkeypatch, 'decay_table') == 0
  assert '| measured |' in capsys.readouterr().out


def test_a_file_that_is_no_optimizer_is_named(monkeypatch):
  monkeypatch.setattr(spec, 'build', lambda *_, **__: None)
  decay_formulas._stepper.cache_clear()
  with pytest.raises(UserError, match=r"^'optimizers/signum.py'"):
    decay_formulas.table(['signum'])
  decay_formulas._stepper.cache_clear()


def test_the_readme_has_the_measured_table():
  """Of the optimizers that it names: a new file needs no other edit."""
  text = README.read_text()
  block = text.split('<!-- decay table -->')[1].split('<!-- end -->')[0]
  first = [line.split('|')[1] for line in block.splitlines() if line]
  named = {name.strip() for cell in first for name in cell.split(',')}
  named &= set(spec.names('optimizers'))
  (there,) = re.findall(r'There are already: ([^.]*) and (\w+)\.', text)
  assert named == {*re.findall(r'\w+', ' '.join(there))}
  assert block.strip() == decay_formulas.table(sorted(named)), (
    'Paste the output of `python -m launch.decay_table` into README.md.'
  )


@pytest.mark.parametrize('mode', decay_formulas.FORMULAS)
@pytest.mark.parametrize('name', spec.names('optimizers'))
def test_zero_gradient(name, mode):
  """Matrices as in the table; the rest may have its own ratio of lr.

  A method with a step size of its own multiplies lr by it, at first d0.
  """
  found = decay_formulas.formulas(name, mode)
  assert found['norm scales'] == '0'
  if mode == 'coupled':
    assert found['matrices'] != '0' and found['embeddings, head'] != '0'
    return
  own = spec.knobs('optimizers', name).get('d0')
  scaled = own and mode not in ('independent', 'none')
  want = f'{own:.3g} {EXPECTED[mode]}' if scaled else EXPECTED[mode]
  assert found['matrices'] == want
  rest = re.sub(r'^[0-9.e-]+ ', '', found['embeddings, head'])
  assert rest == EXPECTED[mode]


@pytest.mark.parametrize('mode', decay_masks.MODES)
@pytest.mark.parametrize('name', spec.names('optimizers'))
def test_masks(name, mode):
  """Only methods whose u is no elementwise function of g tell u from g."""
  assert MASKS[mode] in decay_formulas.masks(name, mode)


def test_it_measures(monkeypatch):
  """Another decay gives another table: the entries are not looked up."""
  step = decay_formulas._stepper

  def twice(name):
    f = step(name)
    return lambda size, **knobs: jax.tree.map(
      lambda v: 2 * knobs['lr'] * v, f(size, **knobs)
    )

  monkeypatch.setattr(decay_formulas, '_stepper', twice)
  assert (
    decay_formulas.formulas('adamw', 'decoupled')['matrices'] == '2 lr^2 wd x'
  )
  assert decay_formulas.masks('muon', 'cautious') != {'at random'}
  monkeypatch.setattr(
    decay_formulas,
    '_stepper',
    lambda name: (
      lambda size, **knobs: {
        **(f := step(name)(size, **knobs)),
        'cautious': f['cautious-strict'],
      }
    ),
  )
  assert decay_formulas.masks('muon', 'cautious') == {'u x > 0'}
