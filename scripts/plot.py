"""Plots of our own runs, from their records alone.

    python -m scripts.plot RUNS_DIR FILE.png|FILE.svg

One panel per task, one line per method: a small dot for every seed, a large one for their mean, so
that a spread is seen and not only stated.
"""

import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scripts.tabulate import (
    DAGGER,
    DASH,
    Cell,
    cells,
    collect,
    column_order,
    peeks,
    row_order,
    text_of,
    title_of,
)

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6E6E6E"  # of Okabe and Ito: told apart by every eye
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": GREY,
    "xtick.labelcolor": "black",
    "svg.hashsalt": "visual-peft-bench",  # the same figure gives the same bytes
}


def accuracy_plot(found: Iterable[dict], path: str | Path) -> None:
    """Draws the test accuracy of every final run into `path` (.png or .svg), atomically.

    Raises ValueError as `tabulate.cells` does, and where there is no final run.
    """
    grid = cells(found)
    if not grid:
        raise ValueError("There is no final run to draw; only final runs have a test accuracy.")
    with matplotlib.rc_context(STYLE):
        save(_accuracies(grid), Path(path))


def _accuracies(grid: dict[tuple, dict[tuple, Cell]]) -> Figure:
    columns = sorted({column for row in grid.values() for column in row}, key=column_order)
    rows = row_order(grid)
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    size = 1.0 + 2.9 * across, 0.35 + down * (0.9 + 0.28 * len(rows))
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
    axes[0, 0].set_yticks(range(len(rows)), [_label(row, grid, several) for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)  # the first row on top, as in the table
    figure.supxlabel("top-1 accuracy on the test split, percent", fontsize=9)
    return figure


def _label(row: tuple, grid: dict, several_backbones: bool) -> str:
    method, variant, backbone = row
    marked = any(peeks(cell.record) for cell in grid[row].values())
    name = method + DAGGER * marked + f"\n{variant}" * bool(variant)
    return name + f"\n{backbone}" * several_backbones


def _panel(axis: Axes, column: Sequence[Cell | None]) -> None:
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
        axis.plot(cell.mean, y, "o", color=colour, markersize=7, mew=0)
        axis.text(1.04, y, text_of(cell.mean, cell.std, 1), transform=beside, va="center")
    values = [top1 for cell in column if cell is not None for top1 in cell.top1.values()]
    # At least five points wide, so that noise does not look like a result.
    middle, half = (min(values) + max(values)) / 2, max((max(values) - min(values)) / 2, 2.5)
    axis.set_xlim(max(middle - 1.1 * half, -1), min(middle + 1.1 * half, 100.5))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def save(figure: Figure, path: Path) -> None:
    """Writes a figure without dates or versions in it, in one step."""
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}
    if path.suffix not in {".png", ".svg"}:
        raise ValueError(f"{path} is neither .png nor .svg.")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=160, metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.getvalue())
    os.replace(part, path)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        raise ValueError("Two arguments are needed: the folder of the runs and the file to write.")
    accuracy_plot(collect(arguments[0]), arguments[1])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(str(error))
