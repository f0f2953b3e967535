"""A schedule read from a file: three formats, resampling, bad files."""

import json
import pathlib

import numpy as np
import optax
import pytest

from lm import spec
from lm.errors import UserError
from schedules.table import table


def _write(path: pathlib.Path, columns):
  if path.suffix == '.npz':
    np.savez(path, **columns)
  elif path.suffix == '.json':
    path.write_text(json.dumps(columns))
  else:
    rows = zip(*columns.values(), strict=True)
    lines = [','.join(columns), *(','.join(map(str, r)) for r in rows)]
    path.write_text('\n'.join(lines) + '\n')
  return str(path)


@pytest.mark.parametrize('suffix', ['.npz', '.csv', '.json'])
def test_a_table_of_the_run_length_is_used_as_it_is(tmp_path, suffix):
  m = [0.1, 1.0, 0.7, 0.3, 0.0]
  multiplier = table(5, path=_write(tmp_path / f'm{suffix}', {'multiplier': m}))
  got = [multiplier(s) for s in range(5)]
  np.testing.assert_array_equal(got, np.float32(m))
  assert multiplier(1000) == 0


def test_another_length_is_stretched_from_first_to_last_step(tmp_path):
  path = _write(tmp_path / 'm.json', {'multiplier': [0.0, 1.0, 0.5]})
  got = [float(table(5, path=path)(s)) for s in range(6)]
  assert got == [0, 0.5, 1, 0.75, 0.5, 0.5]
  assert float(table(1, path=path)(0)) == 0
  short = [float(table(2, path=path)(s)) for s in range(2)]
  assert short == [0, 0.5]


@pytest.mark.parametrize('suffix', ['.npz', '.csv', '.json'])
def test_points_at_logged_steps(tmp_path, suffix):
  # Logged every 10 steps of a run of 100: interpolated between, held after.
  steps = np.arange(0, 100, 10)
  columns = {
    'step': steps.tolist(),
    'multiplier': (1 - steps / 100).tolist(),
    'num_steps': [100] * 10,
  }
  path = _write(tmp_path / f'm{suffix}', columns)
  s = np.arange(100)
  want = np.maximum(1 - s / 100, 0.1)
  np.testing.assert_allclose(table(100, path=path)(s), want, atol=1e-7)
  # Twice as long: the same curve in relative time.
  twice = table(199, path=path)
  np.testing.assert_allclose(twice(2 * s), want, atol=1e-7)


def test_against_optax(tmp_path):
  steps, values = [0, 20, 50, 99], np.array([0.1, 1.0, 0.25, 0.05])
  columns = {'step': steps, 'multiplier': values.tolist(), 'num_steps': 100}
  path = _write(tmp_path / 'm.json', columns)
  scales = dict(zip(steps[1:], values[1:] / values[:-1], strict=True))
  want = optax.piecewise_interpolate_schedule('linear', values[0], scales)
  s = np.arange(120)
  wanted = [float(want(int(x))) for x in s]
  np.testing.assert_allclose(table(100, path=path)(s), wanted, atol=3e-7)


def test_every_schedule_reloads_from_its_points(tmp_path):
  for name in sorted({*spec.names('schedules')} - {'table'}):
    config = spec.spec('schedules', name)
    points = spec.build('schedules', config, 50)(np.arange(50))
    path = str(tmp_path / f'{name}.npz')
    np.savez(path, multiplier=points)
    np.testing.assert_array_equal(table(50, path=path)(np.arange(50)), points)


@pytest.mark.parametrize(
  ('columns', 'message'),
  [
    ({'multiplier': [0.5, -0.1]}, 'multiplier -0.1'),
    ({'multiplier': [0.5, 1.5]}, 'multiplier 1.5'),
    ({'multiplier': [0.5, float('nan')]}, 'multiplier nan'),
    ({'multiplier': []}, 'shape'),
    ({'multiplier': [[0.5]]}, 'shape'),
    ({'multiplier': ['a']}, 'no readable multipliers'),
    ({'lr': [0.5]}, "no key 'multiplier'; it has: lr"),
    ({'multiplier': [1, 0], 'step': [0]}, '1 steps for 2 multipliers'),
    ({'multiplier': [1, 0], 'step': [1, 1]}, 'must increase'),
    ({'multiplier': [1, 0], 'step': [0, float('nan')]}, 'must increase'),
    ({'multiplier': [1, 0], 'step': [0, 9], 'num_steps': 5}, 'num_steps=5'),
  ],
)
def test_bad_content(tmp_path, columns, message):
  path = _write(tmp_path / 'm.json', columns)
  with pytest.raises(ValueError, match=message):
    table(10, path=path)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('m.txt', b'1 2 3', "ends in '.txt'; legal: .csv, .json, .npz"),
    ('m.npz', b'not a zip', 'no readable multipliers'),
    ('m.npz', b'PK\x03\x04 cut', 'no readable multipliers'),
    ('m.json', b'{"multiplier": [1,', 'no readable multipliers'),
    ('m.json', b'\xff\xfe\x00', 'no readable multipliers'),
    ('m.csv', b'', "no key 'multiplier'"),
    ('m.csv', b'multiplier\n1\n,\n', 'no readable multipliers'),
  ],
)
def test_unreadable_files(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    table(10, path=str(tmp_path / name))


@pytest.mark.parametrize('path', ['', 'missing.npz', '.'])
def test_missing_files(path):
  config = spec.spec('schedules', 'table', path=path)
  with pytest.raises(UserError, match=f"path='{path}' is not a file"):
    spec.build('schedules', config, 10)
