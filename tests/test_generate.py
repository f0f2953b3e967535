"""Sampling: the arg max of `apply`, whatever the batch; seeds; commands."""

import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import address, card, checkpoint, generate, log, state
from lm import model as model_lib
from lm import run as run_lib
from tests import helpers, tools

PROMPTS = [[1, 2, 3], [200], [7, 8, 9, 10, 11, 12, 13, 14, 15]]


@pytest.fixture(scope='module')
def net():
  config = helpers.config(seq_len=12, model__logit_softcap=5.0)
  config.model.init_std = 0.5  # far from equal logits
  model = model_lib.build(config.model)
  return config, model, model.init(jax.random.key(0))


def _sample(net, prompts, num_tokens=10, **options):
  drawn = generate.sample(*net, prompts, num_tokens=num_tokens, **options)
  return np.stack(list(drawn), 1)


def test_greedy_is_the_arg_max_of_apply(net):
  """Also past seq_len, for rows of one batch and for each row alone."""
  config, model, params = net
  width = config.seq_len
  best = jax.jit(lambda tokens_1T: model.apply(params, tokens_1T)[0].argmax(-1))
  together_BN = _sample(net, PROMPTS, 12, temperature=0.0)
  for prompt, found in zip(PROMPTS, together_BN, strict=True):
    row, n = [*prompt, *found], len(prompt)
    # What every token that has at most `width` before it should be.
    first = best(np.array([row[:width]]))[n - 1 :]
    np.testing.assert_array_equal(found[: len(first)], first)
    for i in range(n + len(first), len(row)):
      assert row[i] == best(np.array([row[i - width : i]]))[-1]
  alone_BN = [_sample(net, [p], 12, temperature=0.0)[0] for p in PROMPTS]
  np.testing.assert_array_equal(alone_BN, together_BN)
  assert len({tuple(row) for row in together_BN}) == 3


def test_seeds(net):
  a, b, c = (_sample(net, PROMPTS, temperature=1.0, seed=s) for s in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
  np.testing.assert_array_equal(
    a[:1], _sample(net, PROMPTS[:1], temperature=1.0)
  )


def test_frequencies_are_the_softmax(net):
  """4,096 equal rows: temperature, soft cap and top_k, within 5 sigma."""
  config, model, params = net
  rows = 4096
  drawn = _sample(net, [[5]] * rows, 1, temperature=2.0, top_k=3)[:, 0]
  logits = np.float64(model.apply(params, np.array([[5]]))[0, 0])
  top = np.argsort(logits)[-3:]
  p = np.exp((logits[top] - logits[top].max()) / 2)
  p /= p.sum()
  found = np.array([(drawn == t).mean() for t in top])
  assert found.sum() == 1
  assert (np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / rows)).all()


@pytest.fixture
def run(net, tmp_path):
  config, _, params = net
  log.write_json(tmp_path / 'config.json', card.as_dict(config))
  zero = jnp.zeros((), jnp.int32)
  full = state.TrainState(zero, params, (), (), zero, zero)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(full, 0, {'step': 0, 'mean_start': 0})
  checkpoints.close()
  return tmp_path


def test_the_command(run, net, monkeypatch, capsys):
  call = lambda *a: tools.call(monkeypatch, 'generate', f'--at={run}', *a)
  assert call('--prompt=é', '--num_tokens=9', '--temperature=0') == 0
  want = _sample(net, [list('é'.encode())], 9, temperature=0.0)[0]
  text = bytes(want.tolist()).decode(errors='replace')
  assert capsys.readouterr().out == f'é{text}\n'
  assert call('--prompt=\udcff', '--num_tokens=1') == 0  # a byte alone
  assert capsys.readouterr().out.startswith('\ufffd')
  bare = run / 'merged' / 'x'
  shutil.copytree(run / 'checkpoints' / '0' / 'params', bare)
  (bare / 'merge.json').write_text('{}')
  assert address.in_run(str(bare)).at == 'x'
  assert run_lib.Run(run).params(address.in_run(str(bare)).at)
  for bad, sentence in (
    ('--prompt=', '--prompt is empty'),
    ('--top_k=257', '--top_k=257 must be from 0 to 256'),
    ('--temperature=-1', '--temperature=-1.0 must be from 0'),
    ('--temperature=x', 'error: --temperature=x must be a number.'),
    ('--seed=x', 'error: --seed=x must be an integer.'),
    ('--num_tokens=0', '--num_tokens=0: 0 is not an integer in'),
  ):
    assert call(bad) == 2
    assert sentence in capsys.readouterr().err


def test_a_terminal_gets_no_control_characters(run, monkeypatch, capsys):
  call = lambda: tools.call(
    monkeypatch,
    'generate',
    f'--at={run}',
    '--num_tokens=1',
    '--prompt=\x1b[2Jé\t',
  )
  assert call() == 0
  assert capsys.readouterr().out.startswith('\x1b[2Jé\t')
  monkeypatch.setattr(type(sys.stdout), 'isatty', lambda _: True)
  assert call() == 0
  assert capsys.readouterr().out.startswith('\\x1b[2Jé\t')


def test_tokens_of_shards_are_numbers(run, net, monkeypatch, capsys):
  config = log.read_json(run / 'config.json')
  config['data']['source'] = 'bin'
  log.write_json(run / 'config.json', config)
  call = lambda *a: tools.call(monkeypatch, 'generate', f'--at={run}', *a)
  assert call('--prompt=1 2,3', '--num_tokens=4', '--temperature=0') == 0
  want = _sample(net, [[1, 2, 3]], 4, temperature=0.0)[0]
  numbers = ' '.join(map(str, want))
  assert capsys.readouterr().out == f'1 2,3 {numbers}\n'
  assert call('--prompt=1 x') == 2
  assert "'x' is not a token" in capsys.readouterr().err
