r"""Samples text from a checkpoint or a merge.

  python -m launch.generate --at=runs/a --prompt='def ' --num_tokens=200
  python -m launch.generate --at=runs/a/merged/linear --temperature=0

Of a run on token shards (data.source='bin') the prompt and the text are the
numbers of tokens, or text with --tokenizer, as launch.prepare_data writes it:

  python -m launch.generate --at=runs/b --tokenizer=data/corpus/tokenizer.json

Each token sees the seq_len tokens before it.
"""

import codecs
import os
import sys

from absl import flags

from launch import cli
from lm.errors import UserError

_AT = flags.DEFINE_string('at', '', 'RUN, RUN@STEP or RUN/merged/NAME')
_PROMPT = flags.DEFINE_string('prompt', '\n', 'text, or numbers of tokens')
_NUM_TOKENS = flags.DEFINE_integer('num_tokens', 200, 'to sample', 1, 10**9)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.8, 'divides the logits; 0 = the most probable token'
)
_TOP_K = flags.DEFINE_integer(
  'top_k', 0, 'only the k most probable tokens; 0 = all'
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', 'a tokenizer.json, of a run on token shards'
)
_SEED = flags.DEFINE_integer('seed', 0, 'of the random numbers', 0, 2**32 - 1)


def main() -> None:
  if not _AT.value:
    raise UserError('--at is missing; for example --at=runs/a@1000.')
  temperature = _TEMPERATURE.value
  if not 0 <= temperature <= 1e6:  # absl's bounds let NaN pass
    raise UserError(f'--temperature={temperature} must be from 0 to 1e6.')
  from lm import address, generate, sources
  from lm.run import Run

  ref = address.in_run(_AT.value)
  run = Run(ref.run)
  config = run.config
  if not 0 <= _TOP_K.value <= config.model.vocab_size:
    raise UserError(
      f'--top_k={_TOP_K.value} must be from 0 to {config.model.vocab_size}.'
    )
  if _TOKENIZER.value:
    prompt, show = _tokenized(config)
  elif sources.is_bytes(config):
    prompt, show = list(os.fsencode(_PROMPT.value)), _text()
  else:
    prompt, show = _numbers(config.model.vocab_size), lambda token: f' {token}'
  if not prompt:
    raise UserError('--prompt is empty; one token at least is needed.')
  params = run.params(ref.at)
  seen = _harmless if sys.stdout.isatty() else str
  text = os.fsencode(_PROMPT.value).decode(errors='replace')
  print(seen(text), end='', flush=True)
  for (token,) in generate.sample(
    config,
    run.model,
    params,
    [prompt],
    num_tokens=_NUM_TOKENS.value,
    temperature=temperature,
    top_k=_TOP_K.value,
    seed=_SEED.value,
  ):
    print(seen(show(token)), end='', flush=True)
  print()


def _harmless(text):
  """Escapes what a terminal would obey; a model may sample any byte."""
  legal = lambda c: c.isprintable() or c in '\n\t'
  return ''.join(c if legal(c) else ascii(c)[1:-1] for c in text)


def _tokenized(config):
  """The prompt, and a function of a token: the text that it completes."""
  from launch.parts import tokenizing

  tokenizer = tokenizing.load(_TOKENIZER.value)
  size = tokenizing.vocab_size(tokenizer)
  if size > config.model.vocab_size:
    raise UserError(
      f"--tokenizer='{_TOKENIZER.value}' has {size} tokens, the model "
      f'{config.model.vocab_size}.'
    )
  prompt = tokenizer.encode(_PROMPT.value, add_special_tokens=False).ids
  tokens = list(prompt)
  shown = [tokenizer.decode(tokens, skip_special_tokens=False)]

  def show(token):
    tokens.append(int(token))
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    if text.endswith('\ufffd'):  # part of a character
      return ''
    new, shown[0] = text[len(shown[0]) :], text
    return new

  return prompt, show


def _text():
  """Returns a function of a byte: the text that it completes, if any."""
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  return lambda token: (
    decoder.decode(bytes([token])) if token < 256 else '\ufffd'
  )


def _numbers(vocab_size):
  words = _PROMPT.value.replace(',', ' ').split()
  for word in words:
    if not word.isdecimal() or int(word) >= vocab_size:
      raise UserError(
        f"--prompt: '{word}' is not a token; data.source='bin' needs numbers "
        f'from 0 to {vocab_size - 1}.'
      )
  return [int(word) for word in words]


if __name__ == '__main__':
  cli.run(main)
