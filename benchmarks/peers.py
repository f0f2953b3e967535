r"""Training steps on this machine beside nanodo and nanoGPT.

  python -m benchmarks.peers --peer_dir=PEERS [--sizes=tiny,small]
  python -m benchmarks.peers --peer_dir=PEERS --sizes=124m --batch_size=16

PEERS has checkouts `nanodo` (google-deepmind) and `nanoGPT` (karpathy, needs
torch); what is missing there is named and left out. Each contender is a process
of its own that stays alive: the turns alternate, and ratios are those of one.
At a load of 5 to 8 ours over torch, whose threads wait for each other, was ten
times as large: the load before each size is printed. `first loss` is the time
from the start of a process with an empty compilation cache, and once more.

All take AdamW steps on random tokens with the same depth, widths and heads, in
the dtype of the size: float32 for tiny and small (nanoGPT: bfloat16 on a GPU).
The feed-forward layers are theirs, 4 D wide with GELU; `lmopt, SwiGLU` is the
size as configs/sizes.py has it, with three matrices. Ours also clips, logs
norms and keeps a mean of parameters; it has rotary positions. nanoGPT clips.
FLOP/s counts 6 per parameter of the matrices and token, and the attention
products. With GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command all have
huge pages.
"""

import collections
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags
from rich import table
from rich.console import Console

from benchmarks import results
from launch import cli
from lm.errors import UserError, did_you_mean

ROOT = pathlib.Path(__file__).parents[1]
_PEER_DIR = flags.DEFINE_string('peer_dir', '', 'folder of the checkouts')
_SIZES = flags.DEFINE_list('sizes', ['tiny', 'small'], 'of configs/sizes.py')
_STARTS = flags.DEFINE_integer('starts', 1, 'without and with a cache', 1)
_TURNS = flags.DEFINE_integer('turns', 5, 'of each contender', 1)
_BATCH = flags.DEFINE_integer('batch_size', 0, "0 = the size's own", 0)
_SECONDS = flags.DEFINE_float('seconds', 5.0, 'of each turn', 0.01)
_CONTENDER = flags.DEFINE_string('contender', '', 'internal: one contender')


def lmopt(config):
  """The step of launch.train: optimizer, schedule, clipping, mean, metrics."""
  import jax

  from lm import loop, programs, step

  built = loop.build(config)
  jax.set_mesh(built.mesh)
  train_step = programs.compiled_beside(config, built)
  state, traced = built.init(), step.floats(config)

  def take(tokens_BS):
    nonlocal state
    batch = jax.device_put(tokens_BS, built.batch_sharding)  # as in a run
    state, metrics = train_step(state, batch, traced)
    return metrics['train/loss']

  return take


