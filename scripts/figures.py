"""Figures from plain numbers; `scripts.plot` has the command, and gathers what they show.

Every function returns a matplotlib Figure and leaves no global state. Colours are those of Okabe
and Ito and, for maps, cividis: told apart by every eye; what a colour says is said by a shape or a
word as well. The same numbers give the same bytes.
"""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

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
    fit = max(1, int(12 / (0.75 + 0.55 * wide)))
    most = max(map(len, groups))
    across = math.ceil(most / math.ceil(most / fit))  # lines of about the same length
    lines = [group[i : i + across] for group in groups for i in range(0, len(group), across)]
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


WAYS = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]  # label from point


class Point(NamedTuple):
    """One method in a plane: `x` its cost, `y` its accuracy with a deviation where it has one."""

    label: str
    x: float
    y: float
    std: float | None = None
    kind: str = "ours"  # or "peeks", "published"


# What a kind of point looks like, and how the legend calls it.
KINDS = {
    "ours": ("o", BLUE, "ours"),
    "peeks": ("s", ORANGE, f"ours, best epoch on the test set {DAGGER}"),
    "published": ("D", GREY, "published"),
}


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats: none has a higher accuracy at the same or a lower cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y, p.label)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def _of(kind: str, points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.kind == kind]


@styled
def pareto(panels: Mapping[str, Sequence[Point]], xlabel: str, ylabel: str, note: str) -> Figure:
    """Accuracy against a cost on a logarithmic axis. The front of each kind is a line through full
    markers; what is beaten is hollow. Whoever peeked at the test set competes with nobody."""
    figure = Figure(figsize=(0.9 + 5.4 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    seen = set()
    for axis, (title, points) in zip(axes, panels.items()):
        axis.set_title(title, linespacing=1.3)
        axis.grid(True)
        low, high = min((p.x for p in points if p.x > 0), default=1.0), max(p.x for p in points)
        if any(p.x == 0 for p in points):  # nothing but the head
            axis.set_xscale("symlog", linthresh=low, linscale=0.4)
            axis.set_xlim(-0.15 * low, 2 * max(low, high))
        elif high > 5 * low:
            axis.set_xscale("log")
        if axis.get_xscale() != "linear":
            _few_ticks(axis, low, max(low, high))
        seen |= {p.kind for p in points}
        for kind, (marker, colour, _) in KINDS.items():
            of = _of(kind, points)
            best = front(of) if kind != "peeks" else []
            line = {"color": colour, "lw": 1.2, "zorder": 2}
            dashes = "--" if kind == "published" else "-"
            axis.step([p.x for p in best], [p.y for p in best], dashes, where="post", **line)
            for p in of:
                if p.std is not None:
                    axis.errorbar(p.x, p.y, p.std, color=colour, lw=0.8, capsize=2, zorder=3)
                face = colour if p in best else PAPER
                axis.plot(p.x, p.y, marker, color=colour, mfc=face, ms=6, zorder=4)
        axis.margins(x=0.12, y=0.12)
    for kind, (marker, colour, name) in KINDS.items():
        if kind in seen:
            axes[0].plot([], [], marker, color=colour, ms=6, label=name)
    axes[0].plot([], [], "-", color=INK, lw=1.2, label="Pareto front (full markers)")
    figure.legend(loc="outside upper center", ncols=4)
    figure.supxlabel(f"{xlabel}\n{note}" if note else xlabel, fontsize=9, linespacing=1.6)
    figure.supylabel(ylabel, fontsize=9)
    figure.draw_without_rendering()  # places must be known before names are put beside them
    figure.set_layout_engine("none")
    for axis, points in zip(axes, panels.values()):
        _name(axis, points)
    return figure


def _few_ticks(axis: Axes, low: float, high: float) -> None:
    """Round numbers, written out, on a logarithmic axis; 0 where it begins there."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) < 4 else (1, 3) if len(decades) < 5 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    shown = [0.0] * (axis.get_xscale() == "symlog") + [t for t in ticks if low <= t <= 2 * high]
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.xaxis.set_minor_locator(NullLocator())


def _name(axis: Axes, points: Sequence[Point]) -> None:
    """Writes each label where it meets no marker and no other label, with a leader where that is
    farther off; in the least crowded place where there is none."""
    renderer = FigureCanvasAgg(axis.figure).get_renderer()
    inside = axis.get_window_extent(renderer)
    taken = []
    for kind in ("ours", "published"):
        corners = [axis.transData.transform((p.x, p.y)) for p in front(_of(kind, points))]
        for (x, y), (right, top) in itertools.pairwise(corners):
            taken.append(Bbox.from_extents(x, y - 2, right, y + 2))
            taken.append(Bbox.from_extents(right - 2, y, right + 2, top))
    for p in points:
        x, y = axis.transData.transform((p.x, p.y))
        half = axis.transData.transform((p.x, p.y + (p.std or 0)))[1] - y
        taken += [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5)]
        taken += [Bbox.from_extents(x - 2, y - half, x + 2, y + half)]
    unit = axis.figure.dpi / 72  # pixels of a point
    for p in sorted(points, key=lambda p: (-p.y, p.x, p.label)):
        text = axis.annotate(
            p.label, (p.x, p.y), (0, 0), textcoords="offset points", fontsize=7.5, zorder=5
        )
        text.update_positions(renderer)
        size = Text.get_window_extent(text, renderer)
        x, y = axis.transData.transform((p.x, p.y))
        best = math.inf, None
        for far in (6, 11, 18, 27, 38, 52):
            for dx, dy in WAYS:
                shift = dx * far * (0.75 if dy else 1), dy * far
                left = x + shift[0] * unit - size.width * (1 - dx) / 2
                low = y + shift[1] * unit - size.height * (1 - dy) / 2
                box = Bbox.from_bounds(left, low, size.width, size.height)
                cost = _area(box) - _area(Bbox.intersection(box, inside)) + 0.05 * far
                cost += sum(_area(Bbox.intersection(box, other)) for other in taken)
                if cost < best[0]:
                    best = cost, (shift, dx, dy, far, box)
            if best[0] < 3:
                break
        shift, dx, dy, far, box = best[1]
        text.set_position(shift)
        text.set_ha({-1: "right", 0: "center", 1: "left"}[dx])
        text.set_va({-1: "top", 0: "center", 1: "bottom"}[dy])
        if far > 11:
            leader = {"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 0, "shrinkB": 3}
            axis.annotate("", (p.x, p.y), shift, textcoords="offset points", arrowprops=leader)
        taken.append(box)


def _area(box: Bbox | None) -> float:
    return box.width * box.height if box else 0.0


class Curve(NamedTuple):
    """One line of an ablation: (mean, deviation or None) at each of its values."""

    label: str
    values: Mapping[str, tuple[float, float | None]]
    published: bool = False


@styled
def curves(panels: Mapping[tuple[str, str], Sequence[Curve]], ylabel: str) -> Figure:
    """A panel for every (title, axis label); its values stand evenly, in the order they come in,
    and are joined where they are numbers. Published lines are dashed with hollow markers."""
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(1 + 3.6 * across, 0.6 + 3.1 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((title, xlabel), lines) in zip(axes.flat, panels.items()):
        order = list(dict.fromkeys(x for line in lines for x in line.values))
        named = any(x[:1].isalpha() and x != "all" for x in order)  # no scale: nothing to join
        for i, line in enumerate(lines):
            xs = [order.index(x) for x in line.values]
            ys, stds = zip(*line.values.values())
            colour = COLOURS[i % len(COLOURS)]
            face = PAPER if line.published else colour
            axis.errorbar(
                xs,
                ys,
                [std or 0 for std in stds] if any(stds) else None,
                marker=MARKERS[i % len(MARKERS)],
                mfc=face,
                color=colour,
                ls="none" if named else "--" if line.published else "-",
                lw=1.4,
                capsize=2,
                label=line.label + " (published)" * line.published,
            )
        crowded = sum(map(len, order)) > 34
        turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axis.set_xticks(range(len(order)), order, **turned)
        axis.margins(x=0.08, y=0.2)
        axis.grid(axis="y")
        alone = f"\n{lines[0].label}" if len(lines) == 1 else ""
        axis.set_title(title + alone, linespacing=1.3)
        axis.set_xlabel(xlabel)
        if not alone:
            axis.legend(fontsize=7.5)
    figure.supylabel(ylabel, fontsize=9)
    return figure


class Pair(NamedTuple):
    """Ours beside the published: (mean, deviation or None), or None where there is none."""

    ours: tuple[float, float | None] | None
    published: float | None
    kind: str = "ours"


@styled
def beside(rows: Sequence[str], panels: Mapping[str, Sequence[Pair]], note: str) -> Figure:
    """A panel for each column of the table, a line for each row: diamond published, dot ours, and
    the difference in words."""
    size = 1.6 + 2.5 * len(panels), 1.3 + 0.27 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    seen = set()
    for axis, (title, pairs) in zip(axes, panels.items()):
        axis.set_title(title)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y")
        for y, (ours, published, kind) in enumerate(pairs):
            if published is not None:
                axis.plot(published, y, "D", color=GREY, ms=5.5, zorder=3)
                seen.add("published")
            if ours is None:
                continue
            marker, colour, _ = KINDS[kind]
            seen.add(kind)
            mean, std = ours
            axis.errorbar(mean, y, xerr=std, color=colour, lw=1, capsize=2, zorder=4)
            axis.plot(mean, y, marker, color=colour, ms=6, zorder=5)
            if published is not None:
                axis.plot([published, mean], [y, y], color=GREY, lw=1.6, zorder=2)
                text = f"{mean - published:+.1f}".replace("-", "−")
                axis.text(1.02, y, text, transform=axis.get_yaxis_transform(), va="center")
        axis.margins(x=0.08)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    for kind in sorted(seen, key=[*KINDS].index):
        marker, colour, name = KINDS[kind]
        axes[0].plot([], [], marker, color=colour, ms=6, label=name)
    figure.legend(loc="outside upper center", ncols=3)
    figure.supxlabel(f"top-1 accuracy on the test split, percent\n{note}".rstrip(), fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure without dates or versions in it, in one step."""
    if path.suffix not in {".png", ".svg"}:
        raise ValueError(f"{path} is neither .png nor .svg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write(path, rendered(figure, path.suffix[1:]))


def rendered(figure: Figure, kind: str, words: bool = False) -> bytes:
    """A figure as png or svg; with `words` an SVG keeps its words, in the reader's font."""
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    content = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none" if words else "path"}):
        figure.savefig(content, format=kind, dpi=160, metadata=metadata)
    return content.getvalue()
