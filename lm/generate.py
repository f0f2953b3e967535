"""Samples tokens from a model, without a cache of keys and values.

Each token is one pass over the last `seq_len` tokens: what a row was trained to
see. Rows are padded on the right, which a causal model does not see.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm import linear
from lm.model import Model


def sample(
  config: ConfigDict,
  model: Model,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  num_tokens: int,
  temperature: float,
  top_k: int = 0,
  seed: int = 0,
) -> Iterator[np.ndarray]:
  """Yields the next token of every prompt, int (B,), `num_tokens` times.

  Args:
    config: of a run, for seq_len and model.logit_softcap.
    model, params: of the run.
    prompts: B rows of tokens, none empty, of any lengths. What a row becomes
      does not depend on the other rows.
    num_tokens: per row.
    temperature: divides the logits; 0 = the most probable token.
    top_k: sample among the k most probable tokens; 0 = all.
    seed: of the random numbers.
  """
  longest = max(len(p) for p in prompts) + num_tokens
  width = min(longest, config.seq_len)
  rows = [list(map(int, p)) for p in prompts]
  key = jax.random.key(seed)

  @jax.jit
  def step(params, tokens_BT, last_B, key, temperature):
    h_BTD = model.hidden(params, tokens_BT)
    h_BD = h_BTD[jnp.arange(len(last_B)), last_B]
    cap = config.model.logit_softcap
    logits_BV = linear.logits(h_BD, model.head(params), softcap=cap)
    return _choose(logits_BV, key, temperature, top_k)

  for i in range(num_tokens):
    tokens_BT = np.zeros((len(rows), width), np.int32)
    last_B = np.empty(len(rows), np.int32)
    for b, row in enumerate(rows):
      seen = row[-width:]
      tokens_BT[b, : len(seen)] = seen
      last_B[b] = len(seen) - 1
    key_i = jax.random.fold_in(key, i)
    new_B = np.asarray(step(params, tokens_BT, last_B, key_i, temperature))
    for row, token in zip(rows, new_B, strict=True):
      row.append(int(token))
    yield new_B


def _choose(logits_BV, key, temperature, top_k):
  best_B = logits_BV.argmax(-1)
  if top_k:
    kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  # A key per row: what is drawn does not depend on the other rows.
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys_B = fold(key, jnp.arange(len(logits_BV)))
  cooled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, cooled_BV)
  return jnp.where(temperature > 0, drawn_B, best_B)
