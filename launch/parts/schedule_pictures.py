"""Figures of the schedule tools (not a command)."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import figure

from launch.parts import look

_POINTS = 2000  # drawn of a curve, at most
_LEGEND = 'mean; band: all seeds; triangle: above the panel; x: diverged'


def _figure(columns: int, width: float = 4.2):
  fig = figure.Figure(figsize=(width * columns, 3.4), layout='constrained')
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
  fig, axes = _figure(2 if losses else 1)
  for i, c in enumerate(curves):
    style = look.style(i, marker='')
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
  look.legend(fig, *axes[0].get_legend_handles_labels())
  return fig


def refined(
  norms: np.ndarray, smooth: np.ndarray, curves: Mapping, label: str
) -> figure.Figure:
  """Draws gradient norms with their median, and schedules over them."""
  fig, (left, right) = _figure(2)
  _line(left, norms, color='0.75', label='logged')
  _line(left, smooth, color=look.style(0)['color'], label='median filtered')
  left.set(xlabel='step', ylabel=f'gradient norm, {label}')
  look.logarithmic(left, 'y')
  left.legend(fontsize=8)
  for i, (name, values) in enumerate(curves.items()):
    _line(right, values, label=name, **look.style(i, marker=''))
  right.set(xlabel='step', ylabel='multiplier', ylim=(-0.03, 1.05))
  right.legend(fontsize=8)
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
  left.plot(fitted, measured, 'o', color='0.5', label='in the fit')
  for i, (name, want, got, half) in enumerate(held):
    error = half if np.isfinite(half) else None
    style = look.style(i, linestyle='', color='black')
    left.errorbar(got, want, xerr=error, capsize=2, label=name, **style)
  values = [*measured, *fitted, *(x for _, w, g, _ in held for x in (w, g))]
  ends = [min(values), max(values)]
  pad = 0.1 * (ends[1] - ends[0])
  ends = [ends[0] - pad, ends[1] + pad]
  left.plot(ends, ends, color='0.8', zorder=0)
  left.set(xlabel='predicted loss (nats)', ylabel='measured loss (nats)',
           xlim=ends, ylim=ends)  # fmt: skip
  left.legend(fontsize=8)
  for i, (name, (peaks, losses)) in enumerate(lines.items()):
    style = look.style(i, linestyle='-', markevery=8)
    right.plot(peaks, losses, ':', color=style['color'])
    known = (peaks >= min(tried)) & (peaks <= max(tried))
    right.plot(peaks[known], losses[known], label=name, **style)
  right.set(xlabel='peak learning rate (dotted: outside the runs)',
            ylabel='predicted final loss (nats)')  # fmt: skip
  look.logarithmic(right, 'x')
  right.legend(fontsize=8)
  return fig


def ranges(
  name: str, values, losses, smooth, spacing: str, marks: Mapping, span=None
) -> figure.Figure:
  """Draws the loss over the swept value, and marks on it.

  Args:
    name, values: what was swept.
    losses, smooth: for each value.
    spacing: of the values, 'exponential' or 'linear'.
    marks: label, with a place for the value -> value.
    span: from which value to which one should try, if any.
  """
  fig, (ax,) = _figure(1, width=6)
  ax.plot(values, losses, color='0.8', label='loss of the batch')
  ax.plot(values, smooth, color='0.3', label='smoothed')
  for i, (label, at) in enumerate(marks.items()):
    style = look.style(i, ms=8, linestyle='')
    y = np.interp(at, values, smooth)
    ax.plot(at, y, label=label.format(at), **style)
  if span:
    label = 'peaks to try: {:.2g} to {:.2g}'.format(*span)
    ax.axvspan(*span, color='0.93', label=label)
  top = max(smooth[0], np.min(smooth)) * 1.1
  ax.set(xlabel=name, ylabel='training loss (nats)', ylim=(None, top),
         xscale='log' if spacing == 'exponential' else 'linear')  # fmt: skip
  look.legend(fig, *ax.get_legend_handles_labels())
  return fig


def ranking(rows: Sequence) -> figure.Figure:
  """Draws the loss over everything that was tuned, and over the steps.

  Args:
    rows: launch.parts.ranking.Row of each method.
  """
  fields = list(dict.fromkeys(f for r in rows for f in r.tuned.fields))
  fig, (*searches, right) = _figure(len(fields) + 1)
  styles = [look.style(i) for i in range(len(rows))]
  for ax, field in zip(searches, fields, strict=True):
    found = []
    for r, style in zip(rows, styles, strict=True):
      if at := r.tuned.searches.get(field):
        x, y = zip(*sorted(at.losses.items()), strict=True)
        ax.plot(x, y, **style)
        ring = {**style, 'ms': 11, 'fillstyle': 'none'}
        ax.plot(at.best, at.losses[at.best], **ring)
        found.append((x, y, style))
    ax.set(xlabel=field, ylabel='loss of the search (nats)')
    _limit(ax, [y for _, y, _ in found])
    _above(ax, found)
    _scale(ax, [a for x, _, _ in found for a in x])
  drawn, ends, most = [], [], 0
  for r, style in zip(rows, styles, strict=True):
    bad = np.sum(~np.isfinite(r.losses))
    label = f'{r.name} ({bad} of {r.losses.size} diverged)' if bad else r.name
    # Until the first seed diverged; without any it still is in the legend.
    n = min((c.step.size for c in r.curves), default=0)
    style['markevery'] = max(n // 8, 1)
    if not n:
      right.plot([], [], label=label, **style)
      continue
    step, values = r.curves[0].step[:n], [c.value[:n] for c in r.curves]
    mean = np.mean(values, 0)
    right.plot(step, mean, label=label, **style)
    band = np.min(values, 0), np.max(values, 0)
    right.fill_between(step, *band, color=style['color'], alpha=0.2)
    late = step > step[-1] / 10
    drawn += [x for x in np.array(values)[:, late].ravel() if np.isfinite(x)]
    most = max(most, late.sum())
    ends.append(([step[-1]], [np.inf if bad else mean[-1]], style))
  right.set(xlabel='step', ylabel='validation loss (nats)')
  if drawn and most > 2:  # else it would cut off what makes a line
    # The first losses would hide the rest, but all ends are to be seen.
    top = np.quantile(drawn, 0.8)
    usual = [x for x in drawn if x <= top]
    _limit(right, [usual, *(y for _, y, _ in ends)])
  _above(right, ends)
  what = f'{_LEGEND}; open: the best of the search' if fields else _LEGEND
  look.legend(fig, *right.get_legend_handles_labels(), title=what)
  return fig


def sweep(lines: Mapping, key: str) -> figure.Figure:
  """Draws the loss over a field, and marks for what lies above the picture.

  Args:
    lines: name -> launch.parts.sweeps.Group by their value of the field.
    key: the field.
  """
  fig, (ax,) = _figure(1, width=6)
  seen, found = [], []
  for i, (name, groups) in enumerate(lines.items()):
    style = look.style(i)
    x = [g.values[key] for g in groups]
    y = np.array([[*g.losses.values()] for g in groups], object)
    means = np.array([g.mean for g in groups])
    ax.plot(x, means, label=name, **style)
    band = [min(seeds) for seeds in y], [max(seeds) for seeds in y]
    ax.fill_between(x, *band, color=style['color'], alpha=0.2)
    seen.append([*means, *band[0], *band[1]])
    found.append((x, means, style))
  ax.set(xlabel=key, ylabel='final validation loss (nats)')
  values = [value for x, _, _ in found for value in x]
  if not any(np.isfinite(y).any() for _, y, _ in found):
    # A logarithmic axis needs a point.
    ax.set_xlim(min(values), 2 * max(values))
  _limit(ax, seen)
  _above(ax, found)
  _scale(ax, values)
  look.legend(fig, *ax.get_legend_handles_labels(), title=_LEGEND)
  return fig


def _scale(ax, values):
  """Logarithmic in x, unless the values reach 0 or lie close together."""
  if min(values) > 0 and max(values) >= 3 * min(values):
    look.logarithmic(ax, 'x', values)


def _above(ax, lines: Iterable) -> None:
  """Marks points over the panel at its edge, each above the one before."""
  top, rows = ax.get_ylim()[1], {}
  for x, y, style in lines:
    for a, b in zip(x, y, strict=True):
      if b <= top:
        continue
      rows[a] = rows.get(a, 0) + 1
      marker = '^' if np.isfinite(b) else 'x'
      ax.plot(a, top, marker, ms=6, mew=1.5, color=style['color'],
              clip_on=False,
              transform=look.shifted(ax, 0, 8 * rows[a] - 2))  # fmt: skip
  # The limits do not know what is shifted.
  ax.update_datalim([(a, top) for a in rows] or np.zeros((0, 2)))
  ax.autoscale_view()


def _limit(ax, lines: Sequence) -> None:
  """Shows all finite losses but outliers, which would hide the rest.

  These are further above the least than 3 times the span of the lower half, or
  than 15 % where that is more; the least of each line is none.
  """
  lines = [sorted(x for x in line if np.isfinite(x)) for line in lines]
  found = sorted(x for line in lines for x in line)
  if not found:
    return
  low, middle = found[0], found[len(found) // 2]
  top = low + 3 * max(middle - low, 0.05 * abs(low))
  top = max(top, *(line[0] for line in lines if line))
  shown = [x for x in found if x <= top]
  pad = 0.05 * (shown[-1] - low) or 0.1
  ax.set_ylim(low - pad, shown[-1] + pad)
