"""Tokens per second of a training step on the CPU, against plain einsums.

  python -m benchmarks.step_cpu [--sizes=tiny,small] [--repetitions=7]

All forms take the same step (value and gradient, AdamW, donated state) of the
same parameters. `plain` is what a first reading of the papers gives; `lm` is
ours; `slices` take the batch a few sequences at a time, as grad_accum_steps
does: then the activations fit into the caches. The forms take turns, so that
other work on the machine hits all; CPU time hardly sees it.
"""

import statistics
import time

import jax
import numpy as np
import optax
from absl import flags
from jax import numpy as jnp
from ml_collections import ConfigDict
from rich import table
from rich.console import Console

from benchmarks import results
from configs import base
from launch import cli
from lm import loss, model

SIZES = flags.DEFINE_list('sizes', ['tiny', 'small'], 'of configs/sizes.py')
REPETITIONS = flags.DEFINE_integer('repetitions', 7, 'turns of each form', 1)
SECONDS = flags.DEFINE_float('seconds', 3.0, 'of each turn', 0.01)


TOKENS = flags.DEFINE_integer('slice_tokens', 1024, 'tokens per slice', 1)


@results.entry('training steps on the CPU')
def main() -> None:
  columns = 'tokens/s: median', 'min .. max', 'ratio', 'CPU s/step'
  out = table.Table('size', 'form', *columns)
  for size in SIZES.value:
    config = base.get_config(f'size={size}')
    turns = compare(config, REPETITIONS.value, SECONDS.value)
    for form, pairs in turns.items():
      rates, cpu = zip(*pairs, strict=True)
      ratios = [r / p[0] for r, p in zip(rates, turns['plain'], strict=True)]
      out.add_row(
        size,
        form,
        f'{statistics.median(rates):,.0f}',
        f'{min(rates):,.0f} .. {max(rates):,.0f}',
        results.spread(ratios),
        f'{statistics.median(cpu):.2f}',
      )
  Console().print(out)


def compare(
  config: ConfigDict, repetitions: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
  """Returns (tokens per second, CPU seconds per step) of each turn."""
  net = model.build(config.model)
  slices = max(1, config.batch_size * config.seq_len // TOKENS.value)
  while config.batch_size % slices:
    slices -= 1
  plain = lambda p, t: _plain_loss(config.model, p, t)
  ours = lambda p, t: loss.next_token(net, p, t).loss
  forms = {
    'plain': (plain, 1),
    'plain, slices': (plain, slices),
    'lm': (ours, 1),
    'lm, slices': (ours, slices),
  }
  shape = config.batch_size, config.seq_len + 1
  tokens_BS = np.random.default_rng(0).integers(256, size=shape, dtype=np.int32)
  runs, first = {}, []
  for form, arguments in forms.items():
    params = net.init(jax.random.key(0))
    state = params, optax.adamw(1e-3).init(params)
    step = jax.jit(_step(*arguments), donate_argnums=0)
    state, value = step(state, tokens_BS)
    runs[form] = step, state
    first.append(float(value))
  np.testing.assert_allclose(first, first[0], rtol=1e-5)
  turns = {form: [] for form in runs}
  for _ in range(repetitions):
    for form, (step, state) in runs.items():
      state, rate, cpu = _turn(step, state, tokens_BS, seconds)
      runs[form] = step, state
      turns[form].append((rate, cpu))
  return turns


def _turn(step, state, tokens_BS, seconds):
  steps, begin, cpu = 0, time.perf_counter(), time.process_time()
  while time.perf_counter() - begin < seconds:
    state, value = step(state, tokens_BS)
    value.block_until_ready()
    steps += 1
  wall = time.perf_counter() - begin
  tokens = steps * tokens_BS[:, 1:].size
  return state, tokens / wall, (time.process_time() - cpu) / steps


def _step(function, slices):
  def step(state, tokens_BS):
    params, moments = state
    value, grads = _gradient(function, params, tokens_BS, slices)
    updates, moments = optax.adamw(1e-3).update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  return step


def _gradient(function, params, tokens_BS, slices):
  gradient = jax.value_and_grad(function)
  if slices == 1:
    return gradient(params, tokens_BS)

  def add(total, tokens):
    return jax.tree.map(jnp.add, total, gradient(params, tokens)), None

  zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
  tokens = tokens_BS.reshape(slices, -1, tokens_BS.shape[-1])
  total, _ = jax.lax.scan(add, zero, tokens)
  return jax.tree.map(lambda x: x / slices, total)


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
  cli.run(main)
