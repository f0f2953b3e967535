"""launch.prepare_data: shards decode to the text; splits, mistakes."""

import json

import numpy as np
import pytest

from launch.parts import tokenizing
from lm import sources, tokens
from lm.run import Run
from tests import helpers, tools

tokenizers = pytest.importorskip('tokenizers')


@pytest.fixture
def corpus(tmp_path):
  """25 files of words, numbers and characters of several bytes."""
  rng = np.random.default_rng(0)
  words = ['the', 'loss', 'decays', 'naïve', '学習', '\n', '12', ' ']
  texts = {}
  for i in range(25):
    folder = tmp_path / 'corpus' / str(i % 3)
    folder.mkdir(parents=True, exist_ok=True)
    text = ' '.join(rng.choice(words, 300 + i))
    (folder / f'{i}.txt').write_text(text)
    texts[f'{i % 3}/{i}.txt'] = text
  return dict(sorted(texts.items()))


def _decoded(out, name):
  """The documents of a shard."""
  tokenizer = tokenizers.Tokenizer.from_file(str(out / 'tokenizer.json'))
  shard = tokens.open_shard(str(out / f'{name}.bin'))
  text = tokenizer.decode(shard.tokens.tolist(), skip_special_tokens=False)
  assert shard.vocab_size == tokenizer.get_vocab_size()
  found = text.split(tokenizing.END)
  assert found.pop() == '' and shard.num_bytes == len(''.join(found).encode())
  return found


def test_shards_are_the_text_and_a_run_reads_them(
  corpus, tmp_path, monkeypatch, capsys
):
  pattern, out = f'{tmp_path}/corpus/**/*.txt', tmp_path / 'out'
  words = f'--input={pattern}', f'--out={out}', '--vocab_size=300'
  assert tools.call(monkeypatch, 'prepare_data', *words) == 0
  said = capsys.readouterr().out
  train, held = sources.split_by_hash([*corpus])
  assert held
  texts = [*corpus.values()]
  assert _decoded(out, 'train') == [texts[i] for i in train]
  assert _decoded(out, 'eval') == [texts[i] for i in held]
  # The command that it prints trains; the sampled text is text.
  (following,) = (x for x in said.splitlines() if x.startswith('Next: '))
  given = [x for x in following.split() if x.startswith('--config.')]
  fit = (tokens.open_shard(str(out / 'eval.bin')).tokens.size - 1) // 128
  sizes = [f'--config.eval.{x}={fit}' for x in ('num_sequences', 'batch_size')]
  assert 0 < fit < 32 and given[-2:] == sizes
  done = helpers.command(
    'launch.train', '--config=configs/debug.py', *given,
    f'--workdir={tmp_path}/run', '--config.num_steps=4',
    '--config.eval.num_sequences=8', '--config.seq_len=32',
  )  # fmt: skip
  assert 'done' in done.stdout
  ratio = Run(tmp_path / 'run').data.bytes_per_token
  shard = tokens.open_shard(str(out / 'eval.bin'))
  assert ratio == pytest.approx(shard.num_bytes / shard.tokens.size)
  words = f'--at={tmp_path}/run', '--num_tokens=5', '--prompt=学習 the'
  assert not tools.call(
    monkeypatch, 'generate', *words, f'--tokenizer={out}/tokenizer.json'
  )
  assert capsys.readouterr().out.startswith('学習 the')
  # Of few documents, the last tokens are kept.
  few = f'--input={tmp_path}/corpus/0/*.txt', f'--out={tmp_path}/few'
  assert tools.call(monkeypatch, 'prepare_data', *few, '--vocab_size=300') == 0
  size = tokens.open_shard(f'{tmp_path}/few/train.bin').tokens.size
  said = capsys.readouterr().out
  fit = (int(size * 0.05) - 1) // 128
  assert fit and f'--config.eval.num_sequences={fit} ' in said
  assert said.endswith('--workdir=runs/few\n')
  again = f'--input={out}/*.json', f'--out={out}'
  assert tools.call(monkeypatch, 'prepare_data', *again) == 2
  assert "train.bin' exists" in capsys.readouterr().err


