"""The order of the data by a score, and what a learning rate makes of it."""

import numpy as np
import pytest

from benchmarks import curriculum as experiment
from configs import debug
from lm import curriculum, data
from lm.errors import UserError

T, N = 8, 40  # tokens of a sequence, sequences


@pytest.fixture
def build(tmp_path):
  """Sequence i is T tokens i; its score is in `scores`."""
  np.repeat(np.arange(N + 1), T).astype('<u2').tofile(tmp_path / 'a.bin')
  np.arange(3 * T + 1).astype('<u2').tofile(tmp_path / 'val.bin')
  scores = np.random.default_rng(0).permutation(N + 1) / 7
  rows = np.stack([np.full(N + 1, T), scores], 1)
  np.save(tmp_path / 'a.bin.score.npy', rows)

  def make(**more):
    c = debug.get_config()
    c.seq_len, c.batch_size, c.eval.num_sequences = T, 4, 3
    files = {'train': f'{tmp_path}/a.bin', 'eval': f'{tmp_path}/val.bin'}
    c.data.update({'source': 'bin', **files, **more})
    return data.build(c)

  make.scores, make.folder = scores, tmp_path
  return make


SORTED = {'order': 'ascend', 'score': 'file', 'order_begin': 3, 'order_end': 9}


def _seen(built, steps=20):
  return np.concatenate([built.train.batch(s)[:, 0] for s in range(steps)])


def test_the_same_sequences_sorted_within_the_steps(build):
  shuffled, up = _seen(build()), _seen(build(**SORTED))
  down = _seen(build(**{**SORTED, 'order': 'descend'}))
  inside = slice(3 * 4, 9 * 4)
  assert sorted(up[inside]) == sorted(shuffled[inside])
  assert (np.diff(build.scores[up[inside]]) > 0).all()
  np.testing.assert_array_equal(down[inside], up[inside][::-1])
  for found in (up, down):
    np.testing.assert_array_equal(found[:12], shuffled[:12])
    np.testing.assert_array_equal(found[36:], shuffled[36:])


def test_hosts_and_resumes_read_the_same_batch(build):
  whole = build(**SORTED).train.batch(6)
  parts = [
    build(**SORTED).train.batch(6, slice(r, r + 1)) for r in (2, 0, 3, 1)
  ]
  np.testing.assert_array_equal(np.concatenate(parts), whole[[2, 0, 3, 1]])


def test_ties_keep_the_shuffled_order(build):
  np.save(build.folder / 'a.bin.score.npy', 0.1)  # of the whole file
  np.testing.assert_array_equal(_seen(build()), _seen(build(**SORTED)))


def test_other_scores_are_another_run(build):
  before = build(**SORTED).fingerprint
  rows = np.load(build.folder / 'a.bin.score.npy')
  rows[:, 1] *= -1
  np.save(build.folder / 'a.bin.score.npy', rows)
  assert len({before, build(**SORTED).fingerprint, build().fingerprint}) == 3


def test_documents_that_no_sequence_begins_with(build):
  """The mean over the tokens of a sequence, against a loop over tokens."""
  sizes = np.array([5, 90, 1, 100, 132])
  scores = np.array([3.0, -1.0, 50.0, 0.5, 2.0])
  np.save(build.folder / 'a.bin.score.npy', np.stack([sizes, scores], 1))
  of_token = np.repeat(scores, sizes)
  want = [of_token[i * T : i * T + T].mean() for i in range(N)]
  built = build(**{**SORTED, 'order_begin': 0, 'order_end': 10})
  first_N = _seen(built, 10)
  assert sorted(first_N) == list(range(N))
  assert (np.diff(np.float32(want)[first_N]) >= 0).all()
  np.testing.assert_allclose(
    built.train._order.scores, np.sort(want), rtol=1e-6
  )


