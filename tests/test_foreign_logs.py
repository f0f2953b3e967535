"""Logs of other projects: the same run in every format reads alike."""

import csv
import json

import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util import tensor_util

from lm import foreign_logs
from lm.errors import UserError
from tests import helpers

STEPS = np.arange(0, 100, 10)
LOSS = np.round(5 / (1 + STEPS / 50), 6)
RATE = np.round(1e-3 * (1 - STEPS / 100), 9)


def _records(steps=STEPS, loss=LOSS, rate=RATE):
  names = ('step', 'train_loss', 'learning_rate')
  rows = zip(steps.tolist(), loss.tolist(), rate.tolist(), strict=True)
  return [dict(zip(names, row, strict=True)) for row in rows]


def _jsonl(folder):
  path = folder / 'x.jsonl'
  lines = [json.dumps(r) for r in _records()]
  path.write_text('\n'.join(lines) + '\n{"step": 100, "train_l')  # killed
  return path


def _csv(folder):
  path = folder / 'x.csv'
  with path.open('w', newline='') as f:
    writer = csv.writer(f)
    writer.writerow(['Global_Step', 'train_loss', 'learning_rate', 'note'])
    for r in _records():
      writer.writerow([r['step'], r['train_loss'], '', 'hello'])
      writer.writerow([r['step'], '', r['learning_rate'], ''])
  return path


def _excel(folder):
  path = _csv(folder)
  path.write_text(path.read_text(), encoding='utf-8-sig')
  return path


def _history(folder):
  path = folder / 'x.json'
  train = {
    'iter': STEPS.tolist(),
    'train_loss': LOSS.tolist(),
    'train_lr': RATE.tolist(),
  }
  content = {'config': {'lr': 1}, 'history': {'train': train, 'ema': {}}}
  path.write_text(json.dumps(content))
  return path


def _trainer_state(folder):
  path = folder / 'x.json'
  path.write_text(json.dumps({'best': None, 'log_history': _records()}))
  return path


def _events(folder, tensors=False, sub=''):
  writer = EventFileWriter(str(folder / 'tb' / sub))
  for r in _records():
    step = r.pop('step')
    values = [
      summary_pb2.Summary.Value(
        tag=k, tensor=tensor_util.make_tensor_proto(np.float32(v))
      )
      if tensors
      else summary_pb2.Summary.Value(tag=k, simple_value=v)
      for k, v in r.items()
    ]
    summary = summary_pb2.Summary(value=values)
    writer.add_event(event_pb2.Event(step=step, summary=summary))
  writer.close()
  return folder / 'tb'


def _tensors(folder):
  return _events(folder, tensors=True)


def _two_folders(folder):
  _events(folder, sub='train')
  return _events(folder, sub='other')


@pytest.mark.parametrize(
  'write',
  [
    _jsonl,
    _csv,
    _excel,
    _history,
    _trainer_state,
    _events,
    _tensors,
    _two_folders,
  ],
)
def test_every_format_reads_alike(write, tmp_path):
  found = foreign_logs.read(str(write(tmp_path)))
  for kind, want in (('loss', LOSS), ('lr', RATE)):
    series = foreign_logs.find(found, kind)
    np.testing.assert_array_equal(series.step, STEPS)
    np.testing.assert_allclose(series.value, want, rtol=1e-6)
  rates = foreign_logs.learning_rates(found)
  np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(91) / 100), rtol=1e-6)


def test_a_tag_that_is_missing_is_answered_with_those_there_are(tmp_path):
  found = foreign_logs.read(str(_jsonl(tmp_path)))
  with pytest.raises(UserError, match='Its tags: learning_rate, train_loss'):
    foreign_logs.find(found, 'l1')
  with pytest.raises(UserError, match="Did you mean 'train_loss'"):
    foreign_logs.find(found, 'loss', 'trian_loss')
  assert foreign_logs.tag_of(found, 'l1', 'train_loss') == 'train_loss'


def test_validation_comes_before_training_loss(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"step": 1, "train_loss": 1, "a/val_loss": 2}')
  found = foreign_logs.read(str(path))
  assert foreign_logs.tag_of(found, 'loss') == 'a/val_loss'


def test_a_restarted_log_counts_the_last_value_of_a_step(tmp_path):
  path = tmp_path / 'x.jsonl'
  rows = [(0, 9.0), (1, 8.0), (2, 7.0), (1, 6.0), (2, 5.0)]
  path.write_text(''.join(f'{{"step": {s}, "loss": {v}}}\n' for s, v in rows))
  series = foreign_logs.find(foreign_logs.read(str(path)), 'loss')
  assert series.step.tolist() == [0, 1, 2]
  assert series.value.tolist() == [9, 6, 5]


def _stages(folder):
  """A constant run of 100 steps, and a cooldown of it from step 60 on."""
  flat = _records(rate=np.full(10, 1e-3))
  steps = np.arange(60, 101, 5)
  cooled = _records(steps, steps / 100, 1e-3 * (100 - steps) / 40)
  for name, rows in (('stable', flat), ('cooldown', cooled)):
    (folder / f'{name}.jsonl').write_text(
      ''.join(json.dumps(r) + '\n' for r in rows)
    )
  return f'{folder}/stable.jsonl+{folder}/cooldown.jsonl'


def _wsd(num_steps=100, start=60):
  t = np.arange(num_steps)
  return 1e-3 * np.minimum(1, (num_steps - t) / (num_steps - start))


