"""From the log of a run to a refined schedule (not a command)."""

import csv
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from configs.papers import defazio2023_refined as experiment
from lm import foreign_logs
from lm.errors import UserError
from schedules.theory import refine as theory

# Optimizer -> norm and power, and why; all others are like Adam or the sign.
_SPECTRAL = ('muon', 'normuon', 'adamuon', 'dion', 'marsm', 'scion')
_NUCLEAR = ('nuclear', 1.0, 'orthogonalized steps: nuclear norms, inverse')
_STAND_IN = (
  'l2',
  1.0,
  'the dual norm of an orthogonalized step is nuclear, which is not logged '
  '(--config.log_nuclear_norm=true): l2 norms stand in for it',
)
_BY_NAME = {
  'sgdw': ('l2', 2.0, 'the step is the gradient: l2 norms, inverse square'),
  **dict.fromkeys(_SPECTRAL, _NUCLEAR),
}
_POWERS = {'l1': 1.0, 'l2': 2.0, 'nuclear': 1.0}
_ELSE = ('l1', 1.0, 'taken as Adam or a sign method: l1 norms, inverse')


class Choice(NamedTuple):
  """Which norms, to which power, and a line that says why."""

  tag: str
  power: float
  why: str


class Refined(NamedTuple):
  """norms and smooth: per step of the run. curves: for the picture."""

  multiplier: np.ndarray
  norms: np.ndarray
  smooth: np.ndarray
  curves: dict[str, np.ndarray]
  provenance: dict[str, Any]


def choose(
  found: foreign_logs.Log, norm: str, power: float, tag: str
) -> Choice:
  """Takes what the user says, and the rest from the optimizer of the run."""
  optimizer = found.config.get('optimizer', {}).get('name', '')
  kind, exponent, why = _BY_NAME.get(optimizer, _ELSE)
  if kind == 'nuclear' and not _has(found, kind):
    kind, exponent, why = _STAND_IN
  if not optimizer and norm == 'auto':
    have = [k for k in ('l1', 'l2') if _has(found, k)]
    kind = have[0] if have else 'l2'
    why = f'the optimizer is not known; {kind} norms are what the log has'
    exponent = _POWERS[kind]
  if norm != 'auto':
    kind, exponent, why = norm, _POWERS[norm], f'--norm={norm}'
  if tag:
    why = f'--tag={tag}'
  if power >= 0:
    exponent, why = power, f'{why}, --power={power:g}'
  name = foreign_logs.tag_of(found, kind, tag)
  source = f'optimizer {optimizer}: ' if optimizer else ''
  return Choice(name, exponent, f'{name}, power {exponent:g} ({source}{why})')


def _has(found, kind):
  try:
    return bool(foreign_logs.tag_of(found, kind))
  except UserError:
    return False


def refine(
  found: foreign_logs.Log,
  choice: Choice,
  tau: float,
  num_steps: int,
  warmup: float,
) -> Refined:
  """Computes the multipliers for a run of `num_steps` (0: as many).

  Raises:
    ValueError, UserError: a run without enough norms, a bad number.
  """
  series = found.tags[choice.tag]
  _check(found, series, num_steps, warmup)
  last = int(series.step[-1]) + 1
  end = found.config.get('num_steps', last)
  good = np.isfinite(series.value) & (series.value > 0)
  if good.sum() < 2:
    raise UserError(
      f"{found.name}: the tag '{choice.tag}' has {good.sum()} positive, finite "
      'norms; at least two are needed.'
    )
  norms = np.interp(np.arange(end), series.step[good], series.value[good])
  with np.errstate(all='ignore'):  # refused below
    raw = theory.refine(norms, power=choice.power, tau=tau)
    m = _warmed(theory.resample(raw, num_steps or end), warmup)
  if not np.isfinite(m).all():
    raise UserError(
      f'--power={choice.power:g} of these norms is beyond float64; typical: 1 '
      'or 2.'
    )
  provenance = {
    'run': found.name,
    'tag': choice.tag,
    'power': choice.power,
    'tau': tau,
    'width': theory.width(end, tau),
    'norms': int(good.sum()),
    'norms_left_out': int((~good).sum()),
    'run_steps': end,
    'num_steps': m.size,
    'warmup': warmup,
    'iteration': 1 + _iteration(found),
    'source': 'arXiv 2310.07831, algorithm 1',
  }
  smooth = theory.median(norms, theory.width(end, tau))
  curves = {'refined': m, 'linear': np.linspace(1, 0, m.size)}
  rates = _multipliers_of(found, m.size)
  if rates is not None:
    curves['of the run'] = rates
  return Refined(m, norms, smooth, curves, provenance)


def _warmed(m, warmup):
  length = round(warmup * m.size)
  if length:
    m = m * np.minimum(1, (np.arange(m.size) + 1) / length)
  return m / m.max()


