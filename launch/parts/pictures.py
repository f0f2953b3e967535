"""Figures of commands (not a command)."""

import collections
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import figure, patches

from launch.parts import look


def emulation(
  run, real, grid, focus, results: Mapping, last: Mapping
) -> figure.Figure:
  """Draws the curves with the emulated ends, and a heat map per shape."""
  shapes = list(dict.fromkeys(job.shape for job in results))
  ends = len({end for end, _ in grid})
  width = max(8, len(shapes) * (0.7 + 0.7 * ends))
  fig = figure.Figure(figsize=(width, 7.2), layout='constrained')
  axes = fig.subplot_mosaic(
    [['curves'] * len(shapes), shapes], height_ratios=[1.4, 1]
  )
  best = {(j.end, j.window, j.shape): x.mean() for j, x in results.items()}
  windows = {e: sorted(w for end, w in grid if end == e) for e, _ in grid}
  size = lambda e, w: w if _alike(grid) else w / e
  middle = np.median([size(e, w) for e, w in grid])
  far = lambda e, w: abs(size(e, w) - middle)
  shown = {e: min(x, key=functools.partial(far, e)) for e, x in windows.items()}
  _curves(axes['curves'], run, real, shown, best, last)
  beside = sorted({*focus} - {*shown.items()})
  _marks(axes['curves'], beside, shapes, best)
  _raw(axes['curves'], focus, results, shapes)
  axes['curves'].legend(fontsize=8)
  gains = {(e, w, s): last[e].mean() - best[e, w, s]
           for e, w in grid for s in shapes}  # fmt: skip
  limit = max(map(abs, gains.values()))
  for shape in shapes:
    cells = {(e, w): (best[e, w, shape], gains[e, w, shape]) for e, w in grid}
    framed = {*shown.items(), *focus}
    image = _heat(axes[shape], shape, cells, limit, framed)
  axes[shapes[0]].set_ylabel('longer window →')
  fig.colorbar(image, ax=axes[shape], label='gain over no decay (nats)')
  return fig


