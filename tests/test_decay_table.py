"""The README's table of weight decay is what the code does."""

import pathlib

from launch import decay_table

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_the_readme_has_the_measured_table():
  text = README.read_text()
  block = text.split('<!-- decay table -->')[1].split('<!-- end -->')[0]
  assert block.strip() == decay_table.table(), (
    'Paste the output of `python -m launch.decay_table` into README.md.'
  )


def test_it_measures(monkeypatch):
  """Another decay gives another table: the entries are not looked up."""
  assert decay_table.formulas('adamw', 'decoupled')['matrices'] == 'lr wd x'
  step = decay_table._stepper

  def twice(name, mode):
    f = step(name, mode)
    return lambda size, **knobs: {
      k: 2 * knobs['lr'] * v for k, v in f(size, **knobs).items()
    }

  monkeypatch.setattr(decay_table, '_stepper', twice)
  assert decay_table.formulas('adamw', 'decoupled')['matrices'] == '2 lr^2 wd x'
