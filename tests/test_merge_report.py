"""launch.merge_report: averages in one pass, tables; mistakes of neighbours."""

import json
import re
import shutil
import types

import numpy as np
import pytest

from launch.parts import comparison, cooldowns, judgement, show
from lm import loop
from lm import run as run_lib
from lm.errors import UserError
from merging.engine import sources, stream
from tests import helpers, tools


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs') / 'run'
  config = helpers.config('schedule=constant', checkpoint__every_steps=3)
  loop.train(config, path)
  return run_lib.Run(path)


@pytest.fixture(scope='module')
def cooldown(run, tmp_path_factory):
  path = tmp_path_factory.mktemp('runs') / 'cooldown'
  config = helpers.config(branch=f'{run.path}@6', checkpoint__every_steps=3)
  config.schedule.decay = 0.5
  loop.train(config, path)
  return run_lib.Run(path)


@pytest.mark.parametrize('max_bytes', [1, 300_000, 1 << 30])
def test_averages_in_one_pass_are_those_of_a_merge(run, max_bytes, monkeypatch):
  """Bit for bit, however many are made together."""
  cells = judgement.grid(run, [6, 12], [6])
  jobs = judgement.jobs(run, cells, cells, ['linear', 'cosine'], 0.25)
  seen, read = [], judgement.read
  monkeypatch.setattr(type(run), 'losses', lambda _, params: params)
  monkeypatch.setattr(
    judgement, 'read', lambda r, path: (seen.append(path), read(r, path))[1]
  )
  found = judgement.measure(run, jobs, max_bytes)
  assert len(found) == 8
  for job, params in found.items():
    want = helpers.flat(stream.combine(job.plan.sources))
    for key, value in helpers.flat(params).items():
      np.testing.assert_array_equal(value, want[key], err_msg=key)
  distinct = {p for job in jobs for p, _ in job.plan.sources}
  assert (len(seen) == len(distinct)) == (max_bytes > 300_000)


def test_a_linear_decay_is_one_subtraction_whatever_its_window(
  tmp_path, monkeypatch
):
  """Prefix sums of interval means, against float64 sums of the means."""
  config = helpers.config('schedule=constant', checkpoint__every_steps=2)
  loop.train(config, tmp_path / 'run')
  run = run_lib.Run(tmp_path / 'run')
  cells = judgement.grid(run, [8, 10, 12], [6, 8])
  jobs = judgement.jobs(run, cells, [], ['linear', '1-sqrt'], 0.25)
  steps = {sources.item(run.path, s, 'mean'): 2 for s in range(2, 14, 2)}
  added, plain = [], judgement._added
  monkeypatch.setattr(
    judgement, '_added', lambda *a: (added.append(1), plain(*a))[1]
  )
  monkeypatch.setattr(type(run), 'losses', lambda _, params: params)
  for job, params in judgement.measure(run, jobs).items():
    found = judgement._prefixed(dict(job.plan.sources), steps)
    kinks = [c for path, c in found.items() if path in steps and c]
    begins = job.end == job.window  # before its first mean there is nothing
    assert len(kinks) == (job.shape == 'linear') * (2 - begins)
    want = {}
    for path, c in job.plan.sources:
      for key, x in helpers.leaves(run.path, *_item(path)).items():
        want[key] = want.get(key, 0) + c * x.astype(np.float64)
    for key, value in helpers.flat(params).items():
      assert value.dtype == np.float32
      np.testing.assert_allclose(value, want[key], rtol=2e-6, atol=1e-8)
  linear = [job for job in jobs if job.shape == 'linear']
  curved = [job for job in jobs if job.shape == '1-sqrt']
  begins = sum(job.end == job.window for job in linear)
  direct = sum(len(job.plan.sources) for job in curved)
  # One per mean for all, a start, an end and the floor for each linear one.
  assert len(added) == len(steps) + 3 * len(linear) - begins + direct


def _item(path):
  return int(path.parent.name), path.name


def test_difference_is_students_interval():
  # By hand: mean 2, standard deviation 1, t(2, 0.975) = 4.302653.
  d = comparison.difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
  half = 4.302653 / np.sqrt(3)
  np.testing.assert_allclose(d, [2, 2 - half, 2 + half], rtol=1e-6)
  assert comparison.difference([1.0], [3.0]) == (-2, -np.inf, np.inf)
  assert comparison.difference([1.0, 2.0], [0.0, 1.0]) == (1, 1, 1)


def test_a_standard_error_takes_three_batches():
  last, losses = np.array([2.0, 3.0, 4.0]), np.array([1.0, 2.0, 4.5])
  # By hand: differences 1, 1, -.5; their deviation .8660, over the root of 3.
  assert show.gain(last, losses) == ('0.5000', '0.5000')
  assert show.gain(last[:2], losses[:2]) == ('1.0000', '-')
  assert show.gain(last, last * (1 + 1e-5))[1] == '<0.0001'


