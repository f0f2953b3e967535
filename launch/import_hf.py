r"""Makes a run directory of a Llama or Qwen3 model of Hugging Face.

  python -m launch.import_hf --from=exports/a --workdir=runs/imported
  python -m launch.train --config=runs/imported/config.json \
      --config.init=runs/imported --workdir=runs/tuned

It has a config.json (the model's knobs; the others are the defaults) and the
checkpoint 0, which launch.evaluate, merge, generate and --config.init read.
"""

import pathlib
import shlex

from absl import flags

from launch import cli
from lm.errors import UserError

_FROM = flags.DEFINE_string(
  'from', '', 'a directory with config.json and safetensors files'
)
_WORKDIR = flags.DEFINE_string('workdir', '', 'a new run directory')
_MOST = 1024  # tokens per sequence, unless the model takes fewer


def main() -> None:
  for flag in (_FROM, _WORKDIR):
    if not flag.value:
      raise UserError(
        f'--{flag.name} is missing; for example --from=exports/a '
        '--workdir=runs/imported.'
      )
  from lm import hugging_face, hugging_face_files
  from merging.engine import atomic

  folder = pathlib.Path(_FROM.value)
  theirs, tensors = hugging_face_files.read(folder)
  config = _config(theirs)
  if not hugging_face_files.has_byte_tokenizer(folder):
    config.data.source = 'bin'
  params = hugging_face.from_tensors(config, tensors)
  with cli.user_errors(), atomic.directory(_WORKDIR.value) as run:
    _write(run, config, params)
  number = sum(x.size for x in tensors.values())
  print(f'wrote {_WORKDIR.value}: {number:,} parameters of {folder}')
  out = _WORKDIR.value.rstrip('/')
  given = f'--config={out}/config.json', f'--config.init={out}'
  command = ['python', '-m', 'launch.train', *given, f'--workdir={out}-tuned']
  print(f'Next: {shlex.join(command)}')


def _config(theirs):
  from configs import base
  from lm import hugging_face

  config = base.get_config()
  with config.unlocked():
    config.model.update(hugging_face.from_config(theirs))
  most = theirs.get('max_position_embeddings', _MOST)
  hugging_face.check_size('max_position_embeddings', most)
  config.seq_len = min(most, _MOST)
  return config


def _write(run, config, params):
  import jax
  import jax.numpy as jnp

  from lm import card, checkpoint, log
  from lm.state import TrainState

  log.write_json(run / 'config.json', card.as_dict(config))
  log.write_json(run / 'meta.json', {'status': 'imported', 'step': 0})
  zero = jnp.zeros((), jnp.int32)
  params = jax.tree.map(jnp.asarray, params)
  state = TrainState(zero, params, (), (), zero, zero)
  checkpoints = checkpoint.Checkpoints(run)
  if not checkpoints.save(state, 0, {'step': 0, 'mean_start': 0}):
    raise UserError('the model has values that are not finite.')
  checkpoints.close()


if __name__ == '__main__':
  cli.run(main)
