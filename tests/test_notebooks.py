"""Notebooks run headless, from top to bottom, on a tiny run."""

import ast
import os

import nbformat
import pytest
from nbclient import NotebookClient

from lm import loop
from tests import helpers

NOTEBOOKS = sorted((helpers.ROOT / 'notebooks').glob('*.ipynb'))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs')
  config = helpers.config('schedule=constant', checkpoint__every_steps=1)
  loop.train(config, path / 'run')
  config = helpers.config(branch=f'{path}/run@8', checkpoint__every_steps=1)
  config.schedule.decay = 1 / 3
  loop.train(config, path / 'cooldown')
  return path


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, runs, monkeypatch):
  monkeypatch.setitem(os.environ, 'LMOPT_RUN', str(runs / 'run'))
  monkeypatch.setitem(os.environ, 'LMOPT_COOLDOWN', str(runs / 'cooldown'))
  notebook = nbformat.read(path, as_version=4)
  assert all(not c.get('outputs') for c in notebook.cells)  # kept clean
  NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(path.parent)}}
  ).execute()
  text = str([c.get('outputs') for c in notebook.cells])
  assert 'share of the gain' in text


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_import_only_what_they_may(path):
  notebook = nbformat.read(path, as_version=4)
  ours = {'lm', 'configs', 'optimizers', 'schedules', 'merging', 'launch'}
  for cell in notebook.cells:
    if cell.cell_type != 'code':
      continue
    for node in ast.walk(ast.parse(cell.source)):
      if isinstance(node, ast.ImportFrom) and node.module:
        top = node.module.split('.')[0]
        allowed = node.module == 'lm.run' or top in ('schedules', 'merging')
        assert top not in ours or allowed, node.module
