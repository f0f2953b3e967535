"""The river valley: what stable and decay phases do on a bigram model.

  python -m benchmarks.river           (seconds)

The picture of arXiv 2410.05192 on a bigram language. The next token after some
frequent tokens is a coin flip: steep hillsides, with gradient noise for ever.
After many rare tokens it is certain: the river, along which the loss falls
slowly and without noise. The expected loss is exact, and a sum of both parts.
"""

from typing import NamedTuple

import numpy as np

from launch import cli
from schedules.sgdr import sgdr
from schedules.wsd import wsd
from schedules.wsd_s import wsd_s

COINS, FACTS = 8, 360  # tokens before a coin flip, before a certain token
FREQUENCY = np.r_[np.full(COINS, 0.08), np.full(FACTS, 0.001)]
BATCH = 16
PEAK = 16.0


class Losses(NamedTuple):
  """Excess loss over the entropy, by part, shape (steps + 1, seeds)."""

  river: np.ndarray
  hill: np.ndarray

  @property
  def total(self) -> np.ndarray:
    return self.river + self.hill


def train(rates: np.ndarray, seeds: int = 20) -> Losses:
  """Trains a logit per token by SGD on sampled bigrams, from 0."""
  rng = np.random.default_rng(0)
  logit = np.zeros((seeds, COINS + FACTS))
  river, hill = [], []
  for rate in [*rates, 0.0]:
    a, b = logit[:, :COINS], logit[:, COINS:]
    coins = 0.5 * (np.logaddexp(0, a) + np.logaddexp(0, -a)) - np.log(2)
    hill.append(coins @ FREQUENCY[:COINS])
    river.append(np.logaddexp(0, -b) @ FREQUENCY[COINS:])
    count = rng.multinomial(BATCH, FREQUENCY, size=seeds)
    ones = count.copy()
    ones[:, :COINS] = rng.binomial(count[:, :COINS], 0.5)
    logit = logit - rate * (count / (1 + np.exp(-logit)) - ones) / BATCH
  return Losses(np.array(river), np.array(hill))


def stationary_hill(rate: float) -> float:
  """Returns the excess of the coins at a constant rate, to first order.

  Each: rate s^2 / (2 (2 - rate h)), curvature h = f / 4, gradient noise
  s^2 = f / (4 BATCH).
  """
  h = FREQUENCY[:COINS] / 4
  return float(np.sum(rate * h / BATCH / (2 * (2 - rate * h))))


def curve(schedule, num_steps: int) -> np.ndarray:
  return PEAK * np.asarray(schedule(np.arange(num_steps)), np.float64)


def budgets(ends=(1000, 2000, 4000), decay: float = 0.1) -> dict:
  """Returns schedule -> (total loss at each end, steps trained in all).

  WSD decays a branch for each end and throws it away; the others are one run.
  The cycles of SGDR are as long as the first end, and all ends are theirs.
  """
  last = ends[-1]
  one = {
    'WSD-S': wsd_s(last, warmup=0.0, decay=decay, cycle_end_steps=ends[:-1]),
    'cyclic cosine': sgdr(last, cycles=last // ends[0]),
  }
  found = {}
  for name, schedule in one.items():
    total = train(curve(schedule, last)).total
    found[name] = ([total[e] for e in ends], last)
  branches = [
    train(curve(wsd(e, warmup=0.0, decay=decay), e)).total[-1] for e in ends
  ]
  extra = sum(round(decay * e) for e in ends[:-1])
  found['WSD, branches'] = (branches, last + extra)
  return found


def main() -> None:
  print('excess loss at a constant rate: river, hill, hill in theory')
  for rate in (PEAK / 4, PEAK / 2, PEAK):
    x = train(np.full(2000, rate))
    tail = slice(1500, None)
    print(
      f'  rate {rate:g}: {x.river[-1].mean():.4f} {x.hill[tail].mean():.4f} '
      f'{stationary_hill(rate):.4f}'
    )
  print('total excess loss at 1000, 2000 and 4000 steps, 20 seeds')
  for name, (losses, steps) in budgets().items():
    cells = '  '.join(
      f'{x.mean():.4f} +- {x.std(ddof=1) / x.size**0.5:.4f}' for x in losses
    )
    print(f'  {name:14} {cells}  ({steps} steps trained)')


if __name__ == '__main__':
  cli.run(main)
