"""What own runs and published tables have to say about each other: costs, ranks, ablations.

Each function gathers the numbers and returns the Figure that shows them. Only what is complete is
averaged: a mean over tasks is taken over tasks that every compared row has.
"""

import collections
import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from scripts import figures, papers, published, ranks
from scripts.figures import DAGGER
from scripts.runs import Cell, cells, column_order, mean_of_means, peeks, row_order, title_of
from scripts.tables import Line, Table

Grid = Mapping[tuple, Mapping[tuple, Cell]]  # rows (method, variant, backbone), then columns


def grid_of(found: Iterable[dict]) -> Grid:
    grid = cells(found)
    if not grid:
        raise ValueError("There is no final run to draw; only final runs have a test accuracy.")
    return grid


def whole(grid: Grid, needed: Collection[str] = ()) -> tuple[list[tuple], list[tuple]]:
    """The rows and columns to compare: the `needed` tasks, or else as many cells as can be used by
    rows that share their columns. What is left out is said below a figure."""
    columns = {column for row in grid.values() for column in row}
    if needed:
        kept = sorted((column for column in columns if column[2] in needed), key=column_order)
        return [r for r in row_order(grid) if {c[2] for c in grid[r]} >= {*needed}], kept
    count = {column: sum(column in row for row in grid.values()) for column in columns}
    best: tuple[tuple[int, int], list, list] = (0, 0), [], []
    for least in sorted(set(count.values())):
        kept = sorted((c for c in columns if count[c] >= least), key=column_order)
        rows = [row for row in row_order(grid) if grid[row].keys() >= set(kept)]
        size = len(rows) * len(kept), len(kept)
        if size > best[0]:
            best = size, rows, kept
    return best[1:]


def _mean(grid: Grid, row: tuple, columns: Sequence[tuple]) -> tuple[float, float | None]:
    """Mean over tasks and its deviation; None with one seed."""
    return mean_of_means([[grid[row][column] for column in columns]])


def _panels(
    found: Iterable[dict], *also: str, beside: Mapping[str, Collection[str]] | None = None
) -> dict[str, tuple[Grid, list, list, str]]:
    """Title -> the grid of one suite and backbone (and device, for what depends on it), the rows
    and columns compared, and what was left out. `beside`: the tasks of a suite whose mean was
    published, so that one mean is over the same tasks as the other. Raises ValueError where there
    are runs and none is final."""
    grid = grid_of(found) if found else {}
    parts: dict[tuple, dict[tuple, dict[tuple, Cell]]] = {}
    for row, columns in grid.items():
        for column, cell in columns.items():
            name = column[0], row[2], *(cell.record[field] for field in also)
            parts.setdefault(name, {}).setdefault(row, {})[column] = cell
    panels = {}
    for name, part in sorted(parts.items()):
        rows, columns = whole(part, (beside or {}).get(name[0], ()))
        if not rows:
            continue
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


MEANS = {
    "mean_all": "mean over tasks",
    "mean_fgvc": "mean over tasks",
    "mean_group": "mean over groups",
}
AS_PRINTED = "Published numbers as printed (errata.md says which are doubtful)"


class Printed(NamedTuple):
    """A table of a paper. `rows`: (method, variant, backbone) -> score by data set or mean;
    `params`: the same -> trainable parameters in millions, where they are printed."""

    name: str
    benchmark: str
    rows: Mapping[tuple, Mapping[str, float]]
    params: Mapping[tuple, float]

    @property
    def tasks(self) -> list[str]:
        """The data sets that its means are over, or that it has."""
        means = published.averages(self.benchmark)
        groups = means.get("mean_all") or means.get("mean_fgvc")
        if groups:
            return [task for group in groups for task in group]
        return list(dict.fromkeys(name for cells in self.rows.values() for name in cells))

    def score(self, row: tuple) -> tuple[float, str]:
        """The number that stands for a row, and what it is."""
        means = published.recomputed(self.benchmark, {**self.rows[row]}) | {**self.rows[row]}
        for name, meaning in MEANS.items():
            if name in means:
                return means[name], meaning
        ((name, value),) = self.rows[row].items()
        return value, name

    def label(self, row: tuple, on: str | None = None) -> str:
        """Method and variant, and how the backbone differs from `on`, by default most rows'."""
        method, variant, backbone = row
        on = on or statistics.mode(backbone for _, _, backbone in self.rows)
        pairs = itertools.zip_longest(backbone.split("_"), on.split("_"))
        other = "_".join(
            a for a, _ in itertools.dropwhile(lambda pair: pair[0] == pair[1], pairs) if a
        )
        return method + f" ({', '.join(filter(None, (variant, other)))})" * bool(variant or other)


