"""plot_schedule, refine, predict, extend and lr_range, as a user runs them."""

import hashlib
import json
import pathlib
import shlex

import numpy as np
import pytest

from launch import cli
from launch.parts import curves, range_training, schedule_pictures
from lm import loop
from lm.run import Run
from tests import helpers, tools


@pytest.fixture
def tool(monkeypatch, tmp_path):
  """tool('refine', '--run=a') -> exit code, in a folder of its own."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(helpers.ROOT / 'configs')
  return lambda name, *args: tools.call(monkeypatch, name, *args)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A WSD run of 24 steps whose b1 follows the rate, as in 1-cycle."""
  path = tmp_path_factory.mktemp('tools') / 'run'
  c = helpers.config(
    'schedule=wsd', num_steps=24, checkpoint__every_steps=6, follow='b1=0.95',
    optimizer__b1=0.85, schedule__warmup=0.125, schedule__decay=0.375,
  )  # fmt: skip
  assert loop.train(c, str(path)) == 'done'
  return path


# --- schedules are data; floats follow


def test_a_run_from_its_own_multipliers_is_the_same_run(run, tmp_path):
  saved = np.load(run / 'schedules' / 'multiplier.npz')['multiplier']
  np.testing.assert_array_equal(saved, Run(run).schedule())
  assert saved.dtype == np.float32 and np.unique(saved).size > 8
  c = Run(run).config.copy_and_resolve_references()
  config = helpers.config('schedule=table', schedule__path=str(
    run / 'schedules' / 'multiplier.npz'))  # fmt: skip
  kept = {k: v for k, v in c.items() if k != 'schedule'}
  config.update(kept)
  assert loop.train(config, str(tmp_path / 'again')) == 'done'
  helpers.assert_same_run(run, tmp_path / 'again')


def test_momentum_follows_the_rate_inversely(run):
  m = Run(run).schedule()
  logged = Run(run).metrics['optim/b1'].value
  np.testing.assert_allclose(logged, 0.95 - 0.1 * m, atol=1e-6)
  assert np.ptp(logged) > 0.08


# --- plot_schedule


def test_schedules_on_the_command_line():
  text = 'wsd_s:cycle_end_steps=(10,20),decay=0.5,linear,wsd:shape=cosine'
  assert curves.split(text) == [
    'wsd_s:cycle_end_steps=(10,20),decay=0.5', 'linear', 'wsd:shape=cosine'
  ]  # fmt: skip
  config = curves.parse(curves.split(text)[0])
  assert config.cycle_end_steps == (10, 20) and config.decay == 0.5
  words = curves.as_flags('wsd:decay=0.2,shape=cosine')
  assert words == [':schedule=wsd', '--config.schedule.shape=cosine']


def test_plot_schedule_draws_names_runs_and_tables(tool, run, capsys):
  pathlib.Path('link').symlink_to(run)
  table = 'table:path=link/schedules/multiplier.npz'
  arguments = [f'--schedules=linear,{table}', '--runs=link', '--out=a.png']
  assert tool('plot_schedule', *arguments) == 0
  rows = [x.split('│') for x in capsys.readouterr().out.splitlines()]
  rows = [[c.strip() for c in x[1:-1]] for x in rows if len(x) > 3]
  cells = {x[0]: x[1:] for x in rows}
  assert cells['link'] == cells[table], 'a run and its own points'
  assert cells['link'] != cells['linear']
  assert cells['link'][0] == '24'
  assert pathlib.Path('a.png').read_bytes()[1:4] == b'PNG'


def test_a_run_that_stays_below_its_rate_is_drawn_as_its_schedule(tool, capsys):
  tools.fake_run('a', arg='schedule=linear', learning_rate=0.1)
  tools.log('a/metrics.jsonl', **{'optim/lr': np.full(9, 0.09)})
  assert tool('plot_schedule', '--runs=a', '--out=a.png') == 0
  assert ' 0.9000 ' in capsys.readouterr().out
  tools.log('a/metrics.jsonl', **{'optim/lr': np.full(9, 0.2)})
  assert tool('plot_schedule', '--runs=a', '--out=a.png') == 0
  assert ' 1.0000 ' in capsys.readouterr().out