def test_rows(run, cooldown):
  real = [cooldowns.read_one(run, cooldown)]
  found = comparison.compare(run, real, shapes=['linear', 'cosine'])
  rows = comparison.rows(found)
  assert [(r['source'], r['window']) for r in rows] == [('real', 6)] + [
    (source, 6) for source in ('raw', 'raw', 'means', 'means')
  ]
  merged = {(r['shape'], r['source']): r for r in rows}
  want = run.losses(cooldown.params(12)).mean()
  assert merged['linear', 'real']['loss'] == pytest.approx(want)
  for row in rows[1:]:
    gap = row['loss'] - rows[0]['loss']
    assert row['behind'].mean == pytest.approx(gap, abs=1e-9)
    best = min(d.mean for d in map(_one, row['against'].values()))
    assert best < 5 and row['real'] == 'linear'
    parts = [run.losses(_load(run, name)) for name in row['against']]
    lowest = min(x.mean() for x in parts)
    assert row['over_best'].mean == pytest.approx(row['loss'] - lowest)
  more = comparison.compare(run, real, windows=[9])
  assert {r['window'] for r in comparison.rows(more)} == {6, 9}
  whole = comparison.compare(run, [], windows=[3])  # some are one checkpoint
  assert json.loads(json.dumps(comparison.as_json(whole)))['step'] == 12
  with pytest.raises(UserError, match='at 9; --step=12 compares there'):
    comparison.compare(run, real, step=9)


def _one(difference):
  assert difference.low <= difference.mean <= difference.high
  return difference


def _load(run, name):
  step, item = name.split()
  return run.params(int(step)) if item == 'params' else run.mean(int(step))


def test_a_cooldown_in_a_folder_with_an_at_sign(run, cooldown, tmp_path):
  for path, name in ((run.path, 'a@1'), (cooldown.path, 'b')):
    shutil.copytree(path, tmp_path / name)
  meta = tmp_path / 'b' / 'meta.json'
  about = json.loads(meta.read_text())
  meta.write_text(json.dumps({**about, 'parent': f'{tmp_path}/a@1@6'}))
  moved, branch = (run_lib.Run(tmp_path / name) for name in ('a@1', 'b'))
  assert cooldowns.read_one(moved, branch).window == 6


def test_without_means_a_default_window_holds_two_checkpoints(
  run, tmp_path, capsys
):
  bare = run_lib.Run(shutil.copytree(run.path, tmp_path / 'bare'))
  for mean in bare.path.glob('checkpoints/*/mean'):
    shutil.rmtree(mean)
  grids = [judgement.grid(r, [12], []) for r in (run, bare)]
  assert grids == [[(12, 3), (12, 6)], [(12, 6)]]
  assert len(judgement.jobs(bare, grids[1], [(12, 6)], ['linear'], 0.0)) == 1
  assert not capsys.readouterr().out
  judgement.jobs(bare, [(12, 7)], [], ['linear', 'cosine'], 0.0)
  told = capsys.readouterr().out
  assert told.count('warning') == 1
  assert 'before step 12 emulate a decay of 9 steps, not of 7' in told
  with pytest.raises(UserError, match=r'those of \[3\] steps hold one checkp'):
    comparison.compare(bare, [], windows=[3])