def printed(name: str) -> Printed:
    """A table by its name, e.g. rlrr/table2. Raises ValueError for one that is not there, that is
    several, or that holds no accuracies."""
    name, *others = papers.find(name)
    if others:
        raise ValueError(f"These are several tables, name one: {', '.join([name, *others])}.")
    paper, number = papers.catalogue()[name]
    frame = published.numbers(paper)
    frame = frame[(frame["table"] == number) & frame["metric"].isin(published.SCORES)]
    frame = frame[frame["benchmark"].isin(papers.SUITES)]
    if frame.empty:
        raise ValueError(f"{name} holds no accuracies of images on a benchmark of this suite.")
    rows: dict[tuple, dict[str, float]] = {}
    params = {}
    for line in frame.itertuples():
        backbone = f"{line.backbone}_{line.pretraining}".removesuffix("_unspecified")
        row = line.method, line.variant, backbone
        rows.setdefault(row, {})[line.dataset] = line.number
        if line.params_M:
            params[row] = float(line.params_M)
    return Printed(name, frame["benchmark"].iloc[0], rows, params)


COSTS = {
    "params": ("tuned_params", 1e6, "tuned parameters without the head, millions"),
    "memory": ("peak_memory_bytes", 2**20, "peak memory of training, MiB"),
    "time": ("seconds", 60, "minutes of training one run, beside whatever else ran"),
}


def cost(found: Iterable[dict], kind: str, table: Printed | None = None) -> Figure:
    """Accuracy against one of COSTS, a panel per suite and backbone, and per device where the cost
    depends on it; the published rows in the panel of theirs, or in one of their own."""
    field, unit, xlabel = COSTS[kind]
    panels, notes = {}, []
    also = ["device"] if kind != "params" else []
    if also:  # an evaluation of other runs cost no training
        found = [record for record in found if record["phase"] == "final"]
    same = {papers.SUITES[table.benchmark]: table.tasks} if table else {}
    for title, (grid, rows, columns, note) in _panels(found, *also, beside=same).items():
        points = []
        for row in rows:
            mean, std = _mean(grid, row, columns)
            spent = [[record[field] for record in grid[row][c].runs] for c in columns]
            x = statistics.fmean(map(statistics.fmean, spent)) / unit
            peeking = any(peeks(grid[row][column].record) for column in columns)
            points.append(
                figures.Point(_label(row, grid), x, mean, std, "peeks" if peeking else "ours")
            )
        panels[title] = points
        notes += [note] if note else []
    if table and kind == "params":
        notes.append(f"{AS_PRINTED}; some printed counts include a head.")
        for title, points in _printed_points(table).items():
            own = next((t for t in panels if t.startswith(f"{title}\n")), None)
            panels[own or f"{title}\n{table.name}"] = [*panels.get(own, []), *points]
    return figures.pareto(panels, xlabel, "top-1 on the test split, percent", "\n".join(notes))


def _printed_points(table: Printed) -> dict[str, list[figures.Point]]:
    """The rows of a table with their printed parameters, by suite and backbone; a row alone on its
    backbone stands among the others."""
    count = collections.Counter(backbone for _, _, backbone in table.params)
    if not count:
        raise ValueError(f"{table.name} prints no numbers of parameters.")
    usual = count.most_common(1)[0][0]
    panels: dict[str, list[figures.Point]] = {}
    for row, params in table.params.items():
        backbone = row[2] if count[row[2]] > 1 else usual
        label = table.label(row, backbone)
        point = figures.Point(label, params, table.score(row)[0], kind="published")
        panels.setdefault(f"{papers.SUITES[table.benchmark]}, {backbone}", []).append(point)
    return panels


def ranking(found: Iterable[dict], table: Printed | None = None) -> Figure:
    """The critical-difference diagram of every suite and backbone, and of a published table. Rows
    that peeked at the test set are left out, unless all did."""
    panels = []
    if table:
        tasks = [task for task in next(iter(table.rows.values())) if not task.startswith("mean_")]
        complete = {row: cells for row, cells in table.rows.items() if cells.keys() >= {*tasks}}
        scores = {table.label(row): [cells[t] for t in tasks] for row, cells in complete.items()}
        panel = ranks.rank(f"{table.name}, published", scores)
        panels.append(panel._replace(note=f"{panel.note}\n{AS_PRINTED}."))
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