def test_a_printed_command_survives_the_shell(tool, run, capsys, monkeypatch):
  text = 'wsd_s:cycle_end_steps=(10, 20),shape=1-sqrt'
  assert tool('plot_schedule', f'--schedules={text}') == 0
  following = capsys.readouterr().out.partition('Next: ')[2]
  arguments = ['--num_steps=48', f'--schedules={text}']
  assert tool('extend', f'--run={run}', *arguments) == 0
  _, scratch = tools.commands(capsys.readouterr().out)[-1]
  seen = []
  train = lambda c, workdir: seen.append(c.schedule.to_dict()) or 'preempted'
  monkeypatch.setattr(loop, 'train', train)
  for command in (following, scratch):
    *_, name = shlex.split(command)[:3]
    assert name == 'launch.train'
    assert tool('train', *shlex.split(command)[3:]) == 143
  want = curves.parse(text).to_dict()
  assert want['cycle_end_steps'] == (10, 20) and seen == [want, want]


# --- refine


def test_refine_of_a_log_gives_the_worked_examples(tool, capsys):
  tools.log('norms.jsonl', grad_norm=[4, 2, 1, 1, 1])
  arguments = ['--run=norms.jsonl', '--norm=l2', '--tau=0']
  assert tool('refine', *arguments) == 0
  with np.load('refined.npz') as f:
    want = [0.1015625, 0.375, 1, 0.5, 0]
    np.testing.assert_allclose(f['multiplier'], want, atol=1e-12)
  with np.load('refined-linear.npz') as f:
    np.testing.assert_allclose(f['multiplier'], [1, 0.75, 0.5, 0.25, 0])
  tools.log('flat.jsonl', grad_norm=np.full(200, 3.0))
  assert tool('refine', '--run=flat.jsonl', '--num_steps=50') == 0
  with np.load('refined.npz') as f:
    np.testing.assert_allclose(f['multiplier'], np.linspace(1, 0, 50))
  assert tool('refine', '--run=flat.jsonl', '--warmup=0.1', '--seeds=2') == 0
  m = np.linspace(1, 0, 200) * np.minimum(1, np.arange(1, 201) / 20)
  for name in ('refined.npz', 'refined-linear.npz'):  # the same warm-up
    with np.load(name) as f:
      np.testing.assert_allclose(f['multiplier'], m / m.max())
  # Equal budgets: both tables at 5 peaks with 2 seeds.
  assert '5 peak learning rates' in (said := capsys.readouterr().out)
  assert 'and 2 seeds' in said
  header, *rows = pathlib.Path('refined-refute.csv').read_text().split()
  assert (header, rows[0]) == (
    'table,peak_factor,seed', 'refined-linear.npz,0.5,0'
  )  # fmt: skip
  assert len(rows) == 20
  assert {r.replace('refined-linear', 'refined') for r in rows} == {*rows[10:]}


def test_refine_writes_what_can_refute_it(tool, run, capsys):
  (pathlib.Path('link')).symlink_to(run)
  assert tool('refine', '--run=link', '--seeds=2', '--num_steps=48') == 0
  output = capsys.readouterr().out
  assert 'lost as well as won' in output and 'grad/l1, power 1' in output
  folder = pathlib.Path('link/schedules')
  with np.load(folder / 'refined.npz') as f:
    about, m = json.loads(str(f['provenance'])), f['multiplier']
  assert m.size == 48 and m.max() == 1 and m[-1] == 0
  assert (about['run'], about['iteration']) == ('link', 1)
  assert (folder / 'refined.png').is_file()
  # Equal budgets, and no difference but the schedule.
  linear, refined = (
    cli.load_config(f'{folder}/refute.py:schedule={n}').to_dict()
    for n in ('linear', 'refined')
  )
  names = [c.pop('schedule')['name'] for c in (linear, refined)]
  assert names == ['linear', 'table'] and linear == refined
  assert linear['num_steps'] == 48
  settings = cli.load_module(f'{folder}/refute.py').sweep().values()
  assert len(settings) == 2 * 5 * 2
  rates = {(x['learning_rate'], x['seed']) for x in settings}
  assert len(rates) == 10  # 5 rates with 2 seeds, shared by both schedules
  # Norms of a run with a refined schedule are a second iteration.
  second = pathlib.Path('second')
  second.mkdir()
  config = json.loads((run / 'config.json').read_text())
  config['schedule'] = {'name': 'table', 'path': f'{folder}/refined.npz'}
  (second / 'config.json').write_text(json.dumps(config))
  (second / 'metrics.jsonl').write_text((run / 'metrics.jsonl').read_text())
  assert tool('refine', '--run=second') == 0
  with np.load('second/schedules/refined.npz') as f:
    assert json.loads(str(f['provenance']))['iteration'] == 2


