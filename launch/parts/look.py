"""What all figures have in common (not a command)."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker, transforms

# Okabe and Ito's colours without yellow: other readers than most tell them
# apart, too; in grey print, dashes and markers do.
_COLORS = (
  '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000',
)  # fmt: skip
_DASHES = ('-', '--', '-.', (0, (2, 1)))
_MARKERS = 'osDvPX*'


def style(i: int, **other: Any) -> dict[str, Any]:
  """Returns how the i-th of several things is drawn in all panels."""
  found = {'color': _COLORS[i % 7], 'linestyle': _DASHES[i % 4]}
  return {**found, 'marker': _MARKERS[i % 7], 'ms': 4, **other}


def legend(fig: Any, handles: Sequence, labels: Sequence, **options) -> None:
  """Puts a legend below the panels, where it covers nothing."""
  if not labels:
    return
  labels = [textwrap.fill(label, 90) for label in labels]
  longest = max(len(x) for label in labels for x in label.split('\n'))
  columns = int(72 * fig.get_figwidth() / (50 + 4.5 * longest))
  fig.legend(
    handles, labels, ncols=min(max(columns, 1), len(labels)), frameon=False,
    fontsize=8, title_fontsize=8, loc='upper center', bbox_to_anchor=(0.5, 0),
    **options,
  )  # fmt: skip


def logarithmic(ax: Any, which: str, at: Sequence[float] = ()) -> None:
  """Makes an axis, 'x' or 'y', logarithmic with plain numbers, well apart.

  At the values of `at`, where these are few.
  """
  getattr(ax, f'set_{which}scale')('log')
  axis = getattr(ax, f'{which}axis')
  decades = np.ptp(np.log10(getattr(ax, f'get_{which}lim')()))
  subs = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 2.9 else (1,)
  axis.set_major_locator(ticker.LogLocator(subs=subs))
  at = np.unique(at)
  gaps = np.diff(np.log(at))
  if 1 < at.size < 8 and min(gaps) > sum(gaps) / 9:
    axis.set_major_locator(ticker.FixedLocator(at))
  axis.set_major_formatter(ticker.StrMethodFormatter('{x:.3g}'))
  axis.set_minor_formatter(ticker.NullFormatter())


def shifted(ax: Any, x: float, y: float) -> transforms.Transform:
  """Returns the transform of data, moved by points, 1/72 inch."""
  scale = ax.figure.dpi_scale_trans
  return ax.transData + transforms.ScaledTranslation(x / 72, y / 72, scale)
