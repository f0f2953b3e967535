"""Tools on logs that were made to have known answers."""

import json
import pathlib
import shlex
import shutil

import numpy as np
import pytest

from configs import resolved
from launch.parts import curves, prediction
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
  assert (
    'known to fail' in output and pathlib.Path('runs/predict.png').is_file()
  )


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
  # Losses that the bound does not explain say nothing of the best peak.
  lrs = [p * shapes[0] for p in (1e-3, 2e-3, 4e-3)] * 2
  for y in ([3, 3.1, 3, 3, 3.1, 3], [3, 2.9, 2.5, 3, 2.9, 2.5]):
    found = predict.uncertainty(predict.fit(lrs, y), lrs, y, lrs)
    assert np.isinf(found.peak), y


def test_predict_says_what_three_runs_cannot(tool, capsys):
  runs = _theory_runs()
  for n in (3, 4):
    assert tool('predict', f'--runs={",".join(runs[:n])}') == 0
    output = capsys.readouterr().out
    name, words = tools.proposed(output)
    assert ('leave no degree of freedom' in output) == (n == 3)
  assert (name, words[0]) == ('plot_schedule', f'--runs={",".join(runs[:4])}')
  assert tool(name, *words) == 0


def test_predict_proposes_to_extend_a_run_of_ours(tool, capsys):
  runs = _theory_runs()[:2]
  tools.fake_run(
    'a', arg='schedule=wsd', num_steps=4000, checkpoint__every_steps=800
  )
  lr = 2e-3 * curves.curve('wsd', 4000).value
  columns = {'eval/loss': np.full(4001, 3.0), 'optim/lr': [*lr, 0]}
  tools.log('a/metrics.jsonl', **columns)
  arguments = [f'--runs={",".join([*runs, "a"])}', '--tag=eval/loss']
  for path in runs:
    text = pathlib.Path(path).read_text().replace('val_loss', 'eval/loss')
    pathlib.Path(path).write_text(text)
  assert tool('predict', *arguments) == 0
  name, words = tools.proposed(capsys.readouterr().out)
  assert (name, words) == ('extend', ['--run=a', '--num_steps=8000'])
  assert tool(name, *words) == 0


