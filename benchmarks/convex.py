"""Refined schedules on convex problems: train, refine, train again, compare.

  python -m benchmarks.convex          (half a minute; needs scikit-learn)

Softmax regression on scikit-learn's bundled data sets and an ill-conditioned
least-squares problem, by SGD with batches of 16: the setting in which the
theory holds. Every schedule has its own best learning rate of one grid; the
refined one comes from the gradient norms of one linear run. Reported is the
loss over all rows above the best of any schedule, mean +- standard deviation
over seeds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from launch import cli
from schedules.cosine import cosine
from schedules.linear import linear
from schedules.theory import refine

NUM_STEPS, BATCH = 2000, 16
PENALTY = 1e-3  # times |w|^2 / 2: separable data would have no best w
RATES = 2.0 ** np.arange(-7, 5)
NAMES = ('linear', 'cosine', 'constant', 'refined')


class Problem(NamedTuple):
  """rows (n, d) with targets (n, k); labels are one-hot unless `squared`."""

  rows: np.ndarray
  targets: np.ndarray
  squared: bool = False


def problems() -> dict[str, Problem]:
  """Returns the suite by name."""
  from sklearn import datasets

  found = {}
  for name in ('breast_cancer', 'wine', 'digits'):
    data = getattr(datasets, f'load_{name}')()
    x = (data.data - data.data.mean(0)) / (data.data.std(0) + 1e-9)
    rows = np.concatenate([x, np.ones((len(x), 1))], 1) / x.shape[1] ** 0.5
    found[name] = Problem(rows, np.eye(data.target.max() + 1)[data.target])
  return {**found, 'least squares': least_squares()}


def least_squares(n: int = 500, d: int = 30) -> Problem:
  """Rows with variances from 1 to 1e-4, and noise in the targets."""
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((n, d)) * np.geomspace(1, 0.01, d)
  targets = rows @ rng.standard_normal((d, 1)) * 3
  return Problem(rows, targets + rng.standard_normal((n, 1)), squared=True)


def _residual(problem, outputs, targets):
  if problem.squared:
    return outputs - targets
  e = np.exp(outputs - outputs.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True) - targets


def loss(problem: Problem, w: np.ndarray) -> np.ndarray:
  """Returns the objective of each w (..., d, k), over all rows."""
  z = problem.rows @ w
  penalty = PENALTY / 2 * (w**2).sum((-1, -2))
  if problem.squared:
    return 0.5 * ((z - problem.targets) ** 2).sum(-1).mean(-1) + penalty
  top = z.max(-1)
  log_sum = top + np.log(np.exp(z - top[..., None]).sum(-1))
  return (log_sum - (z * problem.targets).sum(-1)).mean(-1) + penalty


def train(
  problem: Problem, multipliers: np.ndarray, rates: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Trains one run per rate, all on the same batches.

  Returns:
    Final losses (rates,) and l2 norms of the gradients (steps, rates).
  """
  rng = np.random.default_rng(seed)
  w = np.zeros((len(rates), problem.rows.shape[1], problem.targets.shape[1]))
  norms = []
  for m in multipliers:
    at = rng.integers(len(problem.rows), size=BATCH)
    x, y = problem.rows[at], problem.targets[at]
    residual = _residual(problem, x @ w, y)
    gradient = x.T @ residual / BATCH + PENALTY * w
    norms.append(np.sqrt((gradient**2).sum((1, 2))))
    w = w - (m * rates)[:, None, None] * gradient
  final = loss(problem, w)
  return np.where(np.isfinite(final), final, np.inf), np.array(norms)


def curve(schedule: Callable) -> np.ndarray:
  return np.asarray(schedule(np.arange(NUM_STEPS)), np.float64)


def compare(
  problem: Problem, seeds: int
) -> tuple[dict[str, tuple[float, np.ndarray]], np.ndarray]:
  """Returns schedule -> (best rate, its loss for each seed), and the refined.

  The refined schedule is that of the first seed's best linear run.
  """
  shapes = {
    'linear': curve(linear(NUM_STEPS, warmup=0.0)),
    'cosine': curve(cosine(NUM_STEPS, warmup=0.0)),
    'constant': np.ones(NUM_STEPS),
  }
  with np.errstate(over='ignore', invalid='ignore'):
    losses, norms = train(problem, shapes['linear'], RATES, 0)
    own = norms[:, np.argmin(losses)]
    shapes['refined'] = refine.refine(own, power=2)
    found = {}
    for name, m in shapes.items():
      runs = [train(problem, m, RATES, s)[0] for s in range(seeds)]
      best = int(np.mean(runs, 0).argmin())
      found[name] = (float(RATES[best]), np.array(runs)[:, best])
  return found, shapes['refined']


def main() -> None:
  print(
    f'{NUM_STEPS} steps of SGD, 3 seeds; loss above the least of the row @its '
    'best rate'
  )
  print(f'{"":14}' + ''.join(f'{n:>26}' for n in NAMES))
  for name, problem in problems().items():
    found, _ = compare(problem, seeds=3)
    least = min(x.mean() for _, x in found.values())
    cells = [
      f'{x.mean() - least:.5f} +- {x.std(ddof=1):.5f} @{rate:g}'
      for rate, x in (found[k] for k in NAMES)
    ]
    print(f'{name:14}' + ''.join(f'{c:>26}' for c in cells))


if __name__ == '__main__':
  cli.run(main)