def test_the_command(run, cooldown, tmp_path, monkeypatch, capsys):
  path = f'--run={run.path}'
  arguments = [path, f'--against={cooldown.path}']
  merge = ('merge', path, '--method=wma', '--window=6', '--name=w')
  assert tools.call(monkeypatch, *merge) == 0
  report = ('merge_report', *arguments, '--merges=w')
  assert tools.call(monkeypatch, *report) == 0
  assert 'minus best part' in capsys.readouterr().out
  rows = json.loads((run.path / 'plots/merge_report.json').read_text())['rows']
  (row,) = (r for r in rows if r['source'] == 'merged')
  assert (row['shape'], row['window'], row['real']) == ('w', 6, 'linear')
  assert row['loss'] == pytest.approx(run.losses(run.params('w')).mean())
  assert list(row['against']) == ['9 params', '12 params']
  early = ('merge_report', path, '--merges=w', '--step=9')
  assert tools.call(monkeypatch, *early) == 2
  assert 'merged/w ends at step 12, not at 9' in capsys.readouterr().err
  manifest = run.path / 'merged/w/merge.json'
  whole = manifest.read_text()
  for text, sentence in (
    ('{', 'merge.json'),
    ('{"method": [], "sources": {}}', 'method'),
    ('{"method": {}, "sources": [{}]}', 'is damaged: its sources'),
    ('{"method": {}, "sources": []}', 'is damaged: its sources'),
    (whole.replace('checkpoints/9/', 'checkpoints/7/'), 'which is gone'),
  ):
    manifest.write_text(text)
    assert tools.call(monkeypatch, *report) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count('\n') == 1, error
  manifest.write_text(whole)
  inputs = f'--inputs={run.path}/checkpoints'
  out = f'--out={run.path}/merged/foreign'
  assert tools.call(monkeypatch, 'merge', inputs, '--steps=6,12', out) == 0
  assert tools.call(monkeypatch, *report[:-1], '--merges=foreign') == 0
  assert 'foreign' in capsys.readouterr().out
  shutil.rmtree(run.path / 'merged/foreign')
  assert tools.call(monkeypatch, *report[:-1], '--merges=x') == 2
  assert 'is not a merge; merges of this run: w' in capsys.readouterr().err
  plots = run.path / 'plots'
  assert (plots / 'merge_report.png').read_bytes()[:4] == b'\x89PNG'
  assert '| 6 | linear | real |' in (plots / 'merge_report.md').read_text()
  stored = json.loads((plots / 'merge_report.json').read_text())
  assert len(stored['rows']) == 1 + 2 * 3 + 1
  imported = tmp_path / 'imported'
  shutil.copytree(cooldown.path, imported)
  (imported / 'meta.json').write_text('{"status": "imported", "step": 0}')
  base = ('merge', path, '--dry_run', '--name=z', '--method=decay:grid=block')
  assert tools.call(monkeypatch, *base, '--window=6') == 0
  assert 'These checkpoints' not in capsys.readouterr().out
  assert tools.call(monkeypatch, *base, '--window=7') == 0
  assert 'checkpoints cover 6 steps, not --window=7.' in capsys.readouterr().out
  assert tools.call(monkeypatch, *base[:4], '--means', '--every=6') == 2
  assert '--every does not go with --means' in capsys.readouterr().err
  for wrong, sentence in (
    ([], '--run is missing'),
    ([path, '--step=7'], '@7'),
    ([path, '--windows=5'], 'does not begin at a checkpoint'),
    ([path, '--shapes='], '--shapes is empty'),
    ([path, '--against=a', '--against=b'], 'given twice; say --against=A,B.'),
    ([path, f'--against={run.path}'], 'is not a branch'),
    ([path, f'--against={imported}'], 'is not a branch'),
  ):
    assert tools.call(monkeypatch, 'merge_report', *wrong) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count('error: ') == 1


@pytest.mark.parametrize(
  'command', ['emulate --run=x', 'merge_report --run=x', 'soup --at=x,y']
)
@pytest.mark.parametrize('name', ['../../evil', 'a/b', ''])
def test_a_name_that_leaves_the_run_is_refused_first(
  command, name, monkeypatch, capsys
):
  wrong = [*command.split(), f'--name={name}']
  assert tools.call(monkeypatch, *wrong) == 2
  assert f"name='{name}' must be a plain file name" in capsys.readouterr().err


@pytest.mark.parametrize(
  ('command', 'arguments', 'sentence'),
  [
    ('evaluate', [], '--at is missing; for example --at='),
    ('evaluate', ['--at=gone'], "'gone' does not exist; legal: RUN, RUN@STEP"),
    ('evaluate', ['--at={run}@7'], "@7' does not exist; '.*' has the steps 0"),
    ('evaluate', ['--at={run},{run}/merged/x'], "x' is not a merge; merges of"),
    ('emulate', [], '--run is missing; for example --run='),
    ('emulate', ['--run=gone'], "'gone' is not a run directory"),
    ('emulate', ['--run={run}', '--shapes=lin'], "'lin'.*Did you mean 'lin"),
    (
      'emulate',
      ['--run={run}', '--ends=7'],
      '7 is not a checkpoint; there are',
    ),
    ('emulate', ['--run={run}', '--windows=0'], r'--windows: none of \[0\] st'),
    ('emulate', ['--run={run}', '--windows=x'], "--windows: 'x' is not a num"),
  ],
)
def test_mistakes_on_the_command_line(
  run, command, arguments, sentence, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  before = sorted(run.path.rglob('*'))
  given = [a.format(run=run.path) for a in arguments]
  assert tools.call(monkeypatch, command, *given) == 2
  output = capsys.readouterr()
  (line,) = output.err.splitlines()
  assert re.match(f'error: .*{sentence}', line)
  assert not output.out
  assert sorted(run.path.rglob('*')) == before
  assert not list(tmp_path.iterdir())


def test_a_cooldown_may_begin_where_the_run_ends(tmp_path):
  config = helpers.config()
  run = types.SimpleNamespace(
    path=tmp_path, config=config, steps=[0, 4],
    learning_rates=lambda: np.ones(4), losses=lambda p: p,
  )  # fmt: skip
  branch = types.SimpleNamespace(
    path='b',
    config=config,
    meta={'parent': f'{tmp_path}@4', 'status': 'done'},
    steps=[4, 8],
    learning_rates=lambda: np.array([1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    params=lambda step: np.zeros(2),
  )
  found = cooldowns.read_one(run, branch)
  assert (found.end, found.window) == (8, 4)
  run.steps = [0, 3]
  with pytest.raises(UserError, match=r'begins at step 4, .* it has \[0, 3\]'):
    cooldowns.read_one(run, branch)
