r"""Turns text into shards of tokens, for --config.data.source=bin.

  python -m launch.prepare_data --input='corpus/**/*.txt' --out=data/corpus
  python -m launch.prepare_data --input=docs.jsonl --out=data/docs \
      --tokenizer=tokenizer.json

A document is a file, or a line of a .jsonl file, its field "text". Without
--tokenizer, byte-pair encoding is trained on what is not in OUT/eval.bin.
Writes OUT/train.bin, and OUT/eval.bin with 5 % of 20 documents or more (by a
hash of their names; of fewer, a run takes the last 5 % of the tokens), each
with a .json that says what is in it, and OUT/tokenizer.json, which
launch.generate takes. Needs `pip install tokenizers`.
"""

import pathlib
import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_INPUT = flags.DEFINE_string('input', '', 'files, as a pattern: * and **')
_OUT = flags.DEFINE_string('out', '', 'a new directory')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', 'a tokenizer.json; empty = train one'
)
_VOCAB_SIZE = flags.DEFINE_integer(
  'vocab_size', 4096, 'of the tokenizer that is trained'
)


def main() -> None:
  if not _INPUT.value or not _OUT.value:
    raise UserError(
      "--input and --out are needed; for example --input='corpus/**/*.txt' "
      '--out=data/corpus.'
    )
  if not 257 <= _VOCAB_SIZE.value <= 10**6:
    raise UserError(
      f'--vocab_size={_VOCAB_SIZE.value} must be from 257, the bytes and the '
      'end of a document, to 1000000.'
    )
  if _TOKENIZER.value and flags.FLAGS['vocab_size'].present:
    raise UserError(
      f"--vocab_size={_VOCAB_SIZE.value} and --tokenizer='{_TOKENIZER.value}' "
      'exclude each other.'
    )
  from configs import quickstart  # what launch.train takes
  from launch.parts import show, tokenizing
  from lm import sources

  tokenizing.check_installed()
  tokenizer = None
  if _TOKENIZER.value:
    tokenizer = tokenizing.load(_TOKENIZER.value)
  paths, out = sources.files('--input', _INPUT.value), pathlib.Path(_OUT.value)
  if (out / 'train.bin').exists():
    raise UserError(f"'{out}/train.bin' exists; use another --out.")
  held = tokenizing.held_out(_INPUT.value, paths)
  if tokenizer is None:
    seen = (d.text for d in tokenizing.documents(paths) if d.name not in held)
    tokenizer = tokenizing.train(seen, _VOCAB_SIZE.value)
  try:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / 'tokenizer.json'))
    shards = tokenizing.write(paths, out, tokenizer, held)
  except OSError as e:
    raise UserError(f"--out='{out}' cannot be written: {e.strerror}.") from e
  show.table(
    ['shard', 'documents', 'tokens', 'bytes', 'bytes per token'],
    [
      [
        s.path, s.documents, f'{s.tokens:,}', f'{s.bytes:,}',
        f'{s.bytes / max(s.tokens, 1):.3f}',
      ]
      for s in shards
    ],
  )  # fmt: skip
  print(f'wrote {out}/tokenizer.json, {shards[0].vocab_size} tokens')
  words = ['--config.data.source=bin']
  for key, shard in zip(('train', 'eval'), shards, strict=False):
    words.append(f'--config.data.{key}={shard.path}')
  words += [f'--config.model.vocab_size={shards[0].vocab_size}']
  config = quickstart.get_config()
  kept = shards[1].tokens if len(shards) > 1 else sources.kept(shards[0].tokens)
  fit = (kept - 1) // config.seq_len
  if 0 < fit < config.eval.num_sequences:
    batch = min(config.eval.batch_size, fit)
    words += [f'--config.eval.num_sequences={fit // batch * batch}']
    words += [f'--config.eval.batch_size={batch}']
  words += [f'--workdir=runs/{out.resolve().name}']
  print(f'Next: python -m launch.train {shlex.join(words)}')


if __name__ == '__main__':
  cli.run(main)