def nanodo(config):
  """google-deepmind/nanodo's model and loss with Optax's AdamW."""
  import jax
  import jax.numpy as jnp
  import optax
  from flax.core import meta
  from nanodo import model as theirs

  c = config.model
  dtype = jnp.dtype(c.dtype)
  module = theirs.TransformerDo(
    theirs.DoConfig(
      D=c.d_model, H=c.num_heads, L=config.seq_len, N=c.num_layers,
      V=c.vocab_size, F=c.d_ff, dtype=dtype,
    )
  )  # fmt: skip
  tx = optax.adamw(1e-3)

  def objective(params, tokens_BS):
    logits = module.apply(params, tokens_BS[:, :-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens_BS[:, 1:]
    )
    return nll.mean()

  @jax.jit
  def init(key):
    params = module.init(key, jnp.zeros((1, config.seq_len), jnp.int32))
    params = meta.unbox(params)
    return params, tx.init(params)

  def step(state, tokens_BS):
    params, moments = state
    value, grads = jax.value_and_grad(objective)(params, tokens_BS)
    updates, moments = tx.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  step = jax.jit(step, donate_argnums=0)
  state = init(jax.random.key(0))

  def take(tokens_BS):
    nonlocal state
    state, value = step(state, tokens_BS)
    return value

  return take


def nanogpt(config, compiled):
  """karpathy/nanoGPT's model and optimizer, eager or compiled."""
  import torch
  from model import GPT, GPTConfig

  c = config.model
  torch.set_num_threads(os.cpu_count())  # as many as XLA has
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  net = GPT(
    GPTConfig(
      block_size=config.seq_len, vocab_size=c.vocab_size, n_layer=c.num_layers,
      n_head=c.num_heads, n_embd=c.d_model, bias=False,
    )
  ).to(device)  # fmt: skip
  tx = net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
  half = torch.autocast(device, torch.bfloat16, enabled=device == 'cuda')
  run = torch.compile(net) if compiled else net

  def take(tokens_BS):
    tokens = torch.from_numpy(tokens_BS.astype(np.int64)).to(device)
    with half:
      _, value = run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    value.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    tx.step()
    tx.zero_grad(set_to_none=True)
    return value.item()

  return take


CONTENDERS = {
  'lmopt': (lmopt, ''),
  'lmopt, SwiGLU': (lmopt, ''),
  'nanodo': (nanodo, 'nanodo'),
  'nanoGPT eager': (lambda c: nanogpt(c, False), 'nanoGPT'),
  'nanoGPT compiled': (lambda c: nanogpt(c, True), 'nanoGPT'),
}


def configured(name: str, size: str):
  """Returns the config of a contender."""
  from configs import base

  config = base.get_config(f'size={size}')
  config.batch_size = _BATCH.value or config.batch_size
  if 'SwiGLU' not in name:
    theirs = {'gated': False, 'activation': 'gelu'}
    config.model.update(theirs, d_ff=4 * config.model.d_model)
  return config


def contend(name: str, size: str, seconds: float) -> None:
  """Says that it is ready, then answers each line with a rate."""
  config = configured(name, size)
  tokens_BS = np.random.default_rng(0).integers(
    256, size=(config.batch_size, config.seq_len + 1), dtype=np.int32
  )
  take = CONTENDERS[name][0](config)
  print(f'ready {float(take(tokens_BS))}', flush=True)
  for _ in sys.stdin:
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
      float(take(tokens_BS))
      steps += 1
    rate = steps * tokens_BS[:, 1:].size / (time.perf_counter() - begin)
    print(rate, flush=True)


class Process:
  """A contender that runs, and how long it took to its first loss."""

  def __init__(self, name: str, size: str, cache: pathlib.Path):
    self.name = name
    folder = pathlib.Path(_PEER_DIR.value) / CONTENDERS[name][1]
    path = [str(ROOT), *([str(folder)] if CONTENDERS[name][1] else [])]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path)}
    environment['JAX_COMPILATION_CACHE_DIR'] = str(cache / 'jax')
    environment['TORCHINDUCTOR_CACHE_DIR'] = str(cache / 'torch')
    environment['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # they share a GPU
    environment['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
    begin = time.perf_counter()
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.peers', f'--contender={name}',
       f'--sizes={size}', f'--seconds={_SECONDS.value}',
       f'--batch_size={_BATCH.value}'],
      env=environment, text=True, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=(cache / 'stderr').open('w'),
    )  # fmt: skip
    self.ready = self._line().startswith('ready')
    self.first = time.perf_counter() - begin

  def _line(self) -> str:
    for line in self._process.stdout:
      if line.startswith('ready') or line[:1].isdigit():
        return line
    return ''

  def turn(self) -> float:
    self._process.stdin.write('go\n')
    self._process.stdin.flush()
    if not (line := self._line()):
      raise UserError(f'{self.name} has ended between two turns.')
    return float(line)

  def stop(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def compare(size: str, names: list[str], turns: int) -> table.Table:
  from lm import model

  running, starts = {}, {}
  for name in [*names] * _STARTS.value:
    with tempfile.TemporaryDirectory() as folder:
      cache = pathlib.Path(folder)
      first = Process(name, size, cache)
      first.stop()
      if first.ready:
        if name in running:
          running[name].stop()
        running[name] = Process(name, size, cache)
        starts.setdefault(name, []).append((first.first, running[name].first))
        continue
      why = (cache / 'stderr').read_text().strip().rpartition('\n')[2]
      print(f'{size}: {name} did not start and is left out: {why}')
  if 'lmopt' not in running:
    raise UserError(f'{size}: without lmopt there is nothing to compare.')
  rates = {name: [] for name in running}
  order = collections.deque(running)
  for _ in range(turns):
    for name in order:
      rates[name].append(running[name].turn())
    order.rotate(-1)
  for process in running.values():
    process.stop()
  columns = 'tokens/s', 'lmopt / it', 'GFLOP/s', 'first loss, s: cold, warm'
  out = table.Table(size, *columns)
  for name, values in rates.items():
    ratios = [a / b for a, b in zip(rates['lmopt'], values, strict=True)]
    middle = statistics.median(values)
    config = configured(name, size)
    flops = model.flops_per_token(config.model, config.seq_len)
    out.add_row(
      name,
      f'{middle:,.0f}',
      results.spread(ratios),
      f'{middle * flops / 1e9:,.0f}',
      ', '.join(map(_seconds, zip(*starts[name], strict=True))),
    )
  return out


def _seconds(values: tuple[float, ...]) -> str:
  more = f' ({min(values):.1f} .. {max(values):.1f})' if values[1:] else ''
  return f'{statistics.median(values):.1f}{more}'


@results.entry('training steps of peers')
def main() -> None:
  if _CONTENDER.value:
    if _CONTENDER.value not in CONTENDERS:
      hint = did_you_mean(_CONTENDER.value, CONTENDERS)
      raise UserError(f"--contender='{_CONTENDER.value}' is unknown.{hint}")
    contend(_CONTENDER.value, _SIZES.value[0], _SECONDS.value)
    return
  names = []
  for name, (_, folder) in CONTENDERS.items():
    if folder and not (pathlib.Path(_PEER_DIR.value) / folder).is_dir():
      print(f"{name}: no folder '{folder}' in --peer_dir; left out")
    else:
      names.append(name)
  for size in _SIZES.value:
    configured('lmopt', size)  # refuses an unknown one
  for size in _SIZES.value:
    print(f'load of this machine: {os.getloadavg()[0]:.1f}')
    Console().print(compare(size, names, _TURNS.value))


if __name__ == '__main__':
  cli.run(main)
