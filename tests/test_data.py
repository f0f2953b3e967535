"""The batch of a step is a pure function of (data, seed, step)."""

import itertools
import pathlib
import subprocess
import sys
import tracemalloc

import grain
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from configs import debug
from lm import data, evaluate, loop, sources, tokens
from lm.errors import UserError
from tests import helpers


def config_of(source, train='', evaluation='', **more):
  """The debug config on `source`; keys of `more` are dotted with '__'."""
  c = debug.get_config()
  c.data.update(
    {'source': source, 'train': str(train), 'eval': str(evaluation)}
  )
  c.seq_len, c.batch_size, c.eval.num_sequences = 8, 4, 3
  c.update_from_flattened_dict({k.replace('__', '.'): more[k] for k in more})
  return c


def write(path, values, dtype='<u2'):
  np.asarray(values, dtype).tofile(path)
  return path


@pytest.fixture
def counted(tmp_path):
  """Shards whose token at position i is i: a window shows where it is from."""
  write(tmp_path / 'a.bin', np.arange(100))
  write(tmp_path / 'b.bin', np.arange(100, 233))
  write(tmp_path / 'val.bin', np.arange(300, 391))

  def build(**more):
    return data.build(
      config_of(
        'bin',
        tmp_path / '[ab].bin',
        tmp_path / 'val.bin',
        **{'model__vocab_size': 512, **more},
      )
    )

  return build


def order_of(order, n, epoch=0):
  return np.array([order[epoch * n + i] for i in range(n)])


def test_windows_overlap_by_one_token_and_cross_shards(counted):
  batches = counted().train
  rows = np.concatenate([batches.batch(s) for s in range(8)])[:29]
  rows = rows[np.argsort(rows[:, 0])]
  # 233 tokens hold 29 windows of 8 + 1; number 12 lies in both shards.
  np.testing.assert_array_equal(rows, np.arange(29)[:, None] * 8 + np.arange(9))
  assert rows.dtype == np.int32
  assert rows[12, 0] < 100 <= rows[12, -1]