def test_predict_warns_of_runs_that_cannot_be_compared(tool, capsys):
  runs, seen = _theory_runs()[:3], []
  for i, (text, more) in enumerate(
    [
      ('schedule=wsd', {}),
      (
        'schedule=linear',
        {'seed': 1, 'learning_rate': 2e-3, 'eval__batch_size': 4},
      ),
      ('optimizer=lion', {'eval__num_sequences': 8}),
    ]
  ):
    run = tools.fake_run(f'run{i}', arg=text, num_steps=200, **more)
    log = pathlib.Path(runs[i]).read_text()
    log = log.replace('val_loss', 'eval/loss').replace('"lr"', '"optim/lr"')
    pathlib.Path(run, 'metrics.jsonl').write_text(log)
    meta = {'status': 'done', 'step': 200, 'data_fingerprint': 'ab'[i // 2]}
    pathlib.Path(run, 'meta.json').write_text(json.dumps(meta))
    points = [prediction.point(f'run{j}', '', '', 1) for j in range(i + 1)]
    prediction.warn(points)
    seen.append(capsys.readouterr().out)
  assert seen[:2] == ['', '']
  assert seen[2].startswith('warning: the runs differ in eval.num_sequences, ')
  assert 'optimizer.name, ' in seen[2] and 'the data (' in seen[2]


def test_a_predicted_loss_below_zero_is_said(tool, capsys):
  runs = _theory_runs()[:3]
  assert tool('predict', f'--runs={",".join(runs)}', '--schedules=wsd') == 0
  assert 'below 0' not in capsys.readouterr().out
  for path in runs:
    tools.log(path, **{
      k: [json.loads(x)[k] - (2.5 if k == 'val_loss' else 0)
          for x in pathlib.Path(path).read_text().splitlines()]
      for k in ('val_loss', 'lr')
    })  # fmt: skip
  assert tool('predict', f'--runs={",".join(runs)}', '--schedules=wsd') == 0
  output = capsys.readouterr().out
  assert 'below 0: this fit cannot be used' in output
  assert 'is negative: what it says' in output


def test_runs_that_do_not_predict_each_other_are_said(tool, capsys):
  runs, words = _theory_runs()[:6], 'do not predict each other'
  flag = f'--runs={",".join(runs)}'
  assert tool('predict', flag) == 0
  output = capsys.readouterr().out
  assert words not in output and '-: the runs do not tell' not in output
  losses = [3, 3.2, 3, 3.01, 3.21, 3.01]  # of the middle peak the worst
  for path, loss in zip(runs, losses, strict=True):
    rows = [json.loads(x) for x in pathlib.Path(path).read_text().splitlines()]
    lr = [row['lr'] for row in rows]
    tools.log(path, lr=lr, val_loss=np.full(201, loss))
  assert tool('predict', flag) == 0
  output = capsys.readouterr().out
  assert words in output and '-: the runs do not tell' in output


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
  assert not lr_range.read(x, [*np.linspace(3, 2, 60), np.nan]).at_end
  assert lr_range.read(x, np.linspace(2, 3, 100)).at_start
  noise = np.random.default_rng(0).standard_normal(100)
  assert not lr_range.read(x, 3 + 0.1 * noise).clear


# --- extend


def test_extend_proposes_the_worked_values(tool, capsys):
  # Run of 4,000 steps, cooldown .2, to twice the length: .633 or .533.
  tools.fake_run(
    'a', arg='schedule=wsd', num_steps=4000, checkpoint__every_steps=800
  )
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
  tools.fake_run(
    'b', arg='schedule=cosine', num_steps=1000, schedule__warmup=0.0
  )
  arguments = ['--num_steps=2000', '--schedules=cosine:warmup=0.0']
  assert tool('extend', '--run=b', *arguments) == 0
  ((_, command),) = tools.commands(capsys.readouterr().out)
  got = float(command.split('--config.learning_rate=')[1].split(' ')[0])
  np.testing.assert_allclose(got, 3e-3 / 2**0.5, rtol=0.01)


@pytest.mark.parametrize('decay, ways', [(0.0, 3), (1.0, 1)])
def test_extend_where_wsd_is_all_or_no_cooldown(tool, capsys, decay, ways):
  tools.fake_run('a', arg='schedule=wsd', num_steps=4000,
                 checkpoint__every_steps=800, schedule__decay=decay,
                 schedule__warmup=0.0)  # fmt: skip
  assert tool('extend', '--run=a', '--num_steps=8000') == 0
  assert len(tools.commands(capsys.readouterr().out)) == ways


def test_extend_keeps_the_cycles_of_a_run(tool, capsys):
  cycles = {'schedule__cycle_end_steps': (10, 20)}
  tools.fake_run('c', arg='schedule=wsd_s', num_steps=40, **cycles)
  assert tool('extend', '--run=c', '--num_steps=80') == 0
  ((_, command),) = tools.commands(capsys.readouterr().out)
  choice = '--config=c/config.json:schedule=wsd_s'
  assert choice in shlex.split(command)
  assert '--workdir=c-80-wsd_s' in shlex.split(command)
  stored = resolved.get_config(choice.removeprefix('--config='))
  assert stored.schedule.cycle_end_steps == (10, 20)


def test_extend_names_every_knob_that_the_file_has_otherwise(tool, capsys):
  knobs = {'schedule__decay': 0.4, 'schedule__warmup': 0.0, 'init': 'a@12'}
  tools.fake_run(
    'b',
    arg='schedule=wsd',
    num_steps=4000,
    checkpoint__every_steps=800,
    **knobs,
  )
  assert tool('extend', '--run=b', '--num_steps=8000', '--schedules=wsd') == 0
  found = [shlex.split(c) for _, c in tools.commands(capsys.readouterr().out)]
  assert '--config.schedule.decay=0.2' in found[-1]
  assert '--workdir=b-8000-wsd-decay-0.2-warmup-0.02' in found[-1]
  assert '--config.schedule.warmup=0.02' in found[-1]
  # A branch of a run that began with another's parameters does not, again.
  branches = [c for c in found if any('--config.branch=b@' in x for x in c)]
  assert branches and all('--config.init=' in c for c in branches)


def test_extend_goes_on_from_a_run_that_still_runs(tool, capsys):
  tools.fake_run(
    'a', arg='schedule=wsd', num_steps=4000, checkpoint__every_steps=800
  )
  shutil.rmtree('a/checkpoints/3200')
  tools.log('a/metrics.jsonl', **{'optim/lr': np.ones(2500)})
  meta = {'status': 'running', 'step': 2499}
  pathlib.Path('a/meta.json').write_text(json.dumps(meta))
  assert tool('extend', '--run=a', '--num_steps=8000') == 0
  found = tools.commands(capsys.readouterr().out)
  assert len(found) == 3
  assert all('--config.branch=a@2400' in command for _, command in found)


def test_a_run_is_stopped_by_a_short_memory():
  """One loss of 40 among ones: a mean of 0.9 x 1 + 0.1 x 40 is over 4."""
  watch = lr_range.Watch()
  assert not any(watch.diverged(1.0) for _ in range(200))
  assert watch.diverged(40.0)
  calm = lr_range.Watch()
  assert not any(calm.diverged(x) for x in [1.0] * 200 + [25.0])
