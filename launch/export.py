r"""Writes a checkpoint or a merge in the layout of Hugging Face transformers.

  python -m launch.export --at=runs/a@1000 --out=exports/a
  python -m launch.export --at=runs/a/merged/linear --out=exports/linear

A Llama model, or Qwen3 with model.qk_norm: config.json, model.safetensors, and
the files of a tokenizer: that of bytes, or for a run on token shards that of
--tokenizer, or the tokenizer.json beside them. launch.import_hf is the way
back.
"""

import pathlib
import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_AT = flags.DEFINE_string('at', '', 'RUN, RUN@STEP or RUN/merged/NAME')
_TO = flags.DEFINE_enum('to', 'hf', ['hf'], 'the layout')
_OUT = flags.DEFINE_string('out', '', 'a new directory')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'of the tensors'
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', 'a tokenizer.json, of a run on token shards'
)


def main() -> None:
  for flag in (_AT, _OUT):
    if not flag.value:
      raise UserError(
        f'--{flag.name} is missing; for example --at=runs/a --out=exports/a.'
      )
  from lm import address, hugging_face_files, sources
  from lm import hugging_face as hf
  from lm.run import Run
  from merging.engine import atomic

  hugging_face_files.safetensors()  # a missing package comes first
  ref = address.in_run(_AT.value)
  run = Run(ref.run)
  config = hf.to_config(run.config, dtype=_DTYPE.value)
  tokenizer = _tokenizer(run.config)
  with cli.user_errors(), atomic.directory(_OUT.value) as folder:
    params = run.params(ref.at)
    tensors = hf.to_tensors(params, dtype=_DTYPE.value)
    hugging_face_files.write(folder, config, tensors)
    if sources.is_bytes(run.config):
      hugging_face_files.write_byte_tokenizer(folder, run.config.seq_len)
    elif tokenizer:
      hugging_face_files.copy_tokenizer(
        folder, tokenizer, run.config.seq_len, run.config.model.vocab_size
      )
    wrote = sorted(p.name for p in folder.iterdir())
  number = sum(x.size for x in tensors.values())
  print(
    f'wrote {", ".join(wrote)} to {_OUT.value}: {config["architectures"][0]}, '
    f'{number:,} parameters, {_DTYPE.value}'
  )
  if not (tokenizer or sources.is_bytes(run.config)):
    print(
      'There is no tokenizer.json beside the token shards; --tokenizer names '
      'it, or copy its files there.'
    )
  out = pathlib.Path(_OUT.value)
  given = f'--from={out}', f'--workdir=runs/{out.name}-imported'
  print(f'Next: {shlex.join(["python", "-m", "launch.import_hf", *given])}')


def _tokenizer(config) -> str:
  """Returns the tokenizer.json of a run on token shards; '' if unknown."""
  from lm import sources

  if sources.is_bytes(config):
    if _TOKENIZER.value:
      raise UserError(
        f"--tokenizer='{_TOKENIZER.value}' is for runs on token shards; this "
        'one is on bytes.'
      )
    return ''
  if _TOKENIZER.value:
    return _TOKENIZER.value
  beside = pathlib.Path(sources.fixed_part(config.data.train), 'tokenizer.json')
  return str(beside) if beside.is_file() else ''


if __name__ == '__main__':
  cli.run(main)
