"""Mistakes at the schedule tools: one sentence, and nothing is written."""

import pathlib

import numpy as np
import pytest

from tests import helpers, tools


@pytest.fixture
def tool(monkeypatch, tmp_path):
  """tool('refine', '--run=a') -> exit code, in a folder of its own."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(helpers.ROOT / 'configs')
  return lambda name, *args: tools.call(monkeypatch, name, *args)


BAD = {
  'plot_schedule': [
    ([], 'are missing'),
    (['--schedules=,'], 'are missing'),
    (['--schedules=sgdr:cycles=2.5'], "cycles='2.5' must be"),
    (['--schedules=sgdr:cycles=1100,growth=2'], 'cycles=1100 overflows'),
    (['--schedules=constant:warmup_steps=3000000000'], 'is beyond int32'),
    (['--schedules=wds'], "Did you mean 'wsd'"),
    (['--schedules=wsd:decai=1'], "Did you mean 'decay'"),
    (['--schedules=wsd:decay=much'], 'must be a number'),
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
    (['--run=norms.jsonl', '--seeds=0'], '--seeds=0: 0 is not'),
    (['--run=norms.jsonl', '--warmup=1'], '--warmup=1.0'),
    (['--run=norms.jsonl', '--num_steps=1'], '--num_steps=1'),
    (['--run=zeros.jsonl'], '0 positive, finite norms'),
    (['--run=steep.jsonl', '--power=1e5'], '--power=100000 of these norms is'),
    (['--run=half'], 'up to step 8 of 4000'),
    (['--run=norms.jsonl', '--out=a.txt'], 'must end in .npz'),
  ],
  'predict': [
    ([], '--runs is missing'),
    (['--runs=loss.jsonl,other.jsonl,loss.jsonl'], 'are one run'),
    (['--runs=loss.jsonl,less.jsonl,least.jsonl'], 'at least two are needed'),
    (['--runs=loss.jsonl,other.jsonl'], 'three numbers are fitted'),
    (['--runs=norms.jsonl'], 'Its tags: grad_norm'),
    (['--runs=loss.jsonl', '--tag=los'], "Did you mean 'loss'"),
    (['--runs=norms.jsonl', '--tag=grad_norm'], 'name it by --lr_tag.'),
    (['--runs=loss.jsonl', '--lr_tag=lrs'], "--lr_tag='lrs': loss.jsonl has"),
    (['--runs=loss.jsonl,other.jsonl,less.jsonl', '--level=90'], '--level=90'),
    (['--runs=a', '--num_steps=many'], "'many' is not a number"),
    (['--runs=a', '--last=0'], '--last=0'),
    (['--runs=a', '--out=a'], 'must end in .png'),
  ],
  'extend': [
    ([], '--run is missing'),
    (['--run=gone'], 'is not a run directory'),
    (['--run=other'], "'other' is not a run directory"),
    (['--run=half', '--num_steps=100'], '100 is too small; legal: more than 4'),
    (['--run=half', '--num_steps=4000'], 'legal: more than 4000'),
    (['--run=half'], '--num_steps is missing; legal: more than 4000'),
    (['--run=half', '--num_steps=5000', '--decay=0.3'],
     'is for runs at a constant rate'),
    (['--run=half', '--num_steps=8000', '--schedules=wds'], "'wsd'"),
    (['--run=early', '--num_steps=8000'], 'no checkpoint between'),
    (['--run=edited'], "edited/config.json': schedules/wsd.py: warmup='x"),
  ],
  'lr_range': [
    (
      ['--config=configs/debug.py:optimizer=lion_k', '--knob=epsilon',
       '--config.optimizer.kernel=lp', '--config.optimizer.epsilon=3',
       '--config.model.base_width=16',
       '--low=1.5', '--high=4'],
      'changes the width rule of lion_k',
    ),
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
    (['--config.model.vocab_size=2147483647'], 'averages need 1536.0 GiB'),
  ],
}  # fmt: skip


@pytest.mark.filterwarnings('error::RuntimeWarning')
@pytest.mark.parametrize('name', BAD)
def test_mistakes_are_one_sentence(name, tool, capsys):
  tools.log('norms.jsonl', grad_norm=np.ones(9))
  tools.log('zeros.jsonl', grad_norm=np.zeros(9))
  tools.log('steep.jsonl', grad_norm=np.arange(1, 10))
  tools.log('loss.jsonl', loss=np.ones(9), lr=np.ones(9))
  tools.log('less.jsonl', loss=np.ones(9) / 2, lr=np.ones(9))
  tools.log('least.jsonl', loss=np.ones(9) / 3, lr=np.ones(9))
  tools.log('rest.jsonl', loss=[1], lr=[0])
  pathlib.Path('other').mkdir()  # of another trainer
  pathlib.Path('other/config.json').write_text('{}')
  tools.log('other.jsonl', loss=np.ones(9), lr=2 * np.ones(9))
  tools.fake_run('half', arg='schedule=wsd', num_steps=4000)
  tools.log(
    'half/metrics.jsonl', **{'grad/l1': np.ones(9), 'optim/lr': np.ones(9)}
  )
  tools.fake_run('early', arg='schedule=wsd', num_steps=2900)
  tools.fake_run('edited', arg='schedule=wsd', num_steps=4000)
  path = pathlib.Path('edited/config.json')
  path.write_text(path.read_text().replace('"warmup": 0.02', '"warmup": "x"'))
  for arguments, sentence in BAD[name]:
    before = {*pathlib.Path().rglob('*')}
    code = tool(name, *arguments)
    error = capsys.readouterr().err
    assert code == 2, arguments
    lines = error.splitlines()
    assert lines[-1].startswith('error: ') and sentence in lines[-1], error
    assert 'Traceback' not in error
    assert {*pathlib.Path().rglob('*')} == before, arguments