def _check(found, series, num_steps, warmup):
  if not 0 <= warmup < 1:
    raise UserError(f'--warmup={warmup} must be a fraction in [0, 1).')
  if num_steps and num_steps < 2:
    raise UserError(f'--num_steps={num_steps} must be at least 2.')
  last, total = int(series.step[-1]) + 1, found.config.get('num_steps', 0)
  if last < 0.97 * total:
    raise UserError(
      f'{found.name} has norms up to step {last - 1} of {total}; refinement '
      'needs those of the whole run.'
    )
  if series.step[0] > 0.1 * last:
    raise UserError(
      f'{found.name} has norms only from step {series.step[0]} on; join it to '
      f'the log before: --run=PARENT+{found.name}.'
    )


def _iteration(found) -> int:
  """Returns how often the schedule of this run had been refined itself."""
  path = found.config.get('schedule', {}).get('path', '')
  if not path.endswith('.npz') or not pathlib.Path(path).is_file():
    return 0
  with np.load(path, allow_pickle=False) as f:
    if 'provenance' not in f.files:
      return 0
    return json.loads(str(f['provenance']))['iteration']


def _multipliers_of(found, num_steps):
  try:
    rates = foreign_logs.learning_rates(found)
  except UserError:
    return None
  return theory.resample(rates / max(rates.max(), 1e-38), num_steps)


def remarks(result: Refined) -> list[str]:
  """Says what one should know before using it."""
  m, smooth, about = result.multiplier, result.smooth, result.provenance
  peak = int(m.argmax()) / m.size
  lines = [
    f'{about["norms"]} norms ({about["norms_left_out"]} left out), median over '
    f'{about["width"]} steps, refinement number {about["iteration"]}; peak at '
    f'{peak:.1%} of the run, mean multiplier {m.mean():.3f} (linear: 0.5).'
  ]
  if np.ptp(smooth) < 1e-3 * smooth.mean():
    lines.append(
      'The norms are constant (were they clipped?): this is the linear decay.'
    )
  if about['iteration'] > 2:
    lines.append('More than two iterations chase the schedule itself.')
  lines.append(
    'Refinement has lost as well as won: tune the peak learning rate anew, and '
    'compare with linear at equal budget.'
  )
  return lines


def write(
  out: pathlib.Path, multiplier: np.ndarray, provenance: dict[str, Any]
) -> None:
  """Writes a table with its provenance, atomically."""
  if out.suffix != '.npz':
    raise UserError(f"--out='{out}' must end in .npz.")
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = out.with_name(f'{out.stem}.tmp.npz')
  np.savez_compressed(
    temporary,
    multiplier=multiplier,
    num_steps=multiplier.size,
    provenance=json.dumps(provenance),
  )
  temporary.replace(out)


def write_sweep(
  table: pathlib.Path, result: Refined, seeds: int
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes the same experiment for a trainer that is not ours.

  Returns:
    A table of the linear decay with the length and warm-up of the refined one,
    and a CSV with one line per run: table, factor of the peak rate, seed.
  """
  linear, sweep = (table.with_name(table.stem + s) for s in _SWEEP)
  warmup = result.provenance['warmup']
  about = {'iteration': 0, 'warmup': warmup, 'source': 'the linear decay'}
  write(linear, _warmed(result.curves['linear'], warmup), about)
  with sweep.open('w', newline='') as f:
    rows = csv.writer(f)
    rows.writerow(['table', 'peak_factor', 'seed'])
    rows.writerows(
      (name, factor, seed)
      for name in (linear.name, table.name)
      for factor in experiment.FACTORS
      for seed in range(seeds)
    )
  return linear, sweep


_SWEEP = ('-linear.npz', '-refute.csv')
_REFUTE = '''"""Refined against linear, made to refute it: see the experiment.

python -m launch.sweep --config={path} --workdir={run}-refute
"""

from configs.papers import defazio2023_refined as experiment

RUN = {run!r}


def get_config(arg=''):
  c = experiment.get_config(f'run={{RUN}},{{arg}}')
  if c.schedule.name == 'table':
    c.schedule.path = {table!r}
  c.num_steps = {num_steps}
  return c


def sweep(arg=''):
  return experiment.sweep(f'run={{RUN}}', num_seeds={seeds})
'''


def write_experiment(
  table: pathlib.Path, run: str, num_steps: int, seeds: int
) -> pathlib.Path:
  """Writes refute.py, a config with a sweep."""
  config = table.with_name('refute.py')
  config.write_text(
    _REFUTE.format(
      path=config, run=run.rstrip('/'), table=str(table), num_steps=num_steps,
      seeds=seeds,
    )
  )  # fmt: skip
  return config