@pytest.mark.parametrize(
  ('optimizer', 'choice'),
  [
    ('sgdw', 'grad/l2, power 2'),
    ('lion', 'grad/l1, power 1'),
    ('muon', 'grad/l2, power 1'),
  ],
)
def test_the_optimizer_decides_the_norm(tool, run, optimizer, choice, capsys):
  other = pathlib.Path('other')
  other.mkdir()
  config = json.loads((run / 'config.json').read_text())
  config['optimizer'] = {'name': optimizer}
  (other / 'config.json').write_text(json.dumps(config))
  (other / 'metrics.jsonl').write_text((run / 'metrics.jsonl').read_text())
  tool('refine', '--run=other')
  assert capsys.readouterr().out.startswith(choice)


def test_muon_is_refined_by_its_nuclear_norms(tool, run, capsys):
  other = pathlib.Path('other')
  other.mkdir()
  config = json.loads((run / 'config.json').read_text())
  config['optimizer'] = {'name': 'muon'}
  (other / 'config.json').write_text(json.dumps(config))
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(x) for x in lines]
  rows = [{**r, 'grad/nuclear': 1 + r['step']} for r in rows if 'grad/l2' in r]
  text = ''.join(json.dumps(r) + '\n' for r in rows)
  (other / 'metrics.jsonl').write_text(text)
  tool('refine', '--run=other', '--tau=0')
  assert capsys.readouterr().out.startswith('grad/nuclear, power 1')
  w = 1 / np.arange(1, 25)
  want = w * [w[t + 1 :].sum() for t in range(24)]
  with np.load('other/schedules/refined.npz') as f:
    np.testing.assert_allclose(f['multiplier'], want / want.max(), atol=1e-12)


# --- lr_range and extend


def test_no_mark_says_that_the_loss_turned_up_where_it_did_not(
  tool, monkeypatch, capsys
):
  marks, draw = [], schedule_pictures.ranges
  monkeypatch.setattr(
    schedule_pictures, 'ranges', lambda *a: marks.append(a[5]) or draw(*a)
  )
  losses = np.linspace(3, 2, 49)
  monkeypatch.setattr(range_training, 'train', lambda *_: ([*losses], 'a'))
  assert tool('lr_range', '--num_steps=50') == 0
  assert 'no larger' not in capsys.readouterr().out
  assert tool('lr_range', '--num_steps=50', '--knob=b2') == 0
  output = capsys.readouterr().out
  assert 'no larger value is legal' in output and 'b2=' not in output
  losses[30:] = 3
  assert tool('lr_range', '--num_steps=50', '--knob=b2') == 0
  assert '--config.optimizer.b2=' in capsys.readouterr().out
  assert ['turns' in ' '.join(m) for m in marks] == [False, False, True]