def test_two_lists_of_records_keep_their_names(tmp_path):
  rows = lambda x: [{'step': s, 'loss': x} for s in range(3)]
  path = tmp_path / 'x.json'
  path.write_text(json.dumps({'train': rows(2.0), 'val': rows(3.0)}))
  found = foreign_logs.read(str(path)).tags
  assert {k: v.value[0] for k, v in found.items()} == {
    'train/loss': 2.0, 'val/loss': 3.0
  }  # fmt: skip
  path.write_text(json.dumps({'log_history': rows(2.0)}))
  assert list(foreign_logs.read(str(path)).tags) == ['loss']


def test_a_stage_is_joined_to_its_parent(tmp_path):
  found = foreign_logs.read(_stages(tmp_path))
  rates = foreign_logs.learning_rates(found)
  np.testing.assert_allclose(rates, _wsd(), rtol=1e-9)
  loss = foreign_logs.find(found, 'loss')
  assert loss.step.tolist() == [*range(0, 60, 10), *range(60, 101, 5)]
  assert loss.value[-1] == 1.0  # of the stage, not of the parent
  parent = foreign_logs.Log('p', {'eval/loss': loss, 'late': loss}, {}, {})
  rates = found.tags[foreign_logs.tag_of(found, 'lr', '', '')]
  late = foreign_logs.Series(*(x[rates.step >= 60] for x in rates))
  parent.tags['late'] = foreign_logs.Series(*(x[-2:] for x in loss))
  joined = foreign_logs.join(
    parent, foreign_logs.Log('s', {'lr': late}, {}, {})
  )
  assert joined.tags['eval/loss'].step.tolist() == list(range(0, 60, 10))
  assert set(joined.tags) == {'eval/loss', 'lr'}
  with pytest.raises(UserError, match='does not continue'):
    foreign_logs.read('+'.join(reversed(_stages(tmp_path).split('+'))))


def _ours(folder, name, num_steps, rows, branch=''):
  run = folder / name
  run.mkdir()
  config = helpers.config(num_steps=num_steps, branch=branch).to_dict()
  (run / 'config.json').write_text(json.dumps(config))
  lines = [json.dumps({'step': s, 'optim/lr': v}) for s, v in rows]
  (run / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  return str(run)


def test_our_branches_find_their_parent(tmp_path):
  wsd = _wsd()
  a = _ours(tmp_path, 'a@1', 100, [(s, 1e-3) for s in range(100)])
  b = _ours(
    tmp_path, 'b', 100, [(s, wsd[s]) for s in range(60, 100)], f'{a}@60'
  )
  rates = foreign_logs.learning_rates(foreign_logs.read(b))
  np.testing.assert_allclose(rates, wsd, rtol=1e-12)
  assert abs(rates - 1e-3).max() > 5e-4, 'the branch differs from its parent'
  again = [(s, wsd[s] / 2) for s in range(100)]
  d = _ours(tmp_path, 'd', 100, again, f'{a}@0')
  rates = foreign_logs.learning_rates(foreign_logs.read(d))
  np.testing.assert_allclose(rates, wsd / 2, rtol=1e-12)
  c = _ours(tmp_path, 'c', 100, [(70, 1e-3)], f'{tmp_path}/gone@60')
  with pytest.raises(UserError, match="branch of '.*/gone', which is gone"):
    foreign_logs.read(c)
  with pytest.raises(UserError, match='b finds its parent itself; legal: .*b'):
    foreign_logs.read(f'{a}+{b}')


def test_cells_that_cannot_be_used_are_counted(tmp_path, capsys):
  path = tmp_path / 'x.csv'
  path.write_text('step,lr,note\n0,1,a\n1,hello,b\n2,nan,\n3,,c\n4,0.5\n')
  rates = foreign_logs.learning_rates(foreign_logs.read(str(path)))
  np.testing.assert_allclose(rates, np.linspace(1, 0.5, 5))
  assert capsys.readouterr().out.startswith(
    f'warning: 2 of 5 rows of {path} have cells that are no finite number and '
    'are not used, the first in line 3'
  )
  foreign_logs.read(str(_csv(tmp_path)))
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  ('name', 'content', 'sentence'),
  [
    ('nothing', None, 'does not exist'),
    ('x.txt', 'hello', 'is not a log; legal'),
    ('x.jsonl', '', 'holds no numbers by step'),
    ('x.jsonl', '{"step": 1, \n', "line 1 of '.*x.jsonl' is damaged"),
    ('x.jsonl', b'{"step": 1}\n\xff\n', "line 2 of '.*x.jsonl' is damaged"),
    ('x.csv', b'step,loss\n1,\xff\n', 'is not a readable log'),
    ('x.csv', f'step,loss\n1,{"9" * 200_000}\n', 'field larger than'),
    ('x.csv', 'time,loss\n1,2\n', "'.*x.csv' is .*no column is a step"),
    ('x.csv', 'step;loss\n1;2\n', 'step;loss. Columns are separated by comma'),
    ('x.csv', 'step,loss\nnan,2\n', 'not .*step nan is no whole number'),
    ('x.csv', 'step,loss\n1e30,2\n', 'step 1e.30 is no whole number below'),
    ('x.csv', 'epoch,loss\n1,3\n1.5,2\n', 'step 1.5 is no whole number'),
    ('x.json', '{"a": 1}', 'holds no numbers by step'),
    ('x.json', 'no', 'is not a readable log'),
    ('events.tfevents.1', 'no', 'holds no numbers by step'),
  ],
)
def test_bad_logs(name, content, sentence, tmp_path):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content if type(content) is bytes else content.encode())
  with pytest.raises(UserError, match=sentence):
    foreign_logs.read(str(path))


def test_an_empty_folder_is_no_log(tmp_path):
  with pytest.raises(UserError, match='holds no numbers by step'):
    foreign_logs.read(str(tmp_path))
