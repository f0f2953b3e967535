"""What makes methods unequal beside themselves (not a command)."""

import hashlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from lm import branch, card, data

# Fields that decide on which tokens a loss is measured.
_MEASURED = ('data.', 'seq_len', 'eval.num_sequences', 'model.vocab_size')


def validations(configs: Sequence[ConfigDict]) -> list[str]:
  """Returns a name of the validation tokens of each config: one per set."""
  named = {}
  for config in configs:
    named.setdefault(_key(config), config)
  if len(named) == 1:  # saves reading the data
    return [''] * len(configs)
  found = {key: _digest(config) for key, config in named.items()}
  return [found[_key(config)] for config in configs]


def _key(c):
  text = c.data.to_json(sort_keys=True)
  return text, c.seq_len, c.eval.num_sequences, c.model.vocab_size


def _digest(config):
  tokens = data.build(config).eval_tokens_ES
  return hashlib.sha256(
    repr(tokens.shape).encode() + tokens.tobytes()
  ).hexdigest()


def notes(
  names: Sequence[str], configs: Sequence[ConfigDict], sets: Sequence[str]
) -> list[str]:
  """Returns a sentence for all that sets runs apart from the first of them.

  `sets` are the `validations` of the configs.
  """
  first = card.as_dict(configs[0])
  found: dict[str, list[str]] = {}
  for name, config, measured in zip(names, configs, sets, strict=True):
    this = card.as_dict(config)
    changed = card.diff(first, this)
    told = lambda prefix, changed=changed: ', '.join(
      f'{k}={new}, not {old}'
      for k, (old, new) in changed.items()
      if k.startswith(prefix)
    )
    if measured != sets[0]:
      what = f'measured on other tokens ({told(_MEASURED)}): not comparable'
      found.setdefault(what, []).append(name)
    at = [branch.tokens(c, c.num_steps) for c in (config, configs[0])]
    ratio = at[0] / at[1]
    if ratio != 1:
      what = f'trained on {ratio:.3g} times the tokens'
      found.setdefault(what, []).append(name)
    if card.of_model(this) != card.of_model(first):
      what = f'another model ({told("model.")})'
      found.setdefault(what, []).append(name)
  return [
    f'NOT EQUAL to {names[0]}: {_some(few)}: {what}.'
    for what, few in found.items()
  ]


def _some(names):
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more
