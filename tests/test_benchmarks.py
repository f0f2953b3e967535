"""Benchmarks run and print a row; their numbers are no concern of a test."""

import re
import shlex

import pytest

from tests import tools

# A command, and a line that it prints; N is a number.
COMMANDS = {
  'loop --sizes=debug --num_steps=4 --turns=1 --save_every=2':
    '| debug | 256 | N (N .. N) | N (N .. N) | N (N .. N) |',
  'share --size=debug --only=lion --turns=2 --updates=1':
    '| lion | N (N .. N) | N (N .. N) | N (N .. N) | N% | N% |',
  'optimizer_table --only=lion --size=debug --num_steps=20 --rates=.01 '
  '--turns=1 --batch_size=8': '| lion | N | N (above!) | N | N | N |',
  'optimizers --size=debug --only=adamw --repeats=1 --together=1':
    '| adamw | N | N (N .. N) |',
}  # fmt: skip


@pytest.mark.parametrize('command', COMMANDS)
def test_a_row(command, monkeypatch, capsys):
  name, *flags = shlex.split(command)
  assert tools.call(monkeypatch, name, *flags, package='benchmarks') == 0
  printed = capsys.readouterr().out
  row = re.escape(COMMANDS[command]).replace('N', r'[\d.,]+')
  assert re.search(row.replace(r'\ ', ' +'), printed), printed
