"""Tools on logs that were made to have known answers; mistakes of the user."""

import json
import pathlib
import shlex
import shutil

import numpy as np
import pytest

from launch.parts import curves
from schedules.theory import bound, lr_range, predict
from tests import helpers, tools


@pytest.fixture
def tool(monkeypatch, tmp_path):
  """tool('refine', '--run=a') -> exit code, in a folder of its own."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(helpers.ROOT / 'configs')
  return lambda name, *args: tools.call(monkeypatch, name, *args)


# --- predict


def _theory_runs(noise=0.0):
  """Logs whose losses are what the bound says, with D/G = 0.05."""
  rng, made = np.random.default_rng(0), {}
  for name in ('linear', 'wsd:decay=0.2', 'cosine'):
    for peak in (1e-3, 4e-3, 1e-2):
      lr = peak * curves.curve(name, 200).value
      loss = 2 + 3 * bound.omega(lr, distance=0.05)
      loss += noise * rng.standard_normal()
      path = f'{name[:3]}{peak}.jsonl'
      columns = {'val_loss': np.full(201, loss), 'lr': [*lr, 0]}
      made[path] = tools.log(path, **columns)
  return list(made)


def test_predict_finds_what_made_the_losses(tool, capsys):
  runs = _theory_runs()
  arguments = [f'--runs={",".join(runs[:6])}']
  arguments += [f'--held_out={",".join(runs[6:])}']
  arguments += ['--schedules=cosine', '--num_steps=800']
  assert tool('predict', *arguments) == 0
  output = capsys.readouterr().out
  assert 'mean error of 3 held-out runs: 0.0000' in output
  row = next(x for x in output.splitlines() if x.startswith('│ cosine '))
  best = bound.best(curves.curve('cosine', 800).value, distance=0.05)
  cells = [x.strip() for x in row.split('│')[1:-1]]
  np.testing.assert_allclose(float(cells[2]), best.learning_rate, rtol=0.01)
  np.testing.assert_allclose(float(cells[4]), 2 + 3 * best.bound, atol=2e-4)
  assert 'known to fail' in output and pathlib.Path('predict.png').is_file()


def _renamed(name, extra=None):
  """Theory runs whose rates have a name of their own; {tag: values} added."""
  runs = _theory_runs()
  for path in runs:
    rows = [json.loads(x) for x in pathlib.Path(path).read_text().splitlines()]
    columns = {k: [r[k] for r in rows] for k in ('val_loss', 'lr')}
    columns[name] = columns.pop('lr')
    tools.log(path, **columns)
    with pathlib.Path(path).open('a') as f:
      f.writelines(json.dumps(x) + '\n' for x in extra or ())
  return runs


@pytest.mark.parametrize(
  'extra', [None, [{'step': s, 'lr': 1.0} for s in (0, 50)]]
)
def test_a_rate_of_any_name_is_read_over_its_own_length(extra, tool, capsys):
  # Another rate, of 51 steps, does not decide how long the run was.
  runs = _renamed('eta', extra)
  arguments = [f'--runs={",".join(runs[:6])}', f'--held_out={runs[6]}']
  assert tool('predict', *arguments, '--lr_tag=eta') == 0
  assert '1 held-out runs: 0.0000' in capsys.readouterr().out
  assert tool('plot_schedule', f'--runs={runs[0]}', '--tag=eta') == 0
  row = next(x for x in capsys.readouterr().out.splitlines() if runs[0] in x)
  assert row.split('│')[2].strip() == '200'


def test_the_intervals_hold_as_often_as_they_say():
  rng, inside = np.random.default_rng(1), []
  shapes = [curves.curve(n, 100).value for n in ('linear', 'wsd', 'cosine')]
  lrs = [p * s for s in shapes for p in (1e-3, 3e-3, 1e-2)]
  clean = np.array([2 + 3 * bound.omega(lr, distance=0.05) for lr in lrs])
  for _ in range(300):
    y = clean + 0.01 * rng.standard_normal(clean.size)
    fitted = predict.fit(lrs[:-1], y[:-1])
    found = predict.uncertainty(fitted, lrs[:-1], y[:-1], lrs[-1:], level=0.9)
    error = predict.loss(fitted, lrs[-1]) - y[-1]
    at = fitted.distance / 0.05
    inside.append(
      (abs(error) < found.loss[0], 1 / found.peak < at < found.peak)
    )
  share = np.mean(inside, 0)
  assert ((share > 0.83) & (share < 0.96)).all(), share
  three = predict.uncertainty(predict.fit(lrs[:3], y[:3]), lrs[:3], y[:3], lrs)
  assert np.isinf(three.loss).all() and np.isinf(three.peak)


# --- lr_range


@pytest.mark.parametrize('top', [1.0, 20.0])
@pytest.mark.parametrize('spacing', ['exponential', 'linear'])
def test_on_a_quadratic_the_range_test_finds_the_limit(top, spacing):
  rng, h = np.random.default_rng(0), np.array([1, 0.3, 0.001]) * top
  x, losses, watch = np.array([1.0, 1, 30]), [], lr_range.Watch()
  swept = lr_range.values(1e-3 / top, 8 / top, 2000, spacing=spacing)
  for rate in swept:
    x = x - rate * (h * x + 1e-2 * rng.standard_normal(3) * h)
    losses.append(0.5 * np.sum(h * x**2))
    if watch.diverged(losses[-1]):
      break
  assert len(losses) < 2000, 'it stopped'
  found = lr_range.read(swept, losses)
  np.testing.assert_allclose(found.turn, 2 / top, rtol=0.25)
  assert found.clear and not found.at_end and not found.at_start


def test_a_range_that_is_too_low_or_without_effect_is_said():
  x = lr_range.values(1e-4, 1e-2, 100)
  assert lr_range.read(x, np.linspace(3, 2, 100)).at_end
  assert lr_range.read(x, np.linspace(2, 3, 100)).at_start
  noise = np.random.default_rng(0).standard_normal(100)
  assert not lr_range.read(x, 3 + 0.1 * noise).clear


# --- extend


def _fake(name, **overrides):
  """A run directory without arrays: config, log and names of checkpoints."""
  run = pathlib.Path(name)
  c = helpers.config(overrides.pop('arg'), **overrides)
  (run / 'checkpoints' / '3200' / 'params').mkdir(parents=True)
  (run / 'checkpoints' / '2400' / 'params').mkdir(parents=True)
  (run / 'config.json').write_text(json.dumps(c.to_dict()))
  tools.log(run / 'metrics.jsonl', **{'optim/lr': np.ones(9)})
  return name


def test_extend_proposes_the_worked_values(tool, capsys):
  # Run of 4,000 steps, cooldown .2, to twice the length: .633 or .533.
  _fake('a', arg='schedule=wsd', num_steps=4000, checkpoint__every_steps=800)
  assert tool('extend', '--run=a', '--num_steps=8000') == 0
  found = dict(tools.commands(capsys.readouterr().out))
  names = list(found)
  assert names[0].startswith('# longer cooldown, 0.633')
  assert names[1].startswith('# lower rate, 0.533 of the old from step 3200')
  assert names[2] == '# unchanged'
  # The longer cooldown begins at 2936: it needs the checkpoint before.
  assert '--config.branch=a@2400' in found[names[0]]
  assert '--config.learning_rate=0.00159' in found[names[1]]


def test_extend_to_another_schedule_keeps_the_best_peak(tool, capsys):
  _fake('b', arg='schedule=cosine', num_steps=1000, schedule__warmup=0.0)
  arguments = ['--num_steps=2000', '--schedules=cosine:warmup=0.0']
  assert tool('extend', '--run=b', *arguments) == 0
  ((_, command),) = tools.commands(capsys.readouterr().out)
  got = float(command.split('--config.learning_rate=')[1].split(' ')[0])
  np.testing.assert_allclose(got, 3e-3 / 2**0.5, rtol=0.01)


def test_extend_keeps_the_cycles_of_a_run(tool, capsys):
  cycles = {'schedule__cycle_end_steps': (10, 20)}
  _fake('c', arg='schedule=wsd_s', num_steps=40, **cycles)
  assert tool('extend', '--run=c', '--num_steps=80') == 0
  ((_, command),) = tools.commands(capsys.readouterr().out)
  flag = '--config.schedule.cycle_end_steps=(10, 20)'
  assert flag in shlex.split(command)


def test_extend_goes_on_from_a_run_that_still_runs(tool, capsys):
  _fake('a', arg='schedule=wsd', num_steps=4000, checkpoint__every_steps=800)
  shutil.rmtree('a/checkpoints/3200')
  tools.log('a/metrics.jsonl', **{'optim/lr': np.ones(2500)})
  meta = {'status': 'running', 'step': 2499}
  pathlib.Path('a/meta.json').write_text(json.dumps(meta))
  assert tool('extend', '--run=a', '--num_steps=8000') == 0
  found = tools.commands(capsys.readouterr().out)
  assert len(found) == 3
  assert all('--config.branch=a@2400' in command for _, command in found)


# --- mistakes


BAD = {
  'plot_schedule': [
    ([], 'are missing'),
    (['--schedules=,'], 'are missing'),
    (['--schedules=sgdr:cycles=2.5'], "cycles='2.5' must be"),
    (['--schedules=wds'], "Did you mean 'wsd'"),
    (['--schedules=wsd:decai=1'], "Did you mean 'decay'"),
    (['--schedules=wsd:decay=much'], 'must be a float'),
    (['--schedules=wsd:decay=2'], 'decay=2.0'),
    (['--schedules=table:path=gone.csv'], 'gone.csv'),
    (['--schedules=cosine', '--num_steps=1'], '--num_steps=1'),
    (['--schedules=cosine', '--out=a.jpg'], 'must end in .png'),
    (['--runs=gone'], "'gone' does not exist"),
    (['--runs=norms.jsonl'], 'name it by --tag.'),
    (['--runs=loss.jsonl', '--tag=lrs'], "--tag='lrs': loss.jsonl has no such"),
    (['--runs=rest.jsonl'], 'no learning rate of an update is finite'),
  ],
  'refine': [
    ([], '--run is missing'),
    (['--run=gone'], 'does not exist'),
    (['--run=loss.jsonl'], 'Its tags: loss, lr'),
    (['--run=norms.jsonl', '--tag=grad'], "Did you mean 'grad_norm'"),
    (['--run=norms.jsonl', '--tau=2'], 'tau=2.0'),
    (['--run=norms.jsonl', '--power=nan'], '--power=nan must be'),
    (['--run=norms.jsonl', '--power=-2'], '--power=-2.0 must be'),
    (['--run=norms.jsonl', '--seeds=0'], '--seeds=0 must be at least 1'),
    (['--run=norms.jsonl', '--warmup=1'], '--warmup=1.0'),
    (['--run=norms.jsonl', '--num_steps=1'], '--num_steps=1'),
    (['--run=zeros.jsonl'], '0 positive, finite norms'),
    (['--run=half'], 'up to step 8 of 4000'),
    (['--run=norms.jsonl', '--out=a.txt'], 'must end in .npz'),
  ],
  'predict': [
    ([], '--runs is missing'),
    (['--runs=loss.jsonl,loss.jsonl,loss.jsonl'], 'at least two are needed'),
    (['--runs=loss.jsonl,other.jsonl'], 'three numbers are fitted'),
    (['--runs=norms.jsonl'], 'Its tags: grad_norm'),
    (['--runs=loss.jsonl', '--tag=los'], "Did you mean 'loss'"),
    (['--runs=norms.jsonl', '--tag=grad_norm'], 'name it by --lr_tag.'),
    (['--runs=loss.jsonl', '--lr_tag=lrs'], "--lr_tag='lrs': loss.jsonl has"),
    (['--runs=loss.jsonl,other.jsonl,other.jsonl', '--level=90'], '--level=90'),
    (['--runs=a', '--num_steps=many'], "'many' is not a number"),
    (['--runs=a', '--last=0'], '--last=0'),
    (['--runs=a', '--out=a'], 'must end in .png'),
  ],
  'extend': [
    ([], '--run is missing'),
    (['--run=gone'], 'is not a run directory'),
    (['--run=other'], "'other' is not a run directory"),
    (['--run=half', '--num_steps=100'], '--num_steps=100 is less than 4000'),
    (['--run=half', '--decay=0.3'], 'is for runs at a constant rate'),
    (['--run=half', '--num_steps=8000', '--schedules=wds'], "'wsd'"),
    (['--run=early', '--num_steps=8000'], 'no checkpoint between'),
  ],
  'lr_range': [
    (['--knob=b3'], "Did you mean 'b2'"),
    (['--low=1', '--high=0.1'], 'are no range'),
    (['--low=0'], 'are no range'),
    (['--knob=b2', '--high=2'], '--high=2.0 must be from 0.0 to 1.0, as b2'),
    (['--low=-1', '--spacing=linear'], '--low=-1.0 must be from 0.0'),
    (['--high=nan'], '--high=nan must be from 0.0'),
    (['--spacing=log'], "spacing='log'"),
    (['--num_steps=3'], 'num_steps=3'),
    (['--out=a.jpg'], 'must end in .png'),
    (['--config=configs/gone.py'], 'does not exist'),
    (['--config.branch=gone@3'], 'gone'),
  ],
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_mistakes_are_one_sentence(name, tool, capsys):
  tools.log('norms.jsonl', grad_norm=np.ones(9))
  tools.log('zeros.jsonl', grad_norm=np.zeros(9))
  tools.log('loss.jsonl', loss=np.ones(9), lr=np.ones(9))
  tools.log('rest.jsonl', loss=[1], lr=[0])
  pathlib.Path('other').mkdir()  # of another trainer
  pathlib.Path('other/config.json').write_text('{}')
  tools.log('other.jsonl', loss=np.ones(9), lr=2 * np.ones(9))
  _fake('half', arg='schedule=wsd', num_steps=4000)
  tools.log(
    'half/metrics.jsonl', **{'grad/l1': np.ones(9), 'optim/lr': np.ones(9)}
  )
  _fake('early', arg='schedule=wsd', num_steps=2900)
  for arguments, sentence in BAD[name]:
    before = {*pathlib.Path().rglob('*')}
    code = tool(name, *arguments)
    error = capsys.readouterr().err
    assert code == 2, arguments
    lines = error.splitlines()
    assert lines[-1].startswith('error: ') and sentence in lines[-1], error
    assert 'Traceback' not in error
    assert {*pathlib.Path().rglob('*')} == before, arguments
