"""Plots of our own runs, from their records alone, and of the papers' numbers beside them.

    python -m scripts.plot KIND [RUNS_DIR] [--out FILE.png|FILE.svg] [--published PAPER/TABLE]
                                [--protocol NAME] [--where KEY=VALUE] [--over KEY]

KIND   params      accuracy against tuned parameters, with the Pareto front
       memory      accuracy against the peak memory of training
       time        accuracy against the time of training
       heatmap     validation accuracy over learning rate and weight decay, with the chosen point
       ablation    accuracy over one hyper-parameter of a method: rank, experts, layers, location,
                   groups or any other that varies (--over KEY: that one alone)
       ranks       critical-difference diagram of the methods over the tasks
       seeds       every seed of every method and task, with mean and deviation
       published   ours beside the published, row by row (needs --published)

RUNS_DIR is results/records unless given. Without --out both KIND.png and KIND.svg are written, into
results/tables for the committed records and into RUNS_DIR for others.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scripts import figures, papers
from scripts.compare import Grid, Printed, ablation, beside, cost, grid_of, printed, ranking
from scripts.figures import BLUE, DAGGER, ORANGE, save
from scripts.runs import (
    Cell,
    collect,
    column_of,
    column_order,
    peeks,
    row_of,
    row_order,
    title_of,
)
from scripts.tables import DASH, text_of
from scripts.tabulate import RECORDS, TABLES, WHERE, under


def accuracy_plot(found: Iterable[dict], path: str | Path) -> None:
    """Draws the test accuracy of every final run into `path` (.png or .svg), atomically.

    Raises ValueError as `tabulate.cells` does, and where there is no final run.
    """
    save(seeds(found), Path(path))


def heat_map(found: Iterable[dict], path: str | Path) -> None:
    """Draws the validation accuracy of grid runs over learning rate × weight decay, a panel for
    every method and task, and marks the point that their final runs took. Where a grid varies more
    than these two, a field shows the best of what it stands for.

    Raises ValueError where there is no grid run, and for a `path` neither .png nor .svg.
    """
    save(heatmap(list(found)), Path(path))


@figures.styled
def seeds(found: Iterable[dict]) -> Figure:
    """One panel per task, one line per row: a small dot for every seed, a large one for their mean,
    so that a spread is seen and not only stated."""
    grid = grid_of(found)
    columns = sorted({column for row in grid.values() for column in row}, key=column_order)
    rows = row_order(grid)
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    lines = 0.36 if any(variant for _, variant, _ in rows) else 0.28
    size = 1.0 + 2.9 * across, 0.35 + down * (0.9 + lines * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, column in zip(axes.flat, columns):
        _panel(axis, [grid[row].get(column) for row in rows])
        some = next(grid[row][column] for row in rows if column in grid[row])
        classes = some.record["config"]["dataset"]["num_classes"]
        axis.set_title(f"{title_of(column, grid)}\n{classes} classes", linespacing=1.3)
    several = len({backbone for _, _, backbone in rows}) > 1
    axes[0, 0].set_yticks(range(len(rows)), [_seed_label(row, grid, several) for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)  # the first row on top, as in the table
    figure.supxlabel("top-1 accuracy on the test split, percent", fontsize=9)
    return figure


def _seed_label(row: tuple, grid: Grid, several_backbones: bool) -> str:
    method, variant, backbone = row
    marked = any(peeks(cell.record) for cell in grid[row].values())
    name = method + DAGGER * marked + f"\n{variant}" * bool(variant)
    return name + f"\n{backbone}" * several_backbones


def _panel(axis: Axes, column: Sequence[Cell | None]) -> None:
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    beside = axis.get_yaxis_transform()  # x in widths of the panel, y in data
    for y, cell in enumerate(column):
        if cell is None:
            axis.text(1.04, y, DASH, transform=beside, va="center")
            continue
        colour = ORANGE if peeks(cell.record) else BLUE
        if len(cell.top1) > 1:
            seeds = list(cell.top1.values())
            axis.plot(seeds, [y] * len(seeds), "o", color=colour, markersize=3.5, alpha=0.5, mew=0)
        axis.plot(cell.mean, y, "o", color=colour, markersize=7, mew=0, clip_on=False)
        axis.text(1.04, y, text_of(cell.mean, cell.std, 1), transform=beside, va="center")
    values = [top1 for cell in column if cell is not None for top1 in cell.top1.values()]
    # At least five points wide, so that noise does not look like a result.
    middle, half = (min(values) + max(values)) / 2, max((max(values) - min(values)) / 2, 2.5)
    axis.set_xlim(max(middle - 1.1 * half, -1), min(middle + 1.1 * half, 100.5))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def heatmap(found: Sequence[dict]) -> Figure:
    return figures.heat_maps(*_maps(found))


def _maps(found: Sequence[dict]) -> tuple[list[list[figures.Map]], str, str, str]:
    grid = {record["key"]: record for record in found if record["phase"] == "grid"}
    if not grid:
        raise ValueError("There is no grid run to draw; only sweeps with a grid leave them.")
    panels: dict[tuple, tuple[list[dict], list[dict]]] = {}  # the tried, and who chose from them
    left = dict(grid)
    for final in found:
        tried = [grid[key] for key in final["selected_from"] if key in grid]
        if final["phase"] == "final" and tried:
            name = *row_of(final), column_of(final)
            panels.setdefault(name, (tried, []))[1].append(final)
            for record in tried:
                left.pop(record["key"], None)
    for record in left.values():  # nobody has chosen yet
        panels.setdefault((*row_of(record), column_of(record)), ([], []))[0].append(record)
    several = [len({name[part] for name in panels}) > 1 for part in range(3)]
    groups: dict[tuple, list[figures.Map]] = {}
    folded = False
    for name in sorted(panels, key=lambda name: (name[:3], column_order(name[3]))):
        tried, finals = panels[name]
        scores: dict[tuple[float, float], float] = {}
        for record in tried:
            place, score = _point(record), record["metrics"]["top1_val"]
            folded |= place in scores
            scores[place] = max(score, scores.get(place, -math.inf))
        title = tried[0]["config"]["dataset"].get("title") or tried[0]["task"]
        row = ", ".join(part for part, many in zip(name, several) if many and part)
        groups.setdefault(name[:3], []).append(
            figures.Map(
                f"{title}\n{row}" if row else title,
                sorted({x for _, x in scores}),
                sorted({y for y, _ in scores}),
                scores,
                {_point(final) for final in finals} & scores.keys(),
            )
        )
    note = "top-1 accuracy on the validation split, percent; ★ chosen"
    if folded:
        note += "; each field the best over the other values tried"
    return [*groups.values()], "learning rate", "weight decay", note


def _point(record: dict) -> tuple[float, float]:
    return record["config"]["optim"]["weight_decay"], record["config"]["optim"]["lr"]


DRAW: dict[str, Callable[[Sequence[dict], Printed | None], Figure]] = {
    "params": lambda found, table: cost(found, "params", table),
    "memory": lambda found, table: cost(found, "memory"),
    "time": lambda found, table: cost(found, "time"),
    "heatmap": lambda found, table: heatmap(found),
    "ablation": lambda found, table: ablation(found, None, table),
    "ranks": ranking,
    "seeds": lambda found, table: seeds(found),
    "published": lambda found, table: beside(papers.published_table(table.name, found)),
}
PUBLISHED_TOO = {"params", "ablation", "ranks", "published"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", choices=DRAW, metavar="KIND")
    parser.add_argument("folder", nargs="?", type=Path, default=RECORDS, metavar="RUNS_DIR")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--published", metavar="PAPER/TABLE", help="draw these numbers as well")
    parser.add_argument("--protocol", help="only the runs under this protocol")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help=WHERE)
    parser.add_argument("--over", metavar="KEY", help="the hyper-parameter of an ablation")
    options = parser.parse_args(arguments)
    table = printed(options.published) if options.published else None
    if table and options.kind not in PUBLISHED_TOO:
        raise ValueError(
            f"The papers print nothing for {options.kind}; --published goes with "
            f"{', '.join(sorted(PUBLISHED_TOO))}."
        )
    if options.kind == "published" and not table:
        raise ValueError("Which table? For example: published --published rlrr/table2.")
    nothing = table and not any(options.folder.rglob("record.json"))
    found = [] if nothing else under(collect(options.folder), options.protocol, options.where)
    if options.over and options.kind != "ablation":
        raise ValueError(f"--over goes with ablation, not with {options.kind}.")
    if options.over:
        figure = ablation(found, options.over.removeprefix("method."), table)
    else:
        figure = DRAW[options.kind](found, table)
    committed = options.folder.resolve().is_relative_to(RECORDS.resolve())
    folder = TABLES if committed else options.folder
    files = (
        [options.out] if options.out else [folder / f"{options.kind}.{e}" for e in ("png", "svg")]
    )
    for path in files:
        save(figure, path)
        print(f"written: {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
