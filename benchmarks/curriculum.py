"""Order of the data by quality, learning rate and averaging: do they interact?

  python -m benchmarks.curriculum --seeds=3

The experiment of arXiv 2511.18903 where quality is known: sequences of Python
source in which a share of the bytes, 0 to 0.5, is replaced by random ones. One
pass, shuffled, ascending, descending, or ascending in the last 30 %; constant
learning rate, decayed over the last 30 % to a third, or to zero; the last
checkpoint, or an average of the last six. Validation on clean text. Prints
means over seeds and paired differences with 95 % intervals (Student's t).
"""

import pathlib
import tempfile

import jax
import numpy as np
from absl import flags

from configs import base
from launch import cli
from launch.parts import comparison
from lm import loop, sources
from lm.run import Run
from merging import ema, uniform

BATCH, STEPS, DECAY, EVERY = 8, 480, 144, 24  # sequences; steps
EVALUATED = 1024  # clean sequences
MOST = 0.5  # share of random bytes in the worst sequence
ORDERS = ('shuffled', 'ascend', 'descend', 'tail')
FINALS = {'constant': None, 'to 1/3': 1 / 3, 'to 0': 0.0}
AVERAGES = {
  'last': lambda steps: np.eye(len(steps))[-1],
  'SMA6': uniform.uniform,
  'EMA6': ema.ema,
}
_SEEDS = flags.DEFINE_integer('seeds', 2, 'of all runs', lower_bound=2)
_ORDERS = flags.DEFINE_multi_enum('orders', ORDERS, ORDERS, 'of the data')
_PEAK = flags.DEFINE_float('peak', 1e-2, 'learning rate', lower_bound=0)


def config(folder, order, final, seed, peak):
  """The run of one order and one learning rate at the end."""
  name = 'constant' if final is None else 'wsd'
  c = base.get_config(f'size=nano,schedule={name}')
  c.seed, c.num_steps, c.batch_size, c.learning_rate = seed, STEPS, BATCH, peak
  if final is None:
    c.schedule.warmup_steps = EVERY
  else:
    c.schedule.update(
      {'warmup': EVERY / STEPS, 'decay': DECAY / STEPS, 'final': final}
    )
  c.data.update({'source': 'text', 'train': f'{folder}/train.txt',
                 'eval': f'{folder}/clean.txt'})  # fmt: skip
  if order != 'shuffled':
    up = 'descend' if order == 'descend' else 'ascend'
    begin = STEPS - DECAY if order == 'tail' else 0
    c.data.update({'order': up, 'score': 'file', 'order_begin': begin,
                   'order_end': STEPS})  # fmt: skip
  c.eval.update({'num_sequences': EVALUATED, 'every_steps': 0})
  c.checkpoint.update({'every_steps': EVERY, 'mean': False})
  c.log_every_steps = 50
  return c


def write_corpus(folder, seed):
  """Sequences with their share of random bytes, and clean validation text.

  Sequence by sequence: of whole documents, a sorted batch would come from one
  document, which is another experiment.
  """
  c = base.get_config('size=nano')
  corpus = sources.load(c)
  rng = np.random.default_rng(seed)
  number, t = BATCH * STEPS, c.seq_len
  first = int(rng.integers(len(corpus.train) - number * t))
  text = corpus.train.read(first, first + number * t).reshape(number, t)
  rates = rng.permutation(np.linspace(0, MOST, number))
  wrong = rng.random((number, t)) < rates[:, None]
  noise = rng.integers(0, 256, (number, t), np.uint8)
  path = folder / 'train.txt'
  # One byte more: the last target of the last sequence.
  path.write_bytes(np.where(wrong, noise, text).tobytes() + b'\n')
  rows = np.stack([np.full(number, t), -rates], 1)
  np.save(f'{path}.score.npy', np.r_[rows, [[1, 0]]])
  clean = corpus.evaluation.read(0, len(corpus.evaluation))
  (folder / 'clean.txt').write_bytes(clean.tobytes())


def losses(path):
  """Loss on clean text of each average of the last six checkpoints."""
  run = Run(path)
  steps = run.steps[-6:]
  params = [run.params(s) for s in steps]
  found = {}
  for name, coefficients in AVERAGES.items():
    c = coefficients(steps)
    mean = jax.tree.map(lambda *x: sum(map(np.multiply, c, x)), *params)  # noqa: B023
    mean = jax.tree.map(np.float32, mean)
    found[name] = float(run.losses(mean).mean())
  return found


def experiment(folder, seed, orders, peak):
  """{(order, final, average): loss}; the decays are branches of one trunk."""
  write_corpus(folder, seed)
  found = {}
  for order in orders:
    trunk = folder / order
    for name, final in FINALS.items():
      path = trunk if final is None else folder / f'{order}-{final:.2f}'
      c = config(folder, order, final, seed, peak)
      if final is not None:
        c.branch = f'{trunk}@{STEPS - DECAY}'
      status = loop.train(c, str(path))
      if status != 'done':
        raise SystemExit(f'{path}: {status}')
      for average, loss in losses(path).items():
        found[order, name, average] = loss
        print(
          f'seed {seed}: {order}, {name}, {average}: {loss:.4f}', flush=True
        )
  return found


def report(found, orders):
  """Prints means over seeds, and paired differences with 95 % intervals."""
  cells = [(f, a) for f in FINALS for a in AVERAGES]
  of = lambda *key: np.array([x[key] for x in found])

  def table(title, rows, cell):
    print(f'\n{title}\n\n| | {" | ".join(f"{f}, {a}" for f, a in cells)} |')
    print('|---' * (1 + len(cells)) + '|')
    for order in rows:
      row = [str(cell(order, f, a)) for f, a in cells]
      print(f'| {order} | {" | ".join(row)} |', flush=True)

  minus = comparison.difference
  table('Loss', orders, lambda o, f, a: f'{of(o, f, a).mean():.4f}')
  others = lambda o, f, a: minus(of(o, f, a), of(o, f, 'last'))
  table('Minus the last checkpoint', orders, others)
  if 'shuffled' not in orders:
    return
  rest = [o for o in orders if o != 'shuffled']
  gain = lambda o, f, a: of('shuffled', f, a) - of(o, f, a)
  over = lambda o, f, a: minus(gain(o, f, a), 0)
  table('Gain over shuffled', rest, over)
  more = lambda o, f, a: minus(gain(o, f, a), gain(o, 'to 0', a))
  table('That gain, minus that with a decay to 0', rest, more)


def main() -> None:
  found = []
  for seed in range(_SEEDS.value):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      found.append(experiment(path, seed, _ORDERS.value, _PEAK.value))
    report(found, _ORDERS.value)


if __name__ == '__main__':
  cli.run(main)
