"""Whether methods differ over tasks: mean ranks, Friedman's test, Wilcoxon's with Holm's
correction, and the critical-difference diagram of Demšar (JMLR 2006).

Friedman asks whether any method differs; only where it says yes are pairs compared, by the signed
ranks of their differences over tasks (Benavoli, Corani & Mangili, JMLR 2016: unlike Nemenyi's, the
answer for a pair does not hang on which other methods are in the pool).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from scripts.figures import BLUE, GREY, INK, styled

LEVEL = 0.05
CAVEAT = (
    "Tasks are no independent samples (some share their images): read p as a guide, not a proof."
)


class Ranking(NamedTuple):
    """Mean ranks by name, best first; `alike`: ranges of positions that no test tells apart;
    `adjusted`: Holm's p of every pair, empty where Friedman saw no difference."""

    title: str
    ranks: Mapping[str, float]
    alike: Sequence[tuple[int, int]]
    adjusted: Mapping[tuple[str, str], float]
    note: str


def rank(title: str, scores: Mapping[str, Sequence[float]]) -> Ranking:
    """The ranking of methods by their scores on the same tasks, in the same order.

    Raises ValueError for fewer than three methods or two tasks.
    """
    names, table = list(scores), np.array(list(scores.values()), dtype=float)
    if len(names) < 3 or table.shape[1] < 2:
        raise ValueError(
            f"{title}: ranks are compared between three methods or more on two tasks or more that "
            f"all of them have; there are {len(names)} methods and {table.shape[-1]} such tasks."
        )
    tasks = table.shape[1]
    means = stats.rankdata(-table, axis=0).mean(axis=1)
    order = sorted(range(len(names)), key=lambda i: (means[i], names[i]))
    differ = not (table == table[0]).all()
    friedman = stats.friedmanchisquare(*table).pvalue if differ else 1.0
    adjusted = {}
    if friedman <= LEVEL:
        pairs = list(itertools.combinations(order, 2))
        raw = [signed_ranks(table[i] - table[j]) for i, j in pairs]
        adjusted = {(names[i], names[j]): p for (i, j), p in zip(pairs, holm(raw))}
    sorted_names = [names[i] for i in order]
    note = f"{tasks} tasks. Friedman: p = {friedman:.2g}"
    note += "; " if friedman <= LEVEL else ", so that no pair is compared; "
    note += f"a bar joins what Wilcoxon–Holm does not tell apart at {LEVEL:g}.\n{CAVEAT}"
    smallest = 2 ** (1 - tasks) * len(names) * (len(names) - 1) / 2
    if smallest > LEVEL:
        note += f"\nWith {tasks} tasks no pair of {len(names)} methods can be told apart at all."
    ranks = {names[i]: float(means[i]) for i in order}
    return Ranking(title, ranks, _alike(sorted_names, adjusted), adjusted, note)


def signed_ranks(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed ranks, exact with ties too, which accuracies of one decimal
    have (scipy's falls back on the normal distribution then); zeros are left out."""
    differences = differences[differences != 0]
    ranks = np.rint(2 * stats.rankdata(abs(differences).round(6))).astype(int)  # halves: doubled
    ways = np.zeros(ranks.sum() + 1)  # of every sum of positive ranks, over all signs
    ways[0] = 1
    for r in ranks:
        ways[r:] += ways[: len(ways) - r].copy()
    positive = ranks[differences > 0].sum()
    tail = ways[: min(positive, ranks.sum() - positive) + 1].sum() / ways.sum()
    return min(1.0, 2 * float(tail))


def holm(raw: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p values, in their own order."""
    adjusted, highest = [0.0] * len(raw), 0.0
    for step, i in enumerate(sorted(range(len(raw)), key=lambda i: raw[i])):
        highest = max(highest, min(1.0, raw[i] * (len(raw) - step)))
        adjusted[i] = highest
    return adjusted


def _alike(
    names: Sequence[str], adjusted: Mapping[tuple[str, str], float]
) -> list[tuple[int, int]]:
    """The longest ranges of neighbours in which no pair differs."""
    found: list[tuple[int, int]] = []
    for start in range(len(names)):
        stop = start
        while stop + 1 < len(names) and all(
            adjusted.get((names[i], names[stop + 1]), 1.0) > LEVEL for i in range(start, stop + 1)
        ):
            stop += 1
        if stop > start and (not found or stop > found[-1][1]):
            found.append((start, stop))
    return found


@styled
def critical_difference(panels: Sequence[Ranking]) -> Figure:
    """Methods on a scale of mean ranks, the best on the left; a bar joins what no test tells
    apart."""
    bottoms = [-_depth(panel) - 1 - 0.9 * len(panel.note.splitlines()) for panel in panels]
    heights = [0.2 * (3.4 - bottom) for bottom in bottoms]
    figure = Figure(figsize=(8.4, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel, bottom in zip(axes, panels, bottoms):
        _diagram(axis, panel)
        axis.set_ylim(bottom, 3.4)
    return figure


def _depth(panel: Ranking) -> float:
    """How far the lowest name is below the scale; a unit is a line."""
    return 0.8 + 0.55 * len(panel.alike) + 0.9 * (-(-len(panel.ranks) // 2) - 1)


def _diagram(axis: Axes, panel: Ranking) -> None:
    count = len(panel.ranks)
    left, middle, off = -(-count // 2), (1 + count) / 2, 0.04 * (count - 1)
    axis.axis("off")
    axis.set_xlim(1 - 0.4 * (count - 1), count + 0.4 * (count - 1))
    axis.text(middle, 2.4, panel.title, ha="center", va="bottom", fontweight="bold")
    axis.text(middle, 1.4, "mean rank over tasks, 1 is best", ha="center", va="bottom")
    axis.plot([1, count], [0, 0], color=INK, lw=1.2)
    for tick in range(1, count + 1):
        axis.plot([tick, tick], [0, 0.25], color=INK, lw=1.2)
        axis.text(tick, 0.35, str(tick), ha="center", va="bottom")
    ranks = list(panel.ranks.values())
    for place, (name, rank) in enumerate(panel.ranks.items()):
        near = place < left
        y = 0.9 * (left - 1 - (place if near else count - 1 - place)) - _depth(panel)
        end = 1 - off if near else count + off
        axis.plot([rank, rank, end], [0, y, y], color=GREY, lw=0.9)
        text = f"{name}, {rank:.2f}" if near else f"{rank:.2f}, {name}"
        beside = end - off / 5 if near else end + off / 5
        axis.text(beside, y, text, ha="right" if near else "left", va="center")
    for level, (start, stop) in enumerate(panel.alike):
        y = -0.5 - 0.55 * level
        ends = [ranks[start] - off / 7, ranks[stop] + off / 7]
        axis.plot(ends, [y, y], color=BLUE, lw=4, solid_capstyle="butt", zorder=3)
    axis.text(middle, -_depth(panel) - 1, panel.note, ha="center", va="top", linespacing=1.4)