def test_text_files_and_a_function(tmp_path):
  rng = np.random.default_rng(0)
  noise, plain = rng.integers(0, 256, 400, np.uint8).tobytes(), b'ab' * 200
  for name, text in (('0', plain), ('1', noise), ('2', plain), ('v', plain)):
    (tmp_path / f'{name}.txt').write_bytes(text)
  c = debug.get_config()
  c.seq_len, c.batch_size, c.eval.num_sequences = 100, 4, 1
  c.data.update({
    'source': 'text', 'train': f'{tmp_path}/[0-9].txt', 'order': 'ascend',
    'eval': f'{tmp_path}/v.txt', 'score': 'compressibility', 'order_end': 3,
  })  # fmt: skip
  by_function = data.build(c).train.batch(0)
  for i, score in enumerate((1.0, 0.0, 1.0)):
    np.save(tmp_path / f'{i}.txt.score.npy', score)
  c.data.score = 'file'
  by_file = data.build(c).train.batch(0)
  for batch in (by_function, by_file):  # the four sequences of noise
    assert min(len(np.unique(row)) for row in batch) > 30
  assert curriculum.compressibility(np.zeros(99, np.uint8)) > 0.8


@pytest.mark.parametrize(
  ('knobs', 'sentence'),
  [
    ({'order': 'ascent', 'score': 'file'}, "order='ascent' .*'ascend'"),
    ({'order': 'ascend'}, 'needs data.score; legal: file, compressibility'),
    ({'score': 'file'}, 'does nothing without data.order'),
    ({'order_end': 9}, 'order_end=9 do nothing without data.order'),
    ({'order': 'ascend', 'score': 'fil'}, "Did you mean 'file'"),
    ({**SORTED, 'order_end': 3}, r'--config.data.order_end=40\.'),
    ({**SORTED, 'order_end': 14}, 'one pass of 40 sequences; .* at most 13'),
    ({**SORTED, 'eval': ''}, 'needs files for validation'),
  ],
)
def test_knobs_that_contradict_each_other(build, knobs, sentence):
  with pytest.raises(UserError, match=sentence):
    build(**knobs)


def test_score_files_that_do_not_fit(build):
  path = build.folder / 'a.bin.score.npy'
  for wrong, sentence in (
    (np.ones((3, 2)), 'scores 3 tokens; .* has 328'),
    (np.ones(3), r'shape \(3,\)'),
    (np.array([[-1, 1], [329, 2]]), 'counts -1 tokens of a document; legal: 0'),
    (np.array([[163.5, 1], [164.5, 2]]), 'counts 163.5 tokens of a document'),
    (np.array([[328, np.nan]]), 'finite'),
    (np.array([{}], object), 'an array of numbers'),
  ):
    np.save(path, wrong, allow_pickle=True)
    with pytest.raises(UserError, match=sentence):
      build(**SORTED)
  path.unlink()
  with pytest.raises(UserError, match='No such file'):
    build(**SORTED)


# The toy of the claim of arXiv 2511.18903: two directions of a quadratic. At
# quality q in [0, 1] a gradient is h s(q) x plus noise of standard deviation
# n(q): better data have more signal and less noise.


def _moments(rates, orders, h, average):
  """E[mean of the last `average` iterates squared], by recursions, from x = 1.

  orders: (steps, K), the K qualities that a step draws from, equally likely.
  """
  signal, noise = orders, 1 - 0.9 * orders
  shrink = 1 - rates[:, None] * h * signal
  first, second = shrink.mean(1), (shrink**2).mean(1)
  added = (rates[:, None] * noise) ** 2
  steps = len(rates)
  # E x^2, E x m, E m^2 with the running sum m of the iterates.
  square, mixed, mean_square = 1.0, 0.0, 0.0
  for t in range(steps):
    mixed *= first[t]
    square = second[t] * square + added[t].mean()
    if t >= steps - average:
      mean_square += 2 * mixed + square
      mixed += square
  return mean_square / average**2


