"""The tables as data: what a paper prints, what we measured, and what stands between.

A table has columns and lines. A row of a paper is one line with its figures, one with ours, and one
with the difference, where there is one; a table of our own has one line for every method. Every
entry knows what it shows and why it may be doubted, so that Markdown, CSV, LaTeX and HTML
(`scripts.render`) and the report are made from the same thing. Needs neither torch nor Hydra.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scripts import runs
from scripts.runs import Cell

DASH = "–"  # where there is no run
DAGGER = "†"  # the epoch was chosen on the test set
BORROWED = "‡"  # the paper did not measure it
DOUBT = "?"  # does not add up, see errata.md


@dataclass(frozen=True)
class Column:
    """`kind` is label, params (millions), score (higher is better) or plain (no better)."""

    key: str
    title: str
    kind: str
    group: str | None = None


@dataclass
class Entry:
    """One field: `text` as shown without its marks, `value` to sort by.

    `rank` 1 is the best of its column, 2 the second. `doubt` is the sentence of an erratum,
    `computed` says that the paper does not print this mean, `runs` are the records behind it.
    """

    text: str = ""
    value: float | None = None
    std: float | None = None
    rank: int = 0
    doubt: str = ""
    computed: bool = False
    runs: tuple[dict, ...] = ()


@dataclass
class Line:
    """`source` is published, ours or delta. Lines with the same `row` belong together."""

    row: int
    source: str
    key: dict[str, str]
    entries: dict[str, Entry]
    marks: str = ""
    why: dict[str, str] = field(default_factory=dict)  # mark -> reason

    def entry(self, column: Column) -> Entry:
        return self.entries.get(column.key, NOTHING)


NOTHING = Entry()


@dataclass(frozen=True)
class Missing:
    """What a row lacks, and the command that fills it; `why` instead, where none can."""

    label: str
    what: str
    command: str = ""
    why: str = ""


@dataclass
class Table:
    name: str
    title: str
    columns: list[Column]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    errata: list[str] = field(default_factory=list)

    def rank(self) -> None:
        """Marks best and second of every score, ties included, among the lines of one source and
        one backbone, as printed. Rows of ours that chose on the test set compete only where all
        did; the papers' compete as the papers let them."""
        fields: dict[tuple, list[Line]] = {}
        for line in self.lines:
            backbone = line.key.get("backbone"), line.key.get("pretraining")
            fields.setdefault((line.source, *backbone), []).append(line)
        honest = any(line.source == "ours" and DAGGER not in line.marks for line in self.lines)
        for (source, *_), lines in fields.items():
            if source == "ours" and honest:
                lines = [line for line in lines if DAGGER not in line.marks]
            for column in self.columns:
                if column.kind == "score" and source != "delta":
                    _rank([line.entry(column) for line in lines])


def _rank(entries: Sequence[Entry]) -> None:
    entries = [entry for entry in entries if entry.value is not None]
    highest = sorted({_printed(entry) for entry in entries}, reverse=True)[:2]
    for entry in entries if len(entries) > 1 else []:
        if _printed(entry) in highest:
            entry.rank = 1 + highest.index(_printed(entry))


def _printed(entry: Entry) -> float:
    return float(entry.text.partition(" ")[0])  # what is printed alike ranks alike


