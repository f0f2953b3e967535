"""The progress of a run on terminals of several widths."""

import io
import re
import sys

import pytest

from lm import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize('columns', [60, 80, 100, 120, 200])
def test_no_number_is_cut(monkeypatch, columns):
  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  monkeypatch.setenv('COLUMNS', str(columns))
  monkeypatch.setenv('TERM', 'xterm')
  shown = progress.Progress(0, 20_000)
  text = 'train/loss 1.2345  eval/loss@12000 1.2345  123,456 tokens/s'
  shown.update(12_345, text)
  shown.close()
  last = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', terminal.getvalue())
  for part in ('12345/20000', *text.split('  '), 'eta'):
    # A long text goes on in a second line.
    assert all(word in last for word in part.split()), (columns, last)
  assert '…' not in last
  assert ('━' in last) == (columns >= 100)