def _explicit(rates, qualities, h, average):
  """The same for one quality per step: the coefficient of every noise."""
  steps = len(rates)
  decay = 1 - rates * h * qualities
  weight = np.arange(steps) >= steps - average
  start = (np.cumprod(decay) * weight).sum()
  noises = [
    -rates[k] * (1 - 0.9 * qualities[k])
    * (np.cumprod(np.r_[1.0, decay[k + 1 :]]) * weight[k:]).sum()
    for k in range(steps)
  ]  # fmt: skip
  return (start**2 + np.square(noises).sum()) / average**2


def _toy(order, share, final, average):
  """E of half the sum of h x^2 after a decay over the last `share` of steps."""
  steps = 400
  q = np.linspace(0, 1, steps)
  orders = {'ascend': q[:, None], 'uniform': np.tile(q, (steps, 1))}[order]
  since = np.maximum(np.arange(steps) / steps - (1 - share), 0)
  rates = 0.05 * (1 + (final - 1) * since / share)
  return sum(0.5 * h * _moments(rates, orders, h, average) for h in (0.3, 8.0))


def test_the_recursions_of_the_toy():
  rng = np.random.default_rng(0)
  rates, q = rng.uniform(0.01, 0.2, 30), rng.uniform(0, 1, 30)
  for average in (1, 7, 30):
    np.testing.assert_allclose(
      _moments(rates, q[:, None], 3.0, average),
      _explicit(rates, q, 3.0, average),
      rtol=1e-12,
    )


def test_a_decay_wastes_the_best_data_of_the_toy():
  mean = 60
  cma = _toy('ascend', 0.2, 1.0, mean)
  # A short decay: ascend + constant + mean < ascend + decay < uniform + decay.
  assert cma < _toy('ascend', 0.2, 0.0, 1) < _toy('uniform', 0.2, 0.0, 1)
  # A decay of the whole run, which mutes the best data, turns that around.
  gain = [
    _toy('uniform', 1.0, final, n) - _toy('ascend', 1.0, final, n)
    for final, n in ((1.0, mean), (1 / 3, mean), (0.0, 1))
  ]
  assert gain[0] > 0 > gain[2]
  assert gain[0] > gain[1] > gain[2]


@pytest.mark.slow
def test_a_decay_wastes_what_the_order_saved_for_the_end(tmp_path, monkeypatch):
  """On a corrupted corpus: good sequences last are worth less in a decay.

  Twice: of the last checkpoint and of the mean of the last six (2511.18903).
  """
  for name, value in (
    ('STEPS', 144), ('DECAY', 48), ('EVERY', 16), ('EVALUATED', 128),
    ('FINALS', {'constant': None, 'to 0': 0.0}),
  ):  # fmt: skip
    monkeypatch.setattr(experiment, name, value)
  found = experiment.experiment(tmp_path, 0, ('shuffled', 'tail'), 1e-2)
  for average in ('last', 'SMA6'):
    gain = {
      final: found['shuffled', final, average] - found['tail', final, average]
      for final in experiment.FINALS
    }
    assert gain['constant'] > gain['to 0'] + 0.01, (average, gain)


def test_scores_that_change_places_are_another_run(tmp_path):
  """Sorted scores are the same: the order of the sequences is not."""
  rng = np.random.default_rng(0)
  c = debug.get_config()
  c.seq_len, c.batch_size, c.eval.num_sequences = 10, 4, 1
  for name in 'abv':
    tokens = rng.integers(0, 256, 200).astype(np.uint16)
    tokens.tofile(tmp_path / f'{name}.bin')
  c.data.update({
    'source': 'bin', 'train': f'{tmp_path}/[ab].bin', 'order': 'ascend',
    'eval': f'{tmp_path}/v.bin', 'score': 'file', 'order_end': 3,
  })  # fmt: skip
  found = []
  for scores in ((0.0, 1.0), (1.0, 0.0), (0.0, 2.0)):
    for name, score in zip('ab', scores, strict=True):
      np.save(tmp_path / f'{name}.bin.score.npy', score)
    found.append(data.build(c).fingerprint)
  assert found[0] != found[1] and found[0] == found[2]
