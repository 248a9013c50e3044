"""Figures from plain numbers; `scripts.plot` has the command, and gathers what they show.

Every function returns a matplotlib Figure and leaves no global state. Colours are those of Okabe
and Ito and, for maps, cividis: told apart by every eye; what a colour says is said by a shape or a
word as well. The same numbers give the same bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from peft import record as records

INK, GREY, RULE, PAPER = "#111111", "#6E6E6E", "#E4E4E4", "#FFFFFF"
BLUE, ORANGE = "#0072B2", "#D55E00"
DARK, LIGHT = "#000000", "#FFFFFE"  # on coloured ground: the same on a light and on a dark page
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#B8860B", "#56B4E9", INK)
MARKERS = "osD^vPX"
DAGGER = "†"  # the epoch was chosen on the test set
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that widths are the same everywhere
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "visual-peft-bench",
}


class Map(NamedTuple):
    """Scores over two axes: `scores[y, x]`; what is absent was not run or diverged."""

    title: str
    xs: list[float]
    ys: list[float]
    scores: Mapping[tuple[float, float], float]
    chosen: set[tuple[float, float]]


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws under the house's style, whatever the reader's matplotlibrc says."""

    @wraps(draw)
    def inside(*arguments: object, **options: object) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return inside


@styled
def heat_maps(groups: Sequence[Sequence[Map]], xlabel: str, ylabel: str, note: str) -> Figure:
    """A panel for each map, coloured on a scale of its own; a frame and a star mark the choice.
    Every group begins a new line."""
    wide, high = (max(len(m[i]) for group in groups for m in group) for i in (1, 2))
    fit = max(1, int(10 / (0.75 + 0.55 * wide)))
    lines = [group[i : i + fit] for group in groups for i in range(0, len(group), fit)]
    across = max(map(len, lines))
    size = max(0.8 + across * (0.75 + 0.55 * wide), 3.6), 0.75 + len(lines) * (0.75 + 0.34 * high)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lines), across, squeeze=False)
    for row, line in zip(axes, lines):
        for axis in row[len(line) :]:
            axis.set_visible(False)
        for axis, panel in zip(row, line):
            _heat_map(axis, panel)
    figure.supxlabel(f"{xlabel}\n{note}", fontsize=9, linespacing=1.6)
    figure.supylabel(ylabel, fontsize=9)
    return figure


def _heat_map(axis: Axes, panel: Map) -> None:
    table = np.array([[panel.scores.get((y, x), np.nan) for x in panel.xs] for y in panel.ys])
    low, high = np.nanmin(table), np.nanmax(table)
    axis.pcolormesh(table, cmap="cividis", vmin=low - 1e-9, edgecolors=PAPER, linewidth=1.5)
    for (y, x), score in np.ndenumerate(table):
        picked = (panel.ys[y], panel.xs[x]) in panel.chosen
        text = "–" if np.isnan(score) else f"{'★' if picked else ''}{score:.1f}"
        dark = score < (low + high) / 2  # never for NaN
        axis.text(
            x + 0.5,
            y + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=7.5,
            color=LIGHT if dark else INK if np.isnan(score) else DARK,
            fontweight="bold" if picked else "normal",
        )
        if picked:
            frame = Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, fill=False, edgecolor=ORANGE, lw=2)
            axis.add_patch(frame)
    axis.set_xticks(np.arange(len(panel.xs)) + 0.5, [f"{x:g}" for x in panel.xs])
    axis.set_yticks(np.arange(len(panel.ys)) + 0.5, [f"{y:g}" for y in panel.ys])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(panel.title, linespacing=1.3)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure without dates or versions in it, in one step."""
    if path.suffix not in {".png", ".svg"}:
        raise ValueError(f"{path} is neither .png nor .svg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write(path, rendered(figure, path.suffix[1:]))


def rendered(figure: Figure, kind: str) -> bytes:
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, format=kind, dpi=160, metadata=metadata)
    return content.getvalue()
