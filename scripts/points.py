"""Experiments without printed numbers, such as those behind a figure: ours alone.

Rows are the experiment's, columns the points that it runs through: ranks, layers, groups.
"""

import itertools
from collections.abc import Iterable, Mapping

from scripts import beside, experiments, papers, runs
from scripts.tables import (
    DAGGER,
    NOT_RUN,
    PARAMS,
    PEEKED,
    Column,
    Entry,
    Line,
    Missing,
    Table,
    notes,
    of_cell,
    of_params,
)

KINDS = {"fig": "Figure ", "a": "Section A.", "table": "Table ", "s": "Table S"}


def names() -> list[str]:
    """Experiments that no table of results/published answers to, in the papers' order."""
    return [name for name in experiments.names() if not experiments.sweep(name).get("published")]


def title_of(name: str) -> str:
    paper, _, short = name.partition("/")
    kind = next(kind for kind in KINDS if short.startswith(kind))
    number = short.removeprefix(kind)
    number = ".".join(number) if kind == "a" else number
    tasks = ", ".join(papers.titles().get(t, t) for t in experiments.datasets(name))
    return f"{papers.PAPERS[paper]}, {KINDS[kind]}{number}: {tasks} (no numbers are printed)"


def points_of(row: experiments.Row) -> list[dict]:
    """What a row runs through: every combination of its values; one empty point without any."""
    return [dict(zip(row.variants, values)) for values in itertools.product(*row.variants.values())]


def said(point: Mapping) -> str:
    return ", ".join(f"{key.removeprefix('method.')}={value}" for key, value in point.items())


def table(name: str, found: Iterable[dict] = ()) -> Table:
    """Raises ValueError as `runs.cell_of` does."""
    found, rows, tasks = list(found), experiments.rows(name), experiments.datasets(name)
    points = {said(point): point for row in rows for point in points_of(row)}
    ordered = sorted(points, key=lambda text: _order(points[text]))
    columns = [Column(key, key.capitalize(), "label") for key in ("backbone", "method", "variant")]
    for task, point in itertools.product(tasks, ordered):
        title = papers.titles().get(task, task)
        title = point if len(tasks) == 1 and point else f"{title} {point}".strip()
        columns.append(Column(f"{task}/{point}", title, "score"))
    made = Table(name, title_of(name), columns, [])
    shown = []
    for row in rows:
        key = {"backbone": row.backbone, "method": row.method, "variant": row.variant}
        line = Line(len(made.lines), "ours", key, {name: Entry(text) for name, text in key.items()})
        lost = 0
        for point in points_of(row):
            cells = beside.cells_of(name, row, found, point)
            for task in tasks:
                line.entries[f"{task}/{said(point)}"] = of_cell(cells.get(task), 2)
                lost += task not in cells
            shown += cells.values()
            if any(runs.peeks(cell.record) for cell in cells.values()):
                line.marks, line.why = DAGGER, {DAGGER: "the epoch was chosen on the test set"}
            if not row.variants and cells:
                line.entries |= of_params(list(cells.values()))
        made.lines.append(line)
        if lost or row.absent:
            whole = len(points_of(row)) * len(tasks)
            what = f"{lost} of {whole} points" if whole > 1 else "no run"
            command = "" if row.absent else experiments.command(name, row)
            made.missing.append(Missing(row.label, what, command, row.absent))
    if not any(row.variants for row in rows):
        made.columns += PARAMS
    made.rank()
    made.notes = notes(shown) if shown else [NOT_RUN]
    made.notes += [PEEKED] * any(line.marks for line in made.lines)
    return made


def _order(point: Mapping) -> tuple:
    """Numbers by their size, words after them; fewer values first."""
    values = [(1, 0, v) if isinstance(v, str) else (0, v, "") for v in point.values()]
    return len(values), [*point], values
