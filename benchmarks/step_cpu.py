"""Tokens per second of a training step on the CPU, against plain einsums.

  python -m benchmarks.step_cpu [--sizes=tiny,small] [--repetitions=7]

Both forms take the same step (value and gradient, AdamW, donated state) of the
same parameters; the plain one is what a first reading of the paper gives. They
take turns, so that other work on the machine hits both.
"""

import statistics
import time

import jax
import numpy as np
import optax
from absl import app, flags
from jax import numpy as jnp
from rich import table
from rich.console import Console

from configs import base
from lm import loss, model

SIZES = flags.DEFINE_list('sizes', ['tiny', 'small'], 'of configs/sizes.py')
REPETITIONS = flags.DEFINE_integer('repetitions', 7, 'turns of each form')
SECONDS = flags.DEFINE_float('seconds', 3.0, 'of each turn')


def main(_):
  out = table.Table('size', 'form', 'tokens/s (median)', 'min .. max', 'ratio')
  for size in SIZES.value:
    config = base.get_config(f'size={size}')
    rates = compare(config, REPETITIONS.value, SECONDS.value)
    plain = statistics.median(rates['plain'])
    for form, r in rates.items():
      ratios = [a / b for a, b in zip(r, rates['plain'], strict=True)]
      out.add_row(
        size,
        form,
        f'{statistics.median(r):,.0f}',
        f'{min(r):,.0f} .. {max(r):,.0f}',
        f'{statistics.median(r) / plain:.2f} '
        f'({min(ratios):.2f} .. {max(ratios):.2f})',
      )
  Console(width=80).print(out)


def compare(config, repetitions: int, seconds: float) -> dict[str, list[float]]:
  """Returns tokens per second of each turn of each form, turns alternating."""
  built = model.build(config.model)
  shape = config.batch_size, config.seq_len + 1
  tokens_BS = np.random.default_rng(0).integers(256, size=shape, dtype=np.int32)
  losses = {
    'plain': lambda p, t: _plain_loss(config.model, p, t),
    'lm': lambda p, t: loss.next_token(built, p, t).loss,
  }
  runs = {}
  for form, function in losses.items():
    params = jax.jit(built.init)(jax.random.key(0))
    state = params, optax.adamw(1e-3).init(params)
    step = jax.jit(_step(function), donate_argnums=0)
    state, first = step(state, tokens_BS)
    runs[form] = [step, state, float(first)]
  values = [run[2] for run in runs.values()]
  np.testing.assert_allclose(values[0], values[1], rtol=1e-4)
  rates = {form: [] for form in runs}
  for _ in range(repetitions):
    for form, run in runs.items():
      steps, begin = 0, time.perf_counter()
      while time.perf_counter() - begin < seconds:
        run[1], value = run[0](run[1], tokens_BS)
        value.block_until_ready()
        steps += 1
      tokens = steps * config.batch_size * config.seq_len
      rates[form].append(tokens / (time.perf_counter() - begin))
  return rates


def _step(function):
  def step(state, tokens_BS):
    params, moments = state
    value, grads = jax.value_and_grad(function)(params, tokens_BS)
    updates, moments = optax.adamw(1e-3).update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  return step


def _plain_loss(c, params, tokens_BS):
  x = params['embedding'][tokens_BS[:, :-1]]
  for i in range(c.num_layers):
    x = _plain_block(c, params[f'block_{i}'], x)
  logits = _plain_norm(x, params['final_norm'], c.norm_eps) @ params['head']
  nll = optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens_BS[:, 1:]
  )
  return nll.mean()


def _plain_block(c, p, x):
  h = _plain_norm(x, p['attn_norm'], c.norm_eps)
  q, k, v = (jnp.einsum('btd,dhk->bthk', h, p['attn'][n]) for n in 'qkv')
  q, k = _plain_rope(q, c.rope_theta), _plain_rope(k, c.rope_theta)
  scores = jnp.einsum('bthk,bshk->bhts', q, k) / c.head_dim**0.5
  mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
  o = jnp.einsum('bhts,bshk->bthk', weights, v)
  x = x + jnp.einsum('bthk,hkd->btd', o, p['attn']['o'])
  h = _plain_norm(x, p['mlp_norm'], c.norm_eps)
  gate, up, down = p['mlp']['gate'], p['mlp']['up'], p['mlp']['down']
  return x + (jax.nn.silu(h @ gate) * (h @ up)) @ down


def _plain_norm(x, scale, eps):
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * scale


def _plain_rope(x, theta):
  half = x.shape[-1] // 2
  angle = jnp.arange(x.shape[1])[:, None] / theta ** (jnp.arange(half) / half)
  cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


if __name__ == '__main__':
  app.run(main)