def _curves(
  ax, run, real, shown: Mapping, best: Mapping, last: Mapping
) -> None:
  """Draws what was trained, and the emulated ends with windows of `shown`."""
  known = dict(zip(*run.metrics['eval/loss'], strict=True))
  known |= {end: losses.mean() for end, losses in last.items()}
  step, loss = zip(*sorted(known.items()), strict=True)
  ax.plot(step, loss, '.-', color='0.6', label='constant rate')
  shapes = list(dict.fromkeys(shape for _, _, shape in best))
  kinds = list(dict.fromkeys([*shapes, *(r.shape for r in real)]))
  for r in real:  # in the colour of its shape
    style = look.style(kinds.index(r.shape), linestyle='-', marker='o')
    ax.plot(*r.run.metrics['eval/loss'], **style,
            label=f'real {r.shape}, {r.run.path.name}')  # fmt: skip
  for i, shape in enumerate(shapes):
    ends = [e for e in sorted(shown) if (e, shown[e], shape) in best]
    style = look.style(i, linestyle='--', lw=1, ms=5, fillstyle='none')
    ax.plot(ends, [best[e, shown[e], shape] for e in ends],
            transform=_beside(ax, i, shapes), label=f'emulated {shape}',
            **style)  # fmt: skip
  # The first quarter would hide the rest.
  seen = [*loss[len(loss) // 4 :], *(r.losses.mean() for r in real)]
  seen += [x for (e, w, _), x in best.items() if shown[e] == w]
  pad = 0.1 * (max(seen) - min(seen))
  ax.set(xlabel='step', ylabel='validation loss (nats)',
         ylim=(min(seen) - pad, max(seen) + pad))  # fmt: skip
  title = 'open, side by side: decays to one step, of the windows framed below'
  ax.set_title(title, fontsize=10)


def _marks(ax, cells, shapes, best: Mapping) -> None:
  """Draws windows beside those that a line joins, and says so."""
  for end, window in cells:
    more = f'{ax.get_title()}; at {end} also {window} steps'
    ax.set_title(more, fontsize=10)
    for i, shape in enumerate(shapes):
      style = look.style(i, linestyle='', ms=5, fillstyle='none')
      ax.plot(end, best[end, window, shape], **style,
              transform=_beside(ax, i, shapes))  # fmt: skip


def _raw(ax, focus, results, shapes) -> None:
  label = 'emulated from raw checkpoints'
  for job, losses in results.items():
    if (job.end, job.window) in focus and job.source == 'raw':
      ax.plot([], [], 'x', color='0.3', label=label)
      i, label = shapes.index(job.shape), ''
      ax.plot(job.end, losses.mean(), 'x', ms=5, color=look.style(i)['color'],
              transform=_beside(ax, i, shapes))  # fmt: skip


def _beside(ax, i, shapes):
  """Side by side: equal losses stay visible."""
  return look.shifted(ax, 7 * (i - (len(shapes) - 1) / 2), 0)


def _alike(cells) -> bool:
  """Whether all ends have the same windows, else the same shares of them."""
  most = max(collections.Counter(end for end, _ in cells).values())
  return len({window for _, window in cells}) == most


def _heat(ax, shape: str, cells: Mapping, limit: float, framed):
  """Cells (end, window) -> loss as text, gain as colour; some are framed."""
  ends: Sequence[int] = sorted({e for e, _ in cells})
  rank = max(sum(e == end for e, _ in cells) for end in ends)
  table = np.full((rank, len(ends)), np.nan)
  same = sorted({w for _, w in cells})
  for column, end in enumerate(ends):
    windows = sorted(w for e, w in cells if e == end)
    if _alike(cells):
      windows = [w if w in windows else None for w in same]
    else:  # of an early end the short ones are the same
      windows = [None] * (rank - len(windows)) + windows
    for row, window in enumerate(windows):
      box = patches.Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, lw=1.5)
      text = 'not\ncomputed'
      box.set(facecolor='0.93', edgecolor='0.93')
      if window is not None:
        loss, table[row, column] = cells[end, window]
        text = f'{loss:.3f}\nwindow {window}'
        if table[row, column] < 0:  # grey print has no signs
          text += '\nworse'
        edge = 'black' if (end, window) in framed else 'none'
        box.set(facecolor='none', edgecolor=edge)
      ax.add_patch(box)
      ax.text(column, row, text, ha='center', va='center', fontsize=7)
  ax.set(title=f'loss after a {shape} decay', xlabel='end step', yticks=[],
         xticks=range(len(ends)), xticklabels=ends)  # fmt: skip
  ax.title.set_fontsize(10)
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
    real = _differences(ax, here, names)
    against = 'real cooldown' if real else 'last checkpoint'
    title = f'decay over {window} steps' if window else 'merges, no window'
    ax.set(xlabel=f'loss minus {against} (nats)', yticks=range(len(names)),
           yticklabels=names)  # fmt: skip
    ax.set_title(title, fontsize=10)
    ax.locator_params(axis='x', nbins=5)
  panels[0].invert_yaxis()
  both = [ax.get_legend_handles_labels() for ax in panels]
  labels = {label: x for pair in both for x, label in zip(*pair, strict=True)}
  look.legend(fig, list(labels.values()), list(labels))
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
      ms=3, capsize=4,
      label='merge: 95 % interval of the paired difference',
    )  # fmt: skip
  if real:
    ax.axvline(0, color='0.5', zorder=0, label='real cooldown')
  # Without a real cooldown, all are differences from the last checkpoint.
  for i, x in enumerate([row['gain'].mean for row in real] or [0]):
    label = 'last checkpoint, no decay'
    label += f' (minus real {real[i]["shape"]})' if len(real) > 1 else ''
    ax.axvline(x, label=label, zorder=0, **look.style(i + 1, marker=''))
  return bool(real)
