"""Figures of commands (not a command)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import figure


def emulation(
  run, real, grid, focus, results: Mapping, last: Mapping
) -> figure.Figure:
  """Draws the curves with the emulated ends, and a heat map per shape."""
  shapes = list(dict.fromkeys(job.shape for job in results))
  fig = figure.Figure(figsize=(5 + 3.4 * len(shapes), 4), layout='constrained')
  axes = fig.subplots(
    1, 1 + len(shapes), width_ratios=[1.5, *[1] * len(shapes)]
  )
  _curves(axes[0], run, real, grid, focus, results)
  best = {(j.end, j.window, j.shape): x.mean() for j, x in results.items()}
  gains = [last[e].mean() - best[e, w, s] for e, w in grid for s in shapes]
  limit = max(map(abs, gains))
  for ax, shape in zip(axes[1:], shapes, strict=True):
    cells = {(e, w): best[e, w, shape] for e, w in grid}
    gain = {(e, w): last[e].mean() - loss for (e, w), loss in cells.items()}
    image = _heat(ax, shape, cells, gain, limit)
  fig.colorbar(image, ax=axes[-1], label='gain over no decay (nats)')
  return fig


def _curves(ax, run, real, grid, focus, results) -> None:
  step, loss = run.metrics['eval/loss']
  ax.plot(step, loss, '.-', color='0.4', label='constant rate')
  shapes = list(dict.fromkeys(job.shape for job in results))
  for r in real:  # in the colour of its shape
    step, loss = r.run.metrics['eval/loss']
    color = f'C{1 + shapes.index(r.shape)}' if r.shape in shapes else 'C0'
    ax.plot(step, loss, '.-', color=color,
            label=f'real {r.shape}, {r.run.path.name}')  # fmt: skip
  for color, shape in enumerate(shapes, 1):
    middle = _middle(grid, focus, results, shape)
    size = 4 + 3 * (len(shapes) - color)  # rings: equal losses stay visible
    ax.plot(*middle, 'o--', color=f'C{color}', fillstyle='none',
            markersize=size,
            label=f'emulated {shape}')  # fmt: skip
  for job, losses in results.items():
    if (job.end, job.window) in focus and job.source == 'raw':
      color = f'C{1 + shapes.index(job.shape)}'
      label = f'{job.shape}, raw checkpoints'
      ax.plot(job.end, losses.mean(), 'x', color=color, label=label)
  # The first quarter would hide the rest.
  shown = run.metrics['eval/loss'].value
  shown = shown[len(shown) // 4 :]
  low = min(losses.mean() for losses in [*results.values(), shown])
  pad = 0.15 * (shown.max() - low)
  ax.set(xlabel='step', ylabel='validation loss (nats)',
         ylim=(low - pad, shown.max() + pad))  # fmt: skip
  windows = ', '.join(f'{w} steps until {e}' for e, w in dict.fromkeys(focus))
  ax.set_title(f'windows: {windows}; elsewhere the middle one', fontsize=8)
  ax.legend(fontsize=7)


def _middle(grid, focus, results, shape):
  """Returns end steps and losses: of focus there, else of the middle window."""
  found = {}
  for job, losses in results.items():
    windows = sorted(w for e, w in grid if e == job.end) or [0]
    window = dict(focus).get(job.end, windows[len(windows) // 2])
    if job.shape == shape and job.window == window:
      found[job.end] = losses.mean()
  ends = sorted(found)
  return ends, [found[e] for e in ends]


def _heat(ax, shape: str, cells: Mapping, gain: Mapping, limit: float):
  """Cells (end, window) -> loss as text, gain as colour."""
  ends: Sequence[int] = sorted({e for e, _ in cells})
  rank = max(sum(e == end for e, _ in cells) for end in ends)
  table = np.full((rank, len(ends)), np.nan)
  for column, end in enumerate(ends):
    windows = sorted(w for e, w in cells if e == end)
    for row, window in enumerate(windows):
      table[row, column] = gain[end, window]
      text = f'{cells[end, window]:.3f}\n{window} steps'
      ax.text(column, row, text, ha='center', va='center', fontsize=7)
  ax.set(title=f'loss after a {shape} decay', xlabel='end step', yticks=[],
         xticks=range(len(ends)), xticklabels=ends)  # fmt: skip
  ax.set_ylabel('longer window →')
  return ax.imshow(table, cmap='PiYG', vmin=-limit, vmax=limit, alpha=0.6,
                   aspect='auto', origin='lower')  # fmt: skip


def report(rows: Sequence[Mapping]) -> figure.Figure:
  """Draws every merge with its paired interval, a panel per window.

  Its loss minus that of the real cooldown, or else of the last checkpoint.
  """
  windows = list(dict.fromkeys(row['window'] for row in rows))
  merges = [row for row in rows if row['source'] != 'real']
  names = list(dict.fromkeys(f'{r["shape"]}, {r["source"]}' for r in merges))
  fig = figure.Figure(
    figsize=(2 + 2.8 * len(windows), 1.6 + 0.3 * len(names)),
    layout='constrained',
  )
  panels = fig.subplots(1, len(windows), sharey=True, squeeze=False)[0]
  for ax, window in zip(panels, windows, strict=True):
    here = [row for row in rows if row['window'] == window]
    against = 'the real cooldown' if _differences(ax, here, names) else 'last'
    ax.set(title=f'{window} steps', xlabel=f'loss minus {against} (nats)',
           yticks=range(len(names)), yticklabels=names)  # fmt: skip
  panels[0].invert_yaxis()
  both = [ax.get_legend_handles_labels() for ax in panels]
  labels = {label: x for pair in both for x, label in zip(*pair, strict=True)}
  fig.legend(labels.values(), labels, loc='outside lower center', fontsize=7)
  return fig


def _differences(ax, rows, names) -> bool:
  """Returns whether they are differences from real cooldowns."""
  real = [row for row in rows if row['source'] == 'real']
  for row in rows:
    if row['source'] == 'real':
      continue
    d = row['behind'] if real else -row['gain']
    ax.errorbar(
      d.mean, names.index(f'{row["shape"]}, {row["source"]}'),
      xerr=[[d.mean - d.low], [d.high - d.mean]], fmt='o', color='0.2',
      capsize=2, label='merge: 95 % interval of the paired difference',
    )  # fmt: skip
  ax.axvline(0, color='C0' if real else '0.6', linewidth=0.8)
  for i, row in enumerate(real):
    ax.axvline(row['gain'].mean, color=f'C{i}', linestyle=':',
               label=f'no decay (real: {row["shape"]})')  # fmt: skip
  return bool(real)
