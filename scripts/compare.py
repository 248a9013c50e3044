"""What own runs and published tables have to say about each other: costs, ranks, ablations.

Each function gathers the numbers and returns the Figure that shows them. Only what is complete is
averaged: a mean over tasks is taken over tasks that every compared row has.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from scripts import figures, ranks
from scripts.figures import DAGGER
from scripts.tabulate import Cell, cells, column_order, peeks, row_order, title_of

Grid = Mapping[tuple, Mapping[tuple, Cell]]  # rows (method, variant, backbone), then columns


def final_cells(found: Iterable[dict]) -> Grid:
    grid = cells(found)
    if not grid:
        raise ValueError("There is no final run to draw; only final runs have a test accuracy.")
    return grid


def row_of(record: dict) -> tuple[str, str, str]:
    return record["method"], record["variant"], record["backbone"]


def column_of(record: dict) -> tuple[str, str, str]:
    return record["suite"], record["group"], record["task"]


def whole(grid: Grid) -> tuple[list[tuple], list[tuple]]:
    """The rows and columns to compare: a set of columns and the rows that have them all, chosen so
    that as many cells as possible are used. What is left out is said below a figure."""
    columns = {column for row in grid.values() for column in row}
    count = {column: sum(column in row for row in grid.values()) for column in columns}
    best: tuple[tuple[int, int], list, list] = (0, 0), [], []
    for least in sorted(set(count.values())):
        kept = sorted((c for c in columns if count[c] >= least), key=column_order)
        rows = [row for row in grid if grid[row].keys() >= set(kept)]
        size = len(rows) * len(kept), len(kept)
        if size > best[0]:
            best = size, rows, kept
    return best[1:]


def _mean(grid: Grid, row: tuple, columns: Sequence[tuple]) -> tuple[float, float | None]:
    """Mean over tasks, and its deviation taking them as independent; None with one seed."""
    of = [grid[row][column] for column in columns]
    mean = statistics.fmean(cell.mean for cell in of)
    if any(cell.std is None for cell in of):
        return mean, None
    return mean, math.sqrt(sum(cell.std**2 for cell in of)) / len(of)


def _panels(found: Iterable[dict], *also: str) -> dict[str, tuple[Grid, list, list, str]]:
    """Title -> the grid of one suite and backbone (and device, for what depends on it), the rows
    and columns compared, and what was left out."""
    grid = final_cells(found)
    parts: dict[tuple, dict[tuple, dict[tuple, Cell]]] = {}
    for row, columns in grid.items():
        for column, cell in columns.items():
            name = column[0], row[2], *(cell.record[field] for field in also)
            parts.setdefault(name, {}).setdefault(row, {})[column] = cell
    panels = {}
    for name, part in sorted(parts.items()):
        rows, columns = whole(part)
        tasks = [title_of(column, part) for column in columns]
        of = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
        left = [_label(row, part) for row in row_order(part) if row not in rows]
        left += [
            title_of(column, part)
            for column in sorted({c for row in part.values() for c in row} - {*columns})
        ]
        note = f"Left out, being incomplete: {', '.join(left)}." if left else ""
        panels[f"{', '.join(name)}\n{of}"] = part, rows, columns, note
    return panels


def _label(row: tuple, grid: Grid) -> str:
    method, variant, _ = row
    marked = any(peeks(cell.record) for cell in grid[row].values())
    return method + DAGGER * marked + f" ({variant})" * bool(variant)


COSTS = {
    "params": ("tuned_params", 1e6, "tuned parameters without the head, millions"),
    "memory": ("peak_memory_bytes", 2**20, "peak memory of training, MiB"),
    "time": ("seconds", 60, "time of training one run, minutes"),
}


def cost(found: Iterable[dict], kind: str) -> Figure:
    """Accuracy against one of COSTS, a panel per suite and backbone, and per device where the cost
    depends on it."""
    field, unit, xlabel = COSTS[kind]
    panels, notes = {}, []
    found = [record for record in found if record["phase"] == "final"]
    for title, (grid, rows, columns, note) in _panels(
        found, *(["device"] if kind != "params" else [])
    ).items():
        points = []
        for row in rows:
            mean, std = _mean(grid, row, columns)
            spent = {
                column: [r[field] for r in found if (row_of(r), column_of(r)) == (row, column)]
                for column in columns
            }
            x = statistics.fmean(statistics.fmean(values) for values in spent.values()) / unit
            peeking = any(peeks(grid[row][column].record) for column in columns)
            points.append(
                figures.Point(_label(row, grid), x, mean, std, "peeks" if peeking else "ours")
            )
        panels[title] = points
        notes += [note] if note else []
    return figures.pareto(panels, xlabel, "top-1 on the test split, percent", "\n".join(notes))


def ranking(found: Iterable[dict]) -> Figure:
    """The critical-difference diagram of every suite and backbone. Rows that peeked at the test set
    are left out, unless all did."""
    panels = []
    for title, (grid, rows, columns, note) in _panels(found).items():
        honest = [r for r in rows if not any(peeks(grid[r][c].record) for c in columns)]
        scores = {
            _label(row, grid): [grid[row][column].mean for column in columns]
            for row in honest or rows
        }
        title = title.partition("\n")[0]
        panel = ranks.rank(title, scores)
        if honest and len(honest) < len(rows):
            note += f" {DAGGER} left out: best epoch on the test set."
        panels.append(panel._replace(note=f"{panel.note}\n{note}".rstrip()))
    return ranks.critical_difference(panels)


def ablation(found: Iterable[dict], over: str | None = None) -> Figure:
    """Accuracy over one hyper-parameter, a panel for each method and each one of its that varies
    while the others stay, or for `over` alone.

    Raises ValueError where nothing varies.
    """
    panels: dict[tuple[str, str], list[figures.Curve]] = {}
    varied: set[str] = set()
    for title, (grid, *_) in _panels(found).items():
        suite = title.partition("\n")[0]
        for method in sorted({row[0] for row in grid}):
            own = {row: grid[row] for row in grid if row[0] == method}
            for key in sorted({k for row in own for k in _settings(own[row])}):
                lines = _lines(own, key)
                varied |= {key} if lines else set()
                if lines and over in (None, key):
                    panels[f"{method}, {suite}", key] = lines
    if not panels:
        there = f"; what varies is: {', '.join(sorted(varied))}" if varied else ""
        raise ValueError(
            f"No hyper-parameter {over or ''} of a method varies among these runs while the others "
            f"stay{there}. A sweep varies one with variants, e.g. 'sweep.variants="
            "{method.rank:[1,2,4,8]}'."
        )
    return figures.curves(panels, "top-1 on the test split, percent")


def _settings(row: Mapping[tuple, Cell]) -> dict[str, object]:
    """The hyper-parameters of a row's method; where it sits is one of them: `location`."""
    config = next(iter(row.values())).record["config"]["method"]
    kept = {k: v for k, v in config.items() if k not in {"name", "placements", "trainable"}}
    if {"sites", "position"} <= kept.keys():
        sites, position = kept.pop("sites"), kept.pop("position")
        names = {"qkv": "before MHA", "fc1": "before FFN", "proj": "after MHA", "fc2": "after FFN"}
        after = bool({*sites} & {"proj", "fc2"})
        kept["location"] = " +\n".join(names.get(site, site) for site in sites)
        if position != ("sequential_after" if after else "sequential_before"):
            kept["location"] += f"\n({position})"
    return kept


def _lines(rows: Grid, key: str) -> list[figures.Curve]:
    """A line for every setting of the other hyper-parameters under which `key` has more than one
    value; its points average the tasks that all of them have."""
    groups: dict[str, dict[str, tuple]] = {}
    for row, columns in rows.items():
        settings = _settings(columns)
        if key in settings:
            value = settings.pop(key)
            rest = ", ".join(f"{k}={v}" for k, v in sorted(settings.items()))
            groups.setdefault(rest, {})[_text(value)] = row
    groups = {rest: values for rest, values in groups.items() if len(values) > 1}
    lines = []
    for rest, values in sorted(groups.items()):
        columns, *others = (rows[row].keys() for row in values.values())
        shared = sorted(set(columns).intersection(*others), key=column_order)
        if not shared:
            continue
        means = {text: _mean(rows, values[text], shared) for text in sorted(values, key=_order)}
        tasks = f"mean of {len(shared)} tasks" if len(shared) > 1 else title_of(shared[0], rows)
        lines.append(figures.Curve(f"{tasks}; {rest}" if len(groups) > 1 else tasks, means))
    return lines


def _text(value: object) -> str:
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _order(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
