"""Figures of the schedule tools (not a command)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import figure, ticker

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
  """Draws launch.parts.curves.Curve of any lengths, and the losses of runs.

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
  measured: np.ndarray,
  fitted: np.ndarray,
  held: Sequence,
  lines: Mapping,
  tried: Sequence[float],
) -> figure.Figure:
  """Draws measured against predicted losses, and loss by peak rate.

  Args:
    measured, fitted: of the runs of the fit.
    held: (name, measured, predicted, half width) of held-out runs.
    lines: schedule -> (peaks, losses).
    tried: peaks of the fit, outside of which a prediction is a guess.
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
    (line,) = right.plot(peaks, losses, ':')
    known = (peaks >= min(tried)) & (peaks <= max(tried))
    right.plot(peaks[known], losses[known], color=line.get_color(), label=name)
  right.set(xlabel='peak learning rate (dotted: outside the runs)',
            ylabel='predicted final loss',
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
  """Draws the loss over everything that was tuned, and over the steps.

  Args:
    rows: launch.parts.ranking.Row of each method.
  """
  fields = list(dict.fromkeys(f for r in rows for f in r.tuned.fields))
  fig, (*searches, right) = _figure(len(fields) + 1)
  style = [
    {'color': f'C{i % 10}', 'linestyle': _DASHES[i // 10 % 4]}
    for i in range(len(rows))
  ]
  for ax, field in zip(searches, fields, strict=True):
    drawn = []
    for r, line in zip(rows, style, strict=True):
      if at := r.tuned.searches.get(field):
        x, y = zip(*sorted(at.losses.items()), strict=True)
        ax.plot(x, y, marker='o', ms=3, **line)
        ax.plot(at.best, at.losses[at.best], 'o', ms=7, color=line['color'])
        drawn += y
    ax.set(xlabel=field, ylabel='loss of the search (nats)')
    _logarithmic(ax)
    _limit(ax, drawn)
    for line in ax.lines[::2]:
      _triangles(ax, *line.get_data(), line.get_color())
  drawn = []
  for r, line in zip(rows, style, strict=True):
    if r.curves and len({c.step.size for c in r.curves}) == 1:
      step, values = r.curves[0].step, np.array([c.value for c in r.curves])
      name = r.name if len(r.name) < 40 else f'{r.name[:37]}...'
      right.plot(step, values.mean(0), label=name, **line)
      band = values.min(0), values.max(0)
      right.fill_between(step, *band, color=line['color'], alpha=0.2)
      drawn += [*values[:, step > step[-1] / 10].ravel()]
  right.set(xlabel='step', ylabel='validation loss (nats)')
  _limit(right, drawn)
  right.legend(
    fontsize=7, loc='upper left', bbox_to_anchor=(1.01, 1),
    title='mean; band: all seeds;\ntriangle: above, or diverged',
    title_fontsize=7,
  )  # fmt: skip
  return fig


def sweep(lines: Mapping, key: str) -> figure.Figure:
  """Draws the loss over a field; what lies above the picture as triangles.

  Args:
    lines: name -> launch.parts.sweeps.Group by their value of the field.
    key: the field.
  """
  fig, (ax,) = _figure(1, width=6.5)
  halves = []  # the lower half of each line is to be seen
  for i, (name, groups) in enumerate(lines.items()):
    style = {'color': f'C{i % 10}', 'linestyle': _DASHES[i // 10 % 4]}
    x = [g.values[key] for g in groups]
    y = np.array([[*g.losses.values()] for g in groups], object)
    means = np.array([g.mean for g in groups])
    ax.plot(x, means, label=name, marker='o', ms=3, **style)
    band = [min(seeds) for seeds in y], [max(seeds) for seeds in y]
    ax.fill_between(x, *band, color=style['color'], alpha=0.2)
    halves += sorted(means[np.isfinite(means)])[: len(means) // 2 + 1]
  ax.set(xlabel=key, ylabel='final validation loss (nats)')
  values = [g.values[key] for groups in lines.values() for g in groups]
  if not halves:  # a logarithmic axis needs a point
    ax.set_xlim(min(values), 2 * max(values))
  if min(values) > 0 and max(values) >= 4 * min(values):
    _logarithmic(ax)
  low, high = (min(halves), max(halves)) if halves else (0.0, 1.0)
  pad = 0.08 * (high - low) or 0.1
  ax.set_ylim(low - pad, high + pad)
  for i, groups in enumerate(lines.values()):
    x, means = [g.values[key] for g in groups], [g.mean for g in groups]
    _triangles(ax, x, means, f'C{i % 10}')
  ax.legend(
    fontsize=7, loc='upper left', bbox_to_anchor=(1.01, 1), title_fontsize=7,
    title='mean; band: all seeds;\ntriangle: above, or diverged',
  )  # fmt: skip
  return fig


def _triangles(ax, x, y, color) -> None:
  """Marks, at the upper edge, points that lie above the picture."""
  top = ax.get_ylim()[1]
  above = [a for a, b in zip(x, y, strict=True) if not b <= top]
  if above:  # an unclipped line without points would widen the picture
    ax.plot(above, [top] * len(above), '^', color=color, clip_on=False)


def _logarithmic(ax) -> None:
  ax.set_xscale('log')
  # Of less than two decades the minor labels would run into each other.
  ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
  ax.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def _limit(ax, losses) -> None:
  """Shows all but the highest fifth, which would hide the rest."""
  finite = [x for x in losses if np.isfinite(x)]
  if len(finite) > 1:
    low, top = min(finite), np.quantile(finite, 0.8)
    pad = 0.05 * (top - low) or 1.0
    ax.set_ylim(low - pad, top + pad)