def text_of(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def score(mean: float, std: float | None, digits: int, records: Iterable[dict] = ()) -> Entry:
    return Entry(text_of(mean, std, digits), mean, std, runs=tuple(records))


def of_cell(cell: Cell | None, digits: int = 1) -> Entry:
    return Entry(DASH) if cell is None else score(cell.mean, cell.std, digits, cell.runs)


def of_mean(parts: Sequence[Sequence[Cell | None]], digits: int = 2) -> Entry:
    """The mean over groups of the means within; a dash where a task is missing."""
    if any(cell is None for part in parts for cell in part):
        return Entry(DASH)
    records = [record for part in parts for cell in part for record in cell.runs]
    return score(*runs.mean_of_means(parts), digits, records)


def millions(count: float) -> Entry:
    return Entry("0" if count == 0 else f"{count / 1e6:.3f}", count / 1e6)


def of_params(cells: Sequence[Cell]) -> dict[str, Entry]:
    """Tuned parameters without and with the head, as means over tasks."""
    tuned = runs.params(cells, "tuned_params")
    with_head = tuned + runs.params(cells, "head_params")
    return {"tuned": millions(tuned), "with_head": millions(with_head)}


PARAMS = [
    Column("tuned", "Tuned (M)", "params"),
    Column("with_head", "with head (M)", "params"),
]


NOT_RUN = "Ours: there is no run of it yet."
PEEKED = f"{DAGGER} Best epoch on the test set: comparable only with rows so marked."
NO_RUNS = (
    "There is no final run here yet. Run a sweep (python sweep.py sweep=mini action=run), then "
    "keep its records (python -m scripts.tabulate --keep results/runs/mini)."
)


def own_table(found: Iterable[dict], name: str = "mini") -> Table:
    """Rows: methods by tuned parameters. Columns: counts, epochs, seeds, tasks, means.

    Without a tested run it holds the sentence that says so. Raises ValueError as `runs.cells` does.
    """
    found = list(found)
    grid, title = runs.cells(found), f"Our runs: {name}" if name else "Our runs"
    if not grid:
        return Table(name, title, [], [], [NO_RUNS])
    tasks = sorted({column for row in grid.values() for column in row}, key=runs.column_order)
    several = len({backbone for _, _, backbone in grid}) > 1
    means = _mean_columns(tasks)
    columns = [
        Column("method", "Method", "label"),
        *([Column("backbone", "Backbone", "label")] if several else []),
        *PARAMS,
        Column("epochs", "Epochs", "plain"),
        Column("seeds", "Seeds", "plain"),
        *(Column("/".join(map(str, c)), runs.title_of(c, grid), "score", c[1]) for c in tasks),
        *(Column(title, title, "score", "means") for title in means),
    ]
    table = Table(name, title, columns, [])
    for row in runs.row_order(grid):
        cells = grid[row]
        honest = not any(runs.peeks(cell.record) for cell in cells.values())
        method, variant, backbone = row
        entries = {
            "method": Entry(method + f" ({variant})" * bool(variant)),
            "backbone": Entry(backbone),
            **of_params(list(cells.values())),
            "epochs": Entry(
                re.sub(" epochs?$", "", _lengths(cell.record for cell in cells.values()))
            ),
            "seeds": Entry(runs.span(len(cell.top1) for cell in cells.values())),
        }
        for column in tasks:
            entries["/".join(map(str, column))] = of_cell(cells.get(column))
        for title, groups in means.items():
            entries[title] = of_mean([[cells.get(column) for column in part] for part in groups])
        key = {"backbone": backbone, "method": method, "variant": variant}
        line = Line(len(table.lines), "ours", key, entries, DAGGER * (not honest))
        if not honest:
            line.why = {DAGGER: "the epoch was chosen on the test set"}
        table.lines.append(line)
    table.rank()
    table.notes = notes([cell for row in grid.values() for cell in row.values()], found)
    if any(line.marks for line in table.lines):
        table.notes.append(PEEKED)
    return table


def _lengths(found: Iterable[dict]) -> str:
    """How long runs trained, in epochs, and in steps where that was asked."""
    asked = [record["config"]["optim"] for record in found]
    epochs = [optim["epochs"] for optim in asked if not optim.get("steps")]
    steps = [optim["steps"] for optim in asked if optim.get("steps")]
    parts = (f"{runs.span(n)} {unit}" for n, unit in ((epochs, "epochs"), (steps, "steps")) if n)
    return ", ".join(re.sub(r"^(1 \w+)s$", r"\1", part) for part in parts)


def _mean_columns(columns: Sequence[tuple]) -> dict[str, list[list[tuple]]]:
    """Title -> groups of columns, over whose means is averaged. Suites are never mixed."""
    means: dict[str, list[list[tuple]]] = {}
    suites = sorted({column[0] for column in columns}, key=lambda s: runs.index(runs.SUITES, s))
    for suite in suites:
        own = [column for column in columns if column[0] == suite]
        groups: dict[str | None, list[tuple]] = {}
        for column in own:
            groups.setdefault(column[1], []).append(column)
        of = f"{suite} " * (len(suites) > 1)
        if len(groups) > 1 and len(own) > len(groups):
            for group, members in groups.items():
                means[f"Mean {of}{group or 'others'}"] = [members]
            if len({len(members) for members in groups.values()}) > 1:  # else that of all tasks
                means[f"Mean of {len(groups)} {of}groups"] = list(groups.values())
        if len(own) > 1:
            means[f"Mean of {len(own)} {of}tasks"] = [own]
    return means


def notes(cells: Sequence[Cell], records: Iterable[dict] = ()) -> list[str]:
    """What our figures are: protocol, data, epochs, seeds, backbone; and, where the `records` of
    the grids are given, how many rates lie at an end of those tried."""
    several = any(cell.std is not None for cell in cells)
    spread = (
        "; ± sample standard deviation over seeds, which draw initialisation and dropout, not the "
        "order of the images (that is data_seed's)."
        if several
        else ", of one seed."
    )
    found = ["Ours: top-1 accuracy on the test split in percent" + spread]
    for name in sorted({cell.record["protocol"] for cell in cells}):
        of = [cell for cell in cells if cell.record["protocol"] == name]
        seeds = sorted({seed for cell in of for seed in cell.top1})
        sizes = runs.span(cell.record["config"]["image_size"] for cell in of)
        lengths = _lengths(cell.record for cell in of)
        found.append(
            f"Protocol {name}: trained on {runs.listed({c.record['trained_on'] for c in of})} at "
            f"{sizes} pixels, {lengths}, seeds {', '.join(map(str, seeds))}, "
            + ("best epoch on the test set." if runs.peeks(of[0].record) else "last epoch.")
        )
        untuned = {c.record["method"] for c in of if not c.record["selected_from"]}
        if untuned:
            fixed = runs.listed(untuned)
            found.append(f"Fixed learning rate and weight decay, not tuned: {fixed}.")
    if ends := _at_an_end(cells, records):
        found.append(ends)
    if own := {c.record["task"] for c in cells if "-own" in c.record["provenance"]["source"]}:
        found.append(f"Own split, where the published one cannot be rebuilt: {runs.listed(own)}.")
    backbones = {(c.record["backbone"], c.record["provenance"]["weights"]) for c in cells}
    found.append("Backbone: " + runs.listed(f"{name} ({file})" for name, file in backbones) + ".")
    return found


def _at_an_end(cells: Sequence[Cell], records: Iterable[dict]) -> str:
    """A sentence on chosen rates beyond which nothing was tried; "" where there is none."""
    rates = {r["key"]: r["config"]["optim"]["lr"] for r in records if r["phase"] == "grid"}
    low = high = several = 0
    for cell in cells:
        tried = {rates[key] for key in cell.record["selected_from"] if key in rates}
        if len(tried) > 1:
            chosen, several = cell.record["config"]["optim"]["lr"], several + 1
            low, high = low + (chosen == min(tried)), high + (chosen == max(tried))
    if not low + high:
        return ""
    return (
        f"The chosen learning rate is the largest tried in {high} of {several} cells, the smallest "
        f"in {low}: a wider grid may find better."
    )


def delta(ours: Entry, published: Entry, digits: int) -> Entry:
    """Ours less the published, with its sign."""
    if ours.value is None or published.value is None:
        return NOTHING
    difference = ours.value - published.value
    text = f"{difference:+.{digits}f}".replace("-", "−")
    return Entry(text if text.strip("+−0.") else text[1:], difference)