def test_lines_of_json_and_a_given_tokenizer(tmp_path, monkeypatch):
  """Few documents: no validation shard. No END: nothing between them."""
  texts = ['a b', 'naïve\n', '', 'the end']
  lines = [json.dumps({'text': x, 'more': 1}) for x in texts]
  (tmp_path / 'x.jsonl').write_text('\n'.join(lines) + '\n')
  model = tokenizers.models.BPE(unk_token=None)
  given = tokenizers.Tokenizer(model)
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  given.pre_tokenizer, given.decoder = level, tokenizers.decoders.ByteLevel()
  given.train_from_iterator(
    [], tokenizers.trainers.BpeTrainer(initial_alphabet=level.alphabet())
  )
  given.save(str(tmp_path / 'given.json'))
  words = f'--input={tmp_path}/x.jsonl', f'--out={tmp_path}/out'
  words += (f'--tokenizer={tmp_path}/given.json',)
  assert tools.call(monkeypatch, 'prepare_data', *words) == 0
  assert not (tmp_path / 'out' / 'eval.bin').exists()
  shard = tokens.open_shard(str(tmp_path / 'out' / 'train.bin'))
  assert given.decode(shard.tokens.tolist()) == ''.join(texts)


def test_long_texts_are_cut_and_lose_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizing, '_PIECE', 40)
  monkeypatch.setattr(tokenizing, '_BATCH', 3)
  text = '\n'.join('word' * (i % 15) for i in range(200))
  assert ''.join(tokenizing._pieces(text)) == text
  assert max(map(len, tokenizing._pieces(text))) <= 40
  (tmp_path / 'x.txt').write_text(text)
  words = f'--input={tmp_path}/x.txt', f'--out={tmp_path}/out'
  assert tools.call(monkeypatch, 'prepare_data', *words) == 0
  assert _decoded(tmp_path / 'out', 'train') == [text]


def test_many_tokens_are_wide(tmp_path, monkeypatch):
  class Wide:
    get_vocab = lambda self: {'a': 1, 'z': 69_999}  # with holes
    token_to_id = lambda self, word: None

    def encode_batch(self, texts, add_special_tokens):
      assert not add_special_tokens
      ids = type('Encoding', (), {'ids': [65_999, 1]})
      return [ids for _ in texts]

  shard = tokenizing.Shard(tmp_path / 'x.bin', Wide())
  shard.add('ab')
  shard.close()
  found = tokens.open_shard(str(tmp_path / 'x.bin'))
  assert found.tokens.tolist() == [65_999, 1]
  assert (found.vocab_size, found.num_bytes) == (70_000, 2)


@pytest.mark.parametrize(
  ('words', 'sentence'),
  [
    ([], '--input and --out are needed'),
    (['--input={tmp}/no*', '--out={tmp}/o'], 'matches no file'),
    (['--input={tmp}/a.txt', '--out={tmp}/o', '--vocab_size=9'], 'from 257'),
    (['--input={tmp}/b.bin', '--out={tmp}/o'], "b.bin' is not UTF-8"),
    (
      ['--input={tmp}/c.jsonl', '--out={tmp}/o'],
      "c.jsonl', line 2: not a JSON",
    ),
    (['--input={tmp}/d.jsonl', '--out={tmp}/o'], 'line 1: not a JSON object'),
    (['--input={tmp}/a.txt', '--out={tmp}/a.txt'], 'cannot be written'),
    (
      ['--input=a', '--out=o', '--tokenizer=t', '--vocab_size=300'],
      "--vocab_size=300 and --tokenizer='t' exclude each other",
    ),
    (
      ['--input={tmp}/a.txt', '--out={tmp}/o', '--tokenizer={tmp}/no'],
      "no' does not exist",
    ),
    (
      ['--input={tmp}/a.txt', '--out={tmp}/o', '--tokenizer={tmp}/a.txt'],
      "a.txt' is no tokenizer.json",
    ),
  ],
)
def test_mistakes(words, sentence, tmp_path, monkeypatch, capsys):
  (tmp_path / 'a.txt').write_text('some text')
  (tmp_path / 'b.bin').write_bytes(b'\xff\xfe\xff')
  (tmp_path / 'c.jsonl').write_text('{"text": "a"}\n{"text": 3}\n')
  (tmp_path / 'd.jsonl').write_text('[1]\n')
  words = [w.format(tmp=tmp_path) for w in words]
  assert tools.call(monkeypatch, 'prepare_data', *words) == 2
  error = capsys.readouterr().err
  assert sentence in error and error.count('\n') == 1
  assert not (tmp_path / 'o' / 'train.bin').exists()
