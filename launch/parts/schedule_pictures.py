"""Figures of the schedule tools (not a command)."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib import figure, ticker

mpl.use('Agg')
_POINTS = 2000  # drawn of a curve, at most
_DASHES = ('-', '--', ':', '-.')  # for every ten curves


def _figure(columns: int, width: float = 5.2):
  fig = figure.Figure(figsize=(width * columns, 3.6), layout='constrained')
  return fig, fig.subplots(1, columns, squeeze=False)[0]


def _line(ax, values, **style) -> None:
  """Draws one value per step, of a long curve each n-th and the last."""
  at = np.unique(np.linspace(0, len(values) - 1, _POINTS).astype(int))
  ax.plot(at, np.asarray(values)[at], **style)


def multipliers(curves: Sequence, losses: Mapping) -> figure.Figure:
  """Draws launch.curves.Curve of any lengths, and the losses of runs.

  Args:
    curves: each over its own steps.
    losses: name of a curve -> Series, drawn in its colour.
  """
  fig, axes = _figure(2 if losses else 1, width=6.5)
  for i, c in enumerate(curves):
    style = {'color': f'C{i % 10}', 'linestyle': _DASHES[i // 10 % 4]}
    _line(axes[0], c.value, label=c.name, **style)
    if c.name in losses:
      axes[1].plot(*losses[c.name], label=c.name, **style)
  axes[0].set(xlabel='step', ylabel='multiplier', ylim=(-0.03, 1.05))
  if losses:
    # The first losses would hide the rest.
    top = max(np.quantile(x.value, 0.8) for x in losses.values())
    low = min(x.value.min() for x in losses.values())
    axes[1].set(xlabel='step', ylabel='loss (nats)')
    axes[1].set_ylim(low - 0.05 * (top - low), top)
  axes[-1].legend(
    *axes[0].get_legend_handles_labels(),
    fontsize=7, loc='upper left', bbox_to_anchor=(1.01, 1),
  )  # fmt: skip
  return fig


def refined(
  norms: np.ndarray, smooth: np.ndarray, curves: Mapping, label: str
) -> figure.Figure:
  """Draws gradient norms with their median, and schedules over them."""
  fig, (left, right) = _figure(2)
  _line(left, norms, color='0.75', label='logged')
  _line(left, smooth, color='C0', label='median filtered')
  top = np.nanquantile(norms[np.isfinite(norms)], 0.995)
  low = np.nanmin(smooth)
  left.set(xlabel='step', ylabel=label, ylim=(0.9 * low, 1.1 * top))
  left.legend(fontsize=7)
  for name, values in curves.items():
    style = {'color': 'C3'} if name == 'refined' else {'linestyle': '--'}
    _line(right, values, label=name, **style)
  right.set(xlabel='step', ylabel='multiplier', ylim=(-0.03, 1.05))
  right.legend(fontsize=7)
  return fig


def predicted(
  measured: np.ndarray, fitted: np.ndarray, held: Sequence, lines: Mapping
) -> figure.Figure:
  """Draws measured against predicted losses, and loss by peak rate.

  Args:
    measured, fitted: of the runs of the fit.
    held: (name, measured, predicted, half width) of held-out runs.
    lines: schedule -> (peaks, losses).
  """
  fig, (left, right) = _figure(2)
  left.plot(fitted, measured, 'o', color='0.4', label='in the fit')
  for i, (name, want, got, half) in enumerate(held):
    error = half if np.isfinite(half) else None
    left.errorbar(
      got, want, xerr=error, fmt='s', color=f'C{i % 10}', label=name
    )
  values = [*measured, *fitted, *(x for _, w, g, _ in held for x in (w, g))]
  ends = [min(values), max(values)]
  pad = 0.1 * (ends[1] - ends[0])
  ends = [ends[0] - pad, ends[1] + pad]
  left.plot(ends, ends, color='0.8', zorder=0)
  left.set(xlabel='predicted loss', ylabel='measured loss', xlim=ends,
           ylim=ends)  # fmt: skip
  left.legend(fontsize=7)
  for name, (peaks, losses) in lines.items():
    right.plot(peaks, losses, label=name)
  right.set(xlabel='peak learning rate', ylabel='predicted final loss',
            xscale='log')  # fmt: skip
  right.legend(fontsize=7)
  return fig


def ranges(
  name: str, values, losses, smooth, spacing: str, marks: Mapping
) -> figure.Figure:
  """Draws the loss over the swept value, with vertical marks."""
  fig, (ax,) = _figure(1)
  ax.plot(values, losses, color='0.8', label='loss of the batch')
  ax.plot(values, smooth, color='C0', label='smoothed')
  for i, (label, at) in enumerate(marks.items(), 1):
    ax.axvline(at, color=f'C{i}', linestyle='--', label=f'{label} {at:.3g}')
  top = max(smooth[0], np.min(smooth)) * 1.3
  ax.set(xlabel=name, ylabel='training loss (nats)', ylim=(None, top),
         xscale='log' if spacing == 'exponential' else 'linear')  # fmt: skip
  ax.legend(fontsize=7)
  return fig


def ranking(rows: Sequence) -> figure.Figure:
  """Draws the loss over what was tuned first, and over the steps.

  Args:
    rows: launch.parts.ranking.Row of each method. Bands: all seeds.
  """
  fig, (left, right) = _figure(2)
  field = next((f for r in rows for f in r.fields), '')
  for i, r in enumerate(rows):
    color, at = f'C{i % 10}', r.searches.get(field)
    style = {'color': color, 'linestyle': _DASHES[i // 10 % 4]}
    if at:
      x, y = zip(*sorted(at.losses.items()), strict=True)
      left.plot(x, y, marker='o', ms=3, **style)
      left.plot(at.best, at.losses[at.best], 'o', color=color, ms=7)
    if r.curves and len({c.step.size for c in r.curves}) == 1:
      values = np.array([c.value for c in r.curves])
      right.plot(r.curves[0].step, values.mean(0), label=r.name, **style)
      right.fill_between(
        r.curves[0].step, values.min(0), values.max(0), color=color, alpha=0.2
      )
  finite = [x for r in rows for x in r.losses if np.isfinite(x)]
  low = min(finite, default=0.0)
  searches = [r.searches[field] for r in rows if field in r.searches]
  tried = [x for s in searches for x in s.losses.values() if np.isfinite(x)]
  for ax, values in ((left, tried), (right, _late(rows))):
    top = np.quantile(values, 0.8) if len(values) else low + 1
    ax.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
  left.set(xlabel=field, ylabel='final validation loss (nats)', xscale='log')
  # Of less than two decades the minor labels would run into each other.
  left.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
  left.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  left.xaxis.set_minor_formatter(ticker.NullFormatter())
  right.set(xlabel='step', ylabel='validation loss (nats)')
  right.legend(fontsize=7, loc='upper left', bbox_to_anchor=(1.01, 1))
  return fig


def _late(rows):
  """The losses after the first tenth of the steps."""
  found = [c.value[c.step > c.step[-1] / 10] for r in rows for c in r.curves]
  return np.concatenate(found) if found else np.array([])
