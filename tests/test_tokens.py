"""Streams of tokens: reading across files, and the hash of their content."""

import hashlib

import hypothesis
import hypothesis.strategies as st
import numpy as np

from lm import tokens


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
  sizes=st.lists(st.integers(0, 5), min_size=1, max_size=8), cut=st.data()
)
def test_stream_reads_like_one_array(sizes, cut):
  hypothesis.assume(sum(sizes))
  whole = np.arange(sum(sizes), dtype=np.uint16)
  stream = tokens.Stream(np.split(whole, np.cumsum(sizes)[:-1]))
  a = cut.draw(st.integers(0, len(whole) - 1))
  b = cut.draw(st.integers(a + 1, len(whole)))
  np.testing.assert_array_equal(stream.read(a, b), whole[a:b])
  part = stream.part(a, b)
  assert len(part) == b - a and part.max() == b - 1
  np.testing.assert_array_equal(part.read(0, b - a), whole[a:b])
  assert all(p.base is not None for p in stream.pieces(a, b))


def test_fingerprint_sees_content_and_split_but_not_files():
  def mark(*parts):
    return tokens.fingerprint([tokens.Stream(p) for p in parts])

  x = np.arange(3000, dtype='<u2')
  expected = hashlib.sha256(
    b'2000 4000;' + x[:2000].tobytes() + b'1000 2000;' + x[2000:].tobytes()
  )
  assert mark([x[:2000]], [x[2000:]]) == expected.hexdigest()[:16]
  assert mark([x[:7], x[7:2000]], [x[2000:]]) == expected.hexdigest()[:16]
  assert mark([x[:2001]], [x[2001:]]) != mark([x[:2000]], [x[2000:]])
  y = np.where(np.arange(3000) == 1500, 7, x).astype('<u2')
  assert mark([y[:2000]], [y[2000:]]) != mark([x[:2000]], [x[2000:]])


def test_fingerprint_of_a_large_corpus_is_of_samples(monkeypatch):
  monkeypatch.setattr(tokens, 'WHOLE', 1000)
  x = np.zeros(2**23, '<u2')

  def mark(array):
    return tokens.fingerprint([tokens.Stream([array[:99], array[99:]])])

  first = mark(x)
  for at, seen in ((0, True), (2**23 - 1, True), (20_000, False)):
    x[at] = 1
    assert (mark(x) != first) == seen
    x[at] = 0
  assert mark(x[:-1]) != first