def ablation(
    found: Iterable[dict], over: str | None = None, table: Printed | None = None
) -> Figure:
    """Accuracy over one hyper-parameter, a panel for each method and each one of its that varies
    while the others stay, or for `over` alone; published lines beside ours.

    Raises ValueError where nothing varies.
    """
    panels: dict[tuple[str, str], list[figures.Curve]] = {}
    varied: set[str] = set()
    same = {papers.SUITES[table.benchmark]: table.tasks} if table else {}
    for title, (grid, *_) in _panels(found).items():
        suite = title.partition("\n")[0]
        for method in sorted({row[0] for row in grid}):
            own = {row: grid[row] for row in grid if row[0] == method}
            for key in sorted({k for row in own for k in _settings(own[row])}):
                lines = _lines(own, key, same.get(title.partition(",")[0], ()))
                varied |= {key} if lines else set()
                if lines and over in (None, key):
                    panels[f"{method}, {suite}", key] = lines
    for (title, key), lines in printed_lines(table).items() if table else ():
        varied |= {key}
        if over in (None, key):
            panels.setdefault((title, key), []).extend(lines)
    if not panels:
        of = f" {over}" if over else ""
        there = f"; what varies is: {', '.join(sorted(varied))}" if varied else ""
        raise ValueError(
            f"No hyper-parameter{of} of a method varies here while the others stay{there}. A "
            "sweep varies one with variants, e.g. 'sweep.variants={method.rank:[1,2,4,8]}'."
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


def _lines(rows: Grid, key: str, needed: Collection[str] = ()) -> list[figures.Curve]:
    """A line for every setting of the other hyper-parameters under which `key` has more than one
    value; its points average the tasks that all of them have, which must be the `needed` ones."""
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
        if not shared or (needed and {column[2] for column in shared} != {*needed}):
            continue
        means = {text: _mean(rows, values[text], shared) for text in sorted(values, key=_order)}
        tasks = f"mean of {len(shared)} tasks" if len(shared) > 1 else title_of(shared[0], rows)
        lines.append(figures.Curve(f"{tasks}; {rest}" if len(groups) > 1 else tasks, means))
    return lines


def printed_lines(table: Printed) -> dict[tuple[str, str], list[figures.Curve]]:
    """The rows whose variant is one `key=value`; an expert mask's kind is a line of its own."""
    lines: dict[tuple[str, str], dict[str, dict[str, tuple]]] = {}
    for row in table.rows:
        method, variant, backbone = row
        key, _, value = variant.partition("=")
        if not key.isidentifier() or "," in variant:
            continue
        score, meaning = table.score(row)
        kind = ""
        if key == "experts_kept":
            kind, _, value = value.rpartition("_")
        if key == "location":
            value = value.replace("_", " ").replace("mha", "MHA").replace("ffn", "FFN")
            value = value.replace("+", " +\n")
        where = f"{method}, {papers.SUITES[table.benchmark]}, {backbone}", key
        name = f"{table.name}, {meaning}" + f"; {kind}" * bool(kind)
        lines.setdefault(where, {}).setdefault(name, {})[value] = score, None
    made = {
        where: [
            figures.Curve(name, values, True) for name, values in named.items() if len(values) > 1
        ]
        for where, named in lines.items()
    }
    return {where: curves for where, curves in made.items() if curves}


def label_of(table: Table, line: Line) -> str:
    """Method, variant and what else tells the rows of a table apart, as a user types them."""
    shown = {c.key: line.entry(c).text for c in table.columns if c.kind == "label"}
    method, variant = shown.pop("method", ""), shown.pop("variant", "")
    name = method + (f" ({variant})" if variant and method else variant)
    if {"backbone", "pretraining"} & shown.keys():
        parts = [line.key.get("backbone"), line.key.get("pretraining")]
        shown["backbone"] = "_".join(part for part in parts if part and part != "unspecified")
        shown.pop("pretraining", None)
    return ", ".join(filter(None, [name, *shown.values()]))


def beside(table: Table) -> Figure:
    """Ours beside the published: for every row of a table its means, or its data sets."""
    scores = [column for column in table.columns if column.kind == "score"]
    means = [column for column in scores if column.key.startswith("mean_")] or scores
    lines = {(line.row, line.source): line for line in table.lines}
    rows = [line for line in table.lines if line.source == "published"]
    panels: dict[str, list[figures.Pair]] = {column.title: [] for column in means}
    for row in rows:
        ours = lines.get((row.row, "ours"))
        for column in means:
            mine = ours.entry(column) if ours else None
            value = (mine.value, mine.std) if mine and mine.value is not None else None
            kind = "peeks" if ours and DAGGER in ours.marks else "ours"
            panels[column.title].append(figures.Pair(value, row.entry(column).value, kind))
    note = f"{AS_PRINTED}."
    if not any(pair.ours for pairs in panels.values() for pair in pairs):
        note = f"No run of ours has these yet. {note}"
    return figures.beside([label_of(table, row) for row in rows], panels, note)


def _text(value: object) -> str:
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _order(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
