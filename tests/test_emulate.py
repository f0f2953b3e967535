"""Merging and emulating a real run, from its directory on disk."""

import json
import math
import shutil

import numpy as np
import pytest

from launch import cli
from launch.parts import (
  cooldowns,
  emulation,
  finished,
  judgement,
  pictures,
  show,
)
from lm import address, checkpoint, fingerprint, loop, verify
from lm import run as run_lib
from lm.errors import UserError
from merging.engine import artifact, chunks, plain, stream
from tests import helpers, merging_items, tools


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A constant run with every second step saved, and with every step."""
  paths = {}
  for name, every in (('run', 3), ('dense', 1)):
    paths[name] = tmp_path_factory.mktemp('runs') / name
    config = helpers.config(
      'schedule=constant', checkpoint__every_steps=every, eval__every_steps=0
    )
    loop.train(config, paths[name])
  return paths


@pytest.fixture
def run(runs):
  return run_lib.Run(runs['run'])


def _plan(run, method='decay', **options):
  return emulation.plan(run, emulation.parse_method(method), **options)


def _replay(dense, start, end, weight):
  """theta_start plus the weighted updates of every step, in float64."""
  total = helpers.leaves(dense, start, 'params')
  total = {k: v.astype(np.float64) for k, v in total.items()}
  before = helpers.leaves(dense, start, 'params')
  for s in range(start, end):
    after = helpers.leaves(dense, s + 1, 'params')
    for k in total:
      total[k] += weight(s) * (after[k].astype(np.float64) - before[k])
    before = after
  return total


@pytest.mark.parametrize('floor', [0.0, 0.25])
def test_means_are_the_exact_linear_decay_of_the_updates(runs, run, floor):
  """Against the definition: each update times the schedule at its step."""
  method = f'decay:shape=linear,floor={floor}'
  p = _plan(run, method, means=True, end=12, window=9)
  assert [s.name for s, _ in p.sources].count('mean') == 3
  merged = helpers.flat(stream.combine(p.sources))
  decay = lambda s: floor + (1 - floor) * (1 - (s - 3) / 9)
  want = _replay(runs['dense'], 3, 12, decay)
  wrong = _replay(runs['dense'], 3, 12, lambda s: 1.0)
  for key in want:
    np.testing.assert_allclose(merged[key], want[key], atol=2e-7)
    assert np.abs(merged[key] - wrong[key]).max() > 1e-5  # the test can fail


def test_raw_checkpoints_of_every_step_are_exact_too(runs):
  dense = run_lib.Run(runs['dense'])
  p = _plan(dense, 'decay:shape=1-sqrt', end=12, window=6)
  merged = helpers.flat(stream.combine(p.sources))
  # Left edge: the block of step s -> s + 1 takes the value at s.
  want = _replay(runs['dense'], 6, 12, lambda s: 1 - np.sqrt((s - 6) / 6))
  for key in want:
    np.testing.assert_allclose(merged[key], want[key], atol=2e-7)


def test_merge_writes_what_emulate_measures(run, tmp_path):
  p = _plan(run, end=12, window=9)
  about = artifact.provenance(
    run.path, p.sources, method={'name': 'decay'},
    learning_rates=p.learning_rates,
  )  # fmt: skip
  out = artifact.write(run.path, 'x', sources=p.sources, provenance=about)
  try:
    assert run.merged == ['x']
    written = helpers.flat(run.params('x'))
    for key, value in helpers.flat(stream.combine(p.sources)).items():
      np.testing.assert_array_equal(written[key], value)
    rows = json.loads((out / 'merge.json').read_text())['sources']
    assert [r['step'] for r in rows] == [6, 9, 12]
    assert [r['effective_learning_rate'] for r in rows] == pytest.approx(
      [3e-3, 2e-3, 1e-3]
    )
    config = helpers.config(init=str(out), num_steps=1)
    loop.train(config, tmp_path / 'from-merge')
    start = helpers.leaves(tmp_path / 'from-merge', 0, 'params')
    for key, value in start.items():
      np.testing.assert_array_equal(value, written[key])
  finally:
    shutil.rmtree(out)


def test_a_damaged_source_leaves_no_merge(run, tmp_path):
  path = tmp_path / 'a'
  shutil.copytree(run.path, path)
  data = address.item(path, 9, 'params')
  victim = max(data.rglob('d/*'), key=lambda p: p.stat().st_size)
  content = bytearray(victim.read_bytes())
  for place in range(200, len(content), 997):
    content[place] ^= 0x10
  victim.write_bytes(content)
  p = _plan(run_lib.Run(path), end=12, window=9)
  first = checkpoint.abstract_item(p.sources[0][0])
  verifier = verify.Verifier(verify.shapes(first))
  with pytest.raises(ValueError, match='params|leaf'):
    artifact.write(
      path, 'x', sources=p.sources, provenance={}, observe=verifier,
      before_commit=lambda _: verifier.check(),
    )  # fmt: skip
  assert not list(path.glob('merged/*'))


def test_inputs_of_a_run_are_compared_with_what_was_saved(
  run, tmp_path, monkeypatch, capsys
):
  path = tmp_path / 'a'
  shutil.copytree(run.path, path)
  items = [str(path / 'checkpoints' / s / 'params') for s in ('6', '9', '12')]
  ways = (
    [f'--inputs={path}/checkpoints', '--steps=6,9,12'],
    [f'--inputs={",".join(items)}', '--steps=6,9,12'],
  )
  for i, way in enumerate(ways):
    out = f'--out={tmp_path}/whole-{i}'
    assert tools.call(monkeypatch, 'merge', *way, '--method=uniform', out) == 0
  marks = json.loads((tmp_path / 'whole-0/fingerprints.json').read_text())
  params = tmp_path / 'whole-0' / 'params'
  tree = checkpoint.restore_tree(params, checkpoint.abstract_item(params))
  assert marks == fingerprint.by_path(fingerprint.of(tree))
  stored = chunks.values(address.item(path, 9, 'params'))
  victim = max(
    (x for x in stored.values() if isinstance(x, plain.Place)),
    key=lambda x: x.size,
  )
  content = bytearray(victim.path.read_bytes())
  content[victim.start + victim.size // 2] ^= 0x10
  victim.path.write_bytes(content)
  copy = tmp_path / '6'  # without what tells its fingerprints
  shutil.copytree(items[0], copy / 'params')
  mixed = [f'--inputs={copy},{path}/checkpoints/9', '--steps=6,9']
  for way in (*ways, mixed):
    out = tmp_path / 'damaged'
    code = tools.call(
      monkeypatch, 'merge', *way, '--method=uniform', f'--out={out}'
    )
    assert code == 2
    assert f'Checkpoint {path}@9 is damaged: params' in capsys.readouterr().err
    assert not out.exists()


def test_a_merge_without_its_params_is_not_done(tmp_path):
  about = {'method': {}, 'sources': [], 'accumulate': 'x', 'dtype': 'x'}
  out = tmp_path / 'merged' / 'm'
  out.mkdir(parents=True)
  merging_items.save(out / 'params', merging_items.params(0))
  (out / 'merge.json').write_text(json.dumps(about))
  assert finished.is_done(out, about, ('params',))
  (out / 'merge.json').write_text('{}')
  with pytest.raises(ValueError, match='exists and is never overwritten'):
    finished.is_done(out, about, ('params',))
  (out.parent / 'stray').mkdir()
  with pytest.raises(UserError, match='merges of this run: m.$'):
    address.locate(str(out.parent / 'stray'))
  shutil.rmtree(out / 'params')
  with pytest.raises(UserError, match='has merge.json and no params; remove'):
    finished.is_done(out, about, ('params',))


def test_verifier_accepts_what_was_saved_in_any_blocks(run):
  p = _plan(run, means=True, end=12, window=9)
  shapes = verify.shapes(checkpoint.abstract_item(p.sources[0][0]))
  for max_bytes in (1 << 18, 1 << 30):
    verifier = verify.Verifier(shapes)
    stream.combine(p.sources, observe=verifier, max_bytes=max_bytes)
    verifier.check()


def test_block_fingerprints_add_up():
  x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
  whole = int(fingerprint.of({'x': x})['x'])
  parts = 0
  for i in (slice(0, 2), slice(2, 6)):
    for j in (slice(0, 4), slice(4, 5)):
      index = (i, j, slice(0, 4))
      parts += verify.block_fingerprint(x[index], index, x.shape)
  assert parts & 0xFFFFFFFF == whole
  verifier = verify.Verifier({'x': x.shape})
  for index in (slice(0, 7), slice(7, 120)):  # of the leaf in C order
    verifier(None, 'x', (index,), x.reshape(-1)[index])
  assert verifier.result() == {"['x']": whole}
  shape = (3, 1 << 33)  # places beyond 32 bits wrap, as on a device
  index = (slice(1, 2), slice(5, 9))
  flat = (slice((1 << 33) + 5, (1 << 33) + 9),)
  assert verify.block_fingerprint(
    x[:1, 0], index, shape
  ) == verify.block_fingerprint(x[0, 0], flat, (math.prod(shape),))


def test_a_varying_rate_is_refused_or_corrected(tmp_path):
  config = helpers.config('schedule=linear', checkpoint__every_steps=3)
  loop.train(config, tmp_path)
  run = run_lib.Run(tmp_path)
  with pytest.raises(UserError, match='varied in this window'):
    _plan(run, end=12, window=9)
  for means in (False, True):
    p = _plan(run, 'from_run', end=9, window=6, means=means)
    assert sum(c for _, c in p.sources) == pytest.approx(1)
    # The decay that was done is asked for: nothing is left to merge.
    target = 'linear:final=0.25'  # the first 9 steps of 12
    p = _plan(run, 'from_run', end=9, window=6, means=means, target=target)
    newest = {q.parent.name: c for q, c in p.sources if q.name == 'params'}
    assert newest['9'] == pytest.approx(1, abs=1e-5)
    # Flat over the window, where the run already decayed: infeasible.
    flat = {'end': 12, 'window': 9, 'means': means}
    with pytest.raises(ValueError, match='rise|coefficient'):
      _plan(run, 'from_run:floor=1.0', **flat)
    if means:
      with pytest.raises(ValueError, match='far from a line between'):
        _plan(run, 'from_run:floor=1.0,signed=True', **flat)
    else:
      p = _plan(run, 'from_run:floor=1.0,signed=True', **flat)
      assert min(c for _, c in p.sources) < 0
  with pytest.raises(UserError, match='at step 1, where .* was used; this'):
    _plan(run, 'from_run', end=9, window=6, target='linear')
  with pytest.raises(UserError, match="Did you mean 'linear'"):
    _plan(run, 'from_run', end=9, window=6, target='linaer')
  with pytest.raises(UserError, match='signed=.no. must be true or false'):
    _plan(run, 'from_run:signed=no', end=9, window=6)


def test_a_gap_in_the_window_is_said(run, tmp_path, monkeypatch, capsys):
  path = shutil.copytree(run.path, tmp_path / 'a')
  shutil.rmtree(path / 'checkpoints' / '9')
  arguments = ('merge', f'--run={path}', '--window=9', '--dry_run')
  assert tools.call(monkeypatch, *arguments) == 0
  output = capsys.readouterr().out
  assert 'has no checkpoint 9; the coefficients are' in output
  assert tools.call(monkeypatch, *arguments[:3], '--every=6', '--dry_run') == 0
  assert 'has no checkpoint' not in capsys.readouterr().out
  (path / 'checkpoints' / '6').rename(path / 'checkpoints' / '9')
  assert tools.call(monkeypatch, 'merge', f'--run={path}', '--window=7',
                    '--dry_run') == 0  # fmt: skip
  assert 'has no checkpoint 6; the coeff' in capsys.readouterr().out


def test_the_rates_of_a_merge_are_those_that_were_logged(run):
  step, rate = run.metrics['optim/lr']
  used = run.learning_rates()
  np.testing.assert_allclose(
    rate[step < used.size], used[step[step < used.size]]
  )


def test_a_custom_schedule_from_a_table(run, tmp_path):
  # At constant rate the target is the decay itself: w = its block means.
  (tmp_path / 'x.json').write_text(
    json.dumps([1.0] * 6 + [0.5] * 3 + [0.25] * 3)
  )
  p = _plan(
    run, 'from_run', end=12, window=9, target=f'table:path={tmp_path}/x.json'
  )
  steps = [int(q.parent.name) for q, _ in p.sources]
  assert steps == [3, 6, 9, 12]
  c = [c for _, c in p.sources]
  np.testing.assert_allclose(c, [0, 0.5, 0.25, 0.25], atol=1e-6)
  with pytest.raises(UserError, match='--target needs from_run, not decay'):
    _plan(run, end=12, window=9, target='linear')


def test_controls_of_a_plan(run):
  p = _plan(run, 'wma', end=12, window=9)
  wrong = emulation.control(p, 'reverse', 0)
  assert [c for _, c in wrong.sources] == [c for _, c in p.sources][::-1]
  assert wrong.about['control'] == 'reverse'
  with pytest.raises(ValueError, match='controls nothing'):
    emulation.control(_plan(run, end=12, window=9), 'reverse', 0)


@pytest.mark.parametrize(
  ('method', 'options', 'sentence'),
  [
    ('decay:shape=lin', {}, "'lin'.*linear"),
    ('decay:grid=right', {}, "grid='right'.*newest checkpoint"),
    ('decay:floor=2.0', {}, 'floor=2.0'),
    ('decai', {}, "Did you mean 'decay'"),
    ('decay:shap=linear', {}, "Did you mean 'shape'"),
    ('ema:alpha=x', {}, "alpha='x' must be a number"),
    ('ema', {'means': True}, '--means needs --method=decay'),
    ('decay', {'end': 13}, 'end=13 is not a checkpoint'),
    ('decay', {'window': 1}, 'holds one checkpoint'),
    ('decay', {'means': True, 'window': 7}, 'does not begin at a checkpoint'),
    ('decay', {'steps': [3, 4]}, 'no checkpoint 4'),
    ('decay', {'steps': [3, 3], 'window': 0}, 'two or more, each once'),
    ('from_run', {'target': 'wsd:decai=1'}, "Did you mean 'decay'"),
  ],
)
def test_mistakes_are_one_sentence(run, method, options, sentence):
  with pytest.raises(UserError, match=sentence), cli.user_errors():
    _plan(run, method, **{'window': 9, **options})


def test_rates_before_a_branch_are_those_of_its_parent(run, tmp_path):
  config = helpers.config(
    'schedule=constant',
    branch=f'{run.path}@6',
    checkpoint__every_steps=3,
    learning_rate=1e-5,
  )
  loop.train(config, tmp_path / 'branch')
  branch = run_lib.Run(tmp_path / 'branch')
  rates = branch.learning_rates()
  np.testing.assert_array_equal(rates[:6], run.learning_rates()[:6])
  np.testing.assert_allclose(rates[6:], 1e-5)
  plan = _plan(branch, 'wma', steps=(6, 9, 12))
  np.testing.assert_allclose(plan.learning_rates, [rates[0], 1e-5, 1e-5])


def test_surface_table_and_picture(runs, run, tmp_path, capsys):
  config = helpers.config(branch=f'{run.path}@6', checkpoint__every_steps=3)
  config.schedule.decay = 0.5
  loop.train(config, tmp_path / 'branch')
  branch = run_lib.Run(tmp_path / 'branch')
  real = [cooldowns.read_one(run, branch)]
  assert (real[0].end, real[0].window) == (12, 6)
  grid = judgement.grid(run, [], [6])
  jobs = judgement.jobs(run, grid, [(12, 6)], ['linear', 'cosine'], 0.0)
  results = judgement.measure(run, jobs)
  last = {j.end: run.losses(run.params(j.end)) for j in jobs}
  numbers = judgement.as_json(results, last, real)
  assert {x['source'] for x in numbers['emulated']} == {'raw', 'means'}
  assert all(0 < x['loss'] < 10 for x in numbers['emulated'])
  logged = branch.metrics['eval/loss'].value[-1]
  assert numbers['real'][0]['loss'] == pytest.approx(logged, rel=1e-5)
  figure = pictures.emulation(run, real, grid, [(12, 6)], results, last)
  show.save(figure, tmp_path / 'x.png')
  curves, heat, *_ = figure.axes
  grey = dict(zip(*curves.lines[0].get_data(), strict=True))
  assert all(grey[end] == pytest.approx(x.mean()) for end, x in last.items())
  assert {*last} - {*run.metrics['eval/loss'].step}, 'one that was not logged'
  labels = curves.get_legend_handles_labels()[1]
  assert labels == [
    'constant rate', 'real linear, branch', 'emulated linear',
    'emulated cosine', 'emulated from raw checkpoints',
  ]  # fmt: skip
  assert len(heat.texts) == len(grid)  # each cell has its loss and window
  cells = {(e, 6): (2.0, 0.1) for e in (9, 12)} | {(12, 3): (2.0, -0.1)}
  pictures._heat(heat, 'x', cells, 1.0, {(9, 6), (12, 6)})
  texts = [text.get_text() for text in heat.texts[len(grid) :]]
  assert texts == [
    'not\ncomputed', '2.000\nwindow 6', '2.000\nwindow 3\nworse',
    '2.000\nwindow 6',
  ]  # fmt: skip
  assert (tmp_path / 'x.png').read_bytes()[:4] == b'\x89PNG'
  with pytest.raises(UserError, match='is not a branch of'):
    cooldowns.read_one(branch, run)
  cooldowns.read(run, [branch.path], 0.0)
  assert 'warning' not in capsys.readouterr().out
  path = branch.path / 'config.json'
  other = json.loads(path.read_text())
  other['optimizer']['weight_decay'], other['branch_data'] = 3.0, 'restart'
  path.write_text(json.dumps(other))
  about = branch.path / 'meta.json'
  meta = {**json.loads(about.read_text()), 'data_offset': 4}
  about.write_text(json.dumps(meta))
  cooldowns.read(run, [branch.path], 0.3)
  output = capsys.readouterr().out
  assert 'emulates: branch_data=restart (continue), optimizer.w' in output
  assert 'decays to 0.0 of its peak, merges here to --floor=0.3' in output
  other['model']['rope_theta'] = 100.0
  path.write_text(json.dumps(other))
  with pytest.raises(UserError, match='model.rope_theta=100.0, unlike'):
    cooldowns.read_one(run, run_lib.Run(branch.path))


def test_a_run_that_was_stopped_is_emulated_as_if_it_was_not(
  run, tmp_path, monkeypatch
):
  """Its checkpoint where it stopped is in no default window and no raw sum."""
  config = helpers.config(
    'schedule=constant', checkpoint__every_steps=3, eval__every_steps=0
  )
  with monkeypatch.context() as m:
    m.setattr(loop.Preemption, 'reached', lambda self, n: n == 8)
    assert loop.train(config, tmp_path) == 'preempted'
  assert loop.train(config, tmp_path) == 'done'
  stopped = run_lib.Run(tmp_path)
  assert 8 in stopped.steps and 8 not in run.steps
  assert judgement.grid(stopped, [], []) == judgement.grid(run, [], [])
  for means in (False, True):
    here, there = (
      [
        (str(p.relative_to(r.path)), c)
        for p, c in _plan(r, means=means).sources
      ]
      for r in (stopped, run)
    )
    assert here == there
  assert _plan(stopped, end=8, window=8).about['end'] == 8


def test_the_commands(run, monkeypatch, capsys):
  """One pass through each command as a user types it, and one mistake each."""
  done = helpers.command(
    'launch.merge', f'--run={run.path}', '--window=9', '--means', '--name=m'
  )
  assert 'effective LR' in done.stdout
  at = f'--at={run.path}@12,{run.path}/merged/m'
  done = helpers.command('launch.evaluate', at)
  assert 'bits per byte' in done.stdout
  words = f'--run={run.path}', '--ends=3,12', '--windows=6'
  done = helpers.command('launch.emulate', *words)
  assert 'interval means' in done.stdout
  assert 'Left out, longer than what was trained: 6 until 3.' in done.stdout
  assert (run.path / 'plots' / 'emulate.json').is_file()
  for arguments in (
    ('merge', f'--run={run.path}', '--window=6', '--means', '--name=m'),
    ('evaluate', f'--at={run.path}@7'),
    ('emulate', f'--run={run.path}', '--windows=5'),
  ):
    assert tools.call(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.count('error: ') == 1


def test_the_fingerprint_of_a_block_is_the_sum_over_its_parts(monkeypatch):
  block = np.random.default_rng(0).standard_normal((5, 7, 9), np.float32)
  index, shape = (slice(2, 7), slice(0, 7), slice(4, 13)), (8, 7, 20)
  whole = verify.block_fingerprint(block, index, shape)
  for part in (1, 4, 60):
    monkeypatch.setattr(verify, '_PART', part)
    assert verify.block_fingerprint(block, index, shape) == whole
  moved = (slice(3, 8), *index[1:])
  assert verify.block_fingerprint(block, moved, shape) != whole