def _hashes(folder):
  files = sorted(p for p in folder.rglob('*') if p.is_file())
  return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_lr_range_changes_nothing_of_the_run_it_starts_from(tool, run, capsys):
  before = _hashes(run)
  arguments = [f'--config={run}/config.json', f'--config.branch={run}@24']
  nothing = '--low=1e-9', '--high=1e-8', '--num_steps=40'
  assert tool('lr_range', *arguments, *nothing) == 0
  name, words = tools.proposed(capsys.readouterr().out)  # noise hides all
  assert (name, words[-1]) == ('lr_range', '--num_steps=80')
  assert tool('lr_range', *arguments, '--num_steps=80', '--high=30') == 0
  output = capsys.readouterr().out
  assert f'branched from {run}@24' in output
  assert _hashes(run) == before
  here = {p.name for p in pathlib.Path().iterdir()}
  assert here == {'configs', 'runs'}
  assert [p.name for p in pathlib.Path('runs').iterdir()] == ['lr_range.png']
  name, words = tools.proposed(output)
  assert (name, words[:2]) == ('train', arguments)
  assert words[2].startswith('--config.learning_rate=')
  assert '--config.num_steps=48' in words  # those of the run are done
  assert tool('train', *words, '--dry_run') == 0
  capsys.readouterr()
  assert tool('lr_range', '--knob=b2', '--low=0.5', '--high=0.99',
              '--num_steps=12', *arguments) == 0  # fmt: skip
  assert '11 of 12 values' in capsys.readouterr().out
  assert tool('lr_range', '--knob=weight_decay', '--low=0.01', '--high=10',
              '--num_steps=12', *arguments) == 0  # fmt: skip
  output = capsys.readouterr().out
  assert '11 of 12 values' in output and 'raise --high' in output
  name, words = tools.proposed(output)  # not to train with the last value
  assert (name, words[-1]) == ('lr_range', '--high=100')


@pytest.mark.parametrize('found', [True, False])
def test_a_run_is_named_by_what_was_found(tool, monkeypatch, capsys, found):
  losses = [5 - 0.04 * n for n in range(100)]
  if found:
    losses[60:] = [losses[60] + 0.08 * n for n in range(40)]
  trained = lambda *unused: (losses[1:], 'from scratch')
  monkeypatch.setattr(range_training, 'train', trained)
  flags = ['--knob=b1', '--low=0.5', '--high=1', '--spacing=linear']
  assert tool('lr_range', *flags, '--num_steps=100') == 0
  output = capsys.readouterr().out
  assert found != ('no larger value is legal' in output)
  name, words = tools.proposed(output)
  assert (name, words.pop(0)) == ('train', '--config=configs/debug.py')
  if found:
    value = float(words[0].removeprefix('--config.optimizer.b1='))
    assert 0.7 < value < 0.85
    assert words[-1] == f'--workdir=runs/b1-{value}'
  else:
    assert words == ['--workdir=runs/without-b1']


def test_a_range_test_decays_as_the_run_would():
  config = lambda decay, **knobs: helpers.config(
    num_steps=16, learning_rate=0.03, optimizer__weight_decay=decay, **knobs
  )
  divided = {'normalize_decay': True, 'eval__merged': 'linear:4'}
  x = np.geomspace(1e-2, 0.1, 10)
  losses = lambda *args: range_training.train(*args)[0]
  want = losses(config(2.0), 'learning_rate', x)
  assert losses(config(8.0, **divided), 'learning_rate', x) == want
  assert losses(config(8.0), 'learning_rate', x) != want
  want = losses(config(2.0), 'weight_decay', 10 * x)
  got = losses(config(2.0, **divided), 'weight_decay', 4 * 10 * x)
  assert got == want


def test_the_proposed_command_trains(tool, run, capsys):
  assert tool('extend', f'--run={run}', '--num_steps=36') == 0
  title, command = tools.commands(capsys.readouterr().out)[0]
  python, m, name, *arguments = shlex.split(command)
  assert (name, title[:8]) == ('launch.train', '# longer')
  assert tool('train', *arguments) == 0
  longer = Run(next(a for a in arguments if a[:9] == '--workdir')[10:])
  assert longer.meta['status'] == 'done' and longer.config.num_steps == 36
  at = int(longer.meta['parent'].partition('@')[2])
  rates = [Run(run).learning_rates()[at - 1], longer.learning_rates()[at]]
  np.testing.assert_allclose(rates, 3e-3)