def test_each_epoch_is_another_permutation(counted):
  n, batches = 29, counted(batch_size=1).train
  epochs = [
    [int(batches.batch(e * n + i)[0, 0]) // 8 for i in range(n)]
    for e in (0, 1, 2, 10**12)
  ]
  assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
  assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_seeds_give_other_orders_and_the_same_validation(counted):
  a, b, c = (counted(seed=s) for s in (0, 1, 0))
  assert not np.array_equal(a.train.batch(0), b.train.batch(0))
  np.testing.assert_array_equal(a.train.batch(3), c.train.batch(3))
  np.testing.assert_array_equal(a.eval_tokens_ES, b.eval_tokens_ES)
  assert a.fingerprint == b.fingerprint


def test_one_seed_later_is_not_one_epoch_later(counted):
  # grain adds the epoch to a seed; seeds must be hashed before that.
  n, a, b = 29, counted(batch_size=29).train, counted(batch_size=29, seed=1)
  assert not np.array_equal(a.batch(1), b.train.batch(0))
  assert a.batch(1).shape == (n, 9)


@hypothesis.settings(
  max_examples=30,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  step=st.integers(0, 2**40),
  batch_size=st.sampled_from([4, 8, 60]),
  hosts=st.sampled_from([1, 2, 4]),
)
def test_hosts_together_read_the_global_batch(counted, step, batch_size, hosts):
  part = batch_size // hosts
  rows = [
    # A host is a new process: it builds its own data and shares no state.
    counted(batch_size=batch_size).train.batch(
      step, slice(h * part, h * part + part)
    )
    for h in range(hosts)
  ]
  whole = counted(batch_size=batch_size).train.batch(step)
  np.testing.assert_array_equal(np.concatenate(rows), whole)


def test_rows_in_any_order_and_of_any_step_in_any_order(counted):
  batches = counted().train
  first = batches.batch(7)
  batches.batch(10**9), batches.batch(0, slice(3, 4))
  np.testing.assert_array_equal(batches.batch(7), first)
  np.testing.assert_array_equal(batches.batch(7, slice(3, 1, -1)), first[:1:-1])
  np.testing.assert_array_equal(batches.batch(np.int32(7)), first)
  assert batches.batch(7, slice(2, 2)).shape == (0, 9)


def test_a_batch_size_twice_as_large_reads_the_same_sequence(counted):
  small, large = counted().train, counted(batch_size=8).train
  np.testing.assert_array_equal(
    np.concatenate([small.batch(6), small.batch(7)]), large.batch(3)
  )


def test_order_is_the_one_that_runs_were_trained_on(counted):
  """If this changes, runs made before resume on other data than they would.

  Say so in CHANGELOG.md (numerics) and put the new numbers here.
  """
  found = counted(batch_size=29).train.batch(0)[:, 0] // 8
  assert found[:6].tolist() == [1, 14, 23, 10, 5, 2]


def test_shuffle_is_as_irregular_as_a_random_order():
  """Mean window index of 16 rows: its spread over batches, 1 if random.

  One shuffle of grain fails; when a new version of grain passes with one,
  `Batches` can do without the second (the order changes: see above).
  """

  def spread(order):
    means = order.reshape(-1, 16).mean(1)
    return means.std() / (order.size / np.sqrt(12 * 16))

  n = 65_536
  stream = tokens.Stream([np.zeros(n + 1, np.uint8)])
  ours = data.shuffled(len(data.Windows(stream, 1, 256)), seed=0)
  once = grain.MapDataset.range(n).seed(0).shuffle().repeat()
  first, second = order_of(ours, n), order_of(ours, n, epoch=1)
  # Standard error of a standard deviation over 4,096 batches: 1.1 %.
  assert abs(spread(first) - 1) < 0.05
  assert spread(order_of(once, n)) < 0.5
  for lag in (1, 2, 3, 4, 16):
    assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 5 / n**0.5
  assert abs(np.corrcoef(first, second)[0, 1]) < 5 / n**0.5


def test_validation_is_evenly_spaced_whatever_the_batch(counted):
  # 91 tokens hold 11 windows of 9; three of them: 0, 3 and 7.
  expected = 300 + np.array([0, 3, 7])[:, None] * 8 + np.arange(9)
  for more in ({}, {'batch_size': 60}, {'num_steps': 7}):
    np.testing.assert_array_equal(counted(**more).eval_tokens_ES, expected)
  every = counted(eval__num_sequences=11).eval_tokens_ES[:, 0]
  np.testing.assert_array_equal(every, 300 + np.arange(11) * 8)


@pytest.mark.parametrize('asked', [12, 0, -1])
def test_validation_asks_for_more_than_there_is(counted, asked):
  with pytest.raises(UserError, match=f'{asked}.* has 11 sequences'):
    counted(eval__num_sequences=asked)


def test_stream_past_two_to_the_31_tokens_is_never_read_whole(tmp_path):
  n = 2**31 + 1000
  with (tmp_path / 'huge.bin').open('wb') as f:  # sparse: takes no space
    f.truncate(2 * n)
    f.seek(2 * (n - 100))
    f.write(np.arange(1, 101, dtype='<u2').tobytes())
  write(tmp_path / 'val.bin', np.arange(91))
  tracemalloc.start()
  found = data.build(
    config_of('bin', tmp_path / 'huge.bin', tmp_path / 'val.bin')
  )
  windows = found.train._windows
  last = windows.read([len(windows) - 1])[0]
  found.train.batch(10**15)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert len(windows) == (n - 1) // 8
  start = (len(windows) - 1) * 8 - (n - 100)
  np.testing.assert_array_equal(last, np.arange(start, start + 9) + 1)
  assert peak < 32 << 20


def test_more_windows_than_can_be_shuffled(tmp_path):
  with (tmp_path / 'huge.bin').open('wb') as f:
    f.truncate(2 * (2**32 + 2))
  write(tmp_path / 'val.bin', np.arange(91))
  with pytest.raises(UserError, match=f'{2**32 + 1} sequences.*seq_len=1'):
    data.build(
      config_of('bin', tmp_path / 'huge.bin', tmp_path / 'val.bin', seq_len=1)
    )


def test_a_bad_token_in_shards_too_large_to_scan(tmp_path, monkeypatch):
  monkeypatch.setattr(tokens, 'WHOLE', 100)
  good, bad = np.zeros(100), np.zeros(100)
  bad[50] = 2**32 - 1  # wraps to -1 as int32
  write(tmp_path / 'a.bin', bad, '<u4')
  write(tmp_path / 'val.bin', good)
  (tmp_path / 'a.bin.json').write_text('{"dtype": "uint32"}')
  found = data.build(config_of('bin', tmp_path / 'a.bin', tmp_path / 'val.bin'))
  with pytest.raises(UserError, match=f'token {2**32 - 1}, outside'):
    [found.train.batch(step) for step in range(3)]


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    ({'data__source': 'wikitext'}, "'wikitext' does not exist.*python_source"),
    ({'data__source': 'txt'}, "Did you mean 'text'"),
    ({'model__vocab_size': 255}, 'vocab_size=255.*at least 256'),
    ({'data__train': '*.txt'}, 'takes no files'),
    ({'seed': -1}, 'seed=-1'),
    ({'seq_len': 0}, 'seq_len=0'),
    ({'batch_size': 0}, 'batch_size=0'),
  ],
)
def test_impossible_settings(more, message):
  with pytest.raises(UserError, match=message):
    data.build(config_of('python_source', **more))


def test_import_does_not_pay_for_grain():
  code = 'import sys; from lm import data; print("grain" in sys.modules)'
  root = pathlib.Path(__file__).parents[1]
  run = subprocess.run(
    [sys.executable, '-c', code], cwd=root, capture_output=True, text=True
  )
  assert run.stdout == 'False\n', run.stderr


def test_bits_per_byte_of_longer_tokens():
  """A nat per token of 4 bytes is 1 / (4 ln 2) bits per byte."""
  config = helpers.config()
  built = loop.build(config)
  found = built.data._replace(bytes_per_token=4.0)
  with jax.set_mesh(built.mesh):
    params = built.init().params
    got = evaluate.build(config, built.model, found, built.mesh)(params)
  want = float(got['eval/loss']) / (4 * np.log(2))
  assert float(got['eval/bits_per_byte']) == pytest.approx(want, rel=1e-6)


def test_the_second_validation_set_is_spread_over_all_of_it():
  config = helpers.config()
  first = data.build(config).eval_tokens_ES
  second = data.second_validation(config)
  assert second.shape == first.shape
  rows = lambda x: {row.tobytes() for row in x}
  assert not rows(first) & rows(second)
  windows = data.Windows(
    sources.load(config).evaluation, config.seq_len, config.model.vocab_size
  )
  place = {
    w.tobytes(): i for i, w in enumerate(windows.read(range(len(windows))))
  }
  places = sorted(place[row.tobytes()] for row in second)
  assert places[0] < len(windows) / 8 and places[-1] > len(windows) * 3 / 4
