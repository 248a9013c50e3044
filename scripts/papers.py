"""A paper's table with ours beside it: every figure it prints, our mean over seeds, the difference.

    names()                       every table of the four papers that this suite covers
    published_table(name, found)  one of them, with the records that belong to its rows

Rows and columns stand in the paper's order, figures as it prints them. Means that it does not print
are computed from its cells and say so.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path

import pandas as pd
import yaml

from scripts import beside, experiments, published, runs
from scripts.tables import (
    BORROWED,
    DAGGER,
    NOT_RUN,
    NOTHING,
    PARAMS,
    Column,
    Entry,
    Line,
    Table,
    delta,
    notes,
    of_cell,
    of_mean,
    of_params,
)

CONFIGS = Path(__file__).parent.parent / "configs"
PAPERS = {"rlrr": "RLRR", "alore": "ALoRE", "lava": "LAVA", "superlora": "SuperLoRA"}
SUITES = {"vtab-1k": "vtab", "fgvc": "fgvc", "cifar-10": "cifar", "cifar-100": "cifar"}
BENCHMARKS = {"vtab-1k": "VTAB-1k", "fgvc": "FGVC", "cifar-10": "CIFAR-10",
              "cifar-100": "CIFAR-100", "cifar-unspecified": "CIFAR"}  # fmt: skip
METRICS = {"top1": "score", "accuracy_fraction": "score", "num_params": "plain",
           "trainable_params_pct": "plain"}  # fmt: skip
TITLES = {"accuracy_fraction": "Accuracy", "num_params": "Parameters",
          "trainable_params_pct": "Trainable (%)", "top1": "Top-1", "cifar_unspecified": "CIFAR",
          "mean_natural": "Natural", "mean_specialized": "Specialized",
          "mean_structured": "Structured", "mean_all": "Mean of 19 tasks",
          "mean_group": "Mean of 3 groups", "mean_fgvc": "Mean of 5 tasks"}  # fmt: skip
# Where a paper's columns are no data sets: what its rows and its columns run over.
LAYOUTS = {
    ("lava", "T1"): (["backbone"], ["method"]),
    ("lava", "T5"): (["method", "variant", "metric"], ["backbone"]),
    ("rlrr", "S12"): (["method", "variant"], ["backbone"]),
}
LABELS = ["backbone", "pretraining", "method", "variant", "metric"]


@cache
def catalogue() -> dict[str, tuple[str, str]]:
    """Name -> (paper, table), in the papers' order."""
    found = {}
    for paper in published.PAPERS:
        frame = published.numbers(paper)
        covered = frame["benchmark"].isin(BENCHMARKS) & frame["metric"].isin(METRICS)
        tables = {table: _order(table) for table in frame[covered]["table"]}
        for table in sorted(tables, key=tables.get):
            number = table.lower().replace(".", "")
            found[f"{paper}/{re.sub('^t', 'table', number)}"] = (paper, table)
    return found


def _order(table: str) -> tuple:
    kind, number, part = re.fullmatch(r"([TSA])\.?(\d+)([a-d]?)", table).groups()
    return "TSA".index(kind), int(number), part


def names() -> list[str]:
    return list(catalogue())


def find(name: str) -> list[str]:
    """The tables meant by `rlrr/table2`, `rlrr/T2` or `rlrr/2`; `rlrr/table4` means 4a and 4b.

    Raises ValueError naming the nearest for a table that the suite does not cover.
    """
    exact = {_short(known): known for known in names()}
    short = _short(name)
    if short in exact:
        return [exact[short]]
    parts = [known for key, known in exact.items() if re.fullmatch(f"{re.escape(short)}[a-d]", key)]
    if parts:
        return parts
    near = difflib.get_close_matches(short, exact, 5, 0.5)
    near = [exact[key] for key in near] or names()
    raise ValueError(
        f"There is no table {name!r} of the papers here; nearest: {', '.join(near)}. `all` writes "
        "every table, and a folder is taken as one of runs."
    )


def _short(name: str) -> str:
    paper, _, table = name.lower().partition("/")
    table = re.sub(r"^(table|section|t(?=\d))|[^a-z0-9]", "", table)
    return f"{paper}/{table}"


@cache
def titles() -> dict[str, str]:
    """Task -> its title in configs/dataset."""
    found = {}
    for suite in sorted(set(SUITES.values())):
        for path in sorted(CONFIGS.glob(f"dataset/{suite}/*.yaml")):
            config = yaml.safe_load(path.read_text())
            found[config["name"]] = config["title"]
    return TITLES | found


def published_table(name: str, found: Iterable[dict] = ()) -> Table:
    """One table of a paper, with the records among `found` that belong to it.

    Raises ValueError for an unknown table, and as `runs.cell_of` does for records that disagree.
    """
    (name,) = find(name) if len(find(name)) == 1 else [name]
    paper, number = catalogue()[name]
    frame = published.numbers(paper)
    frame = frame[(frame["table"] == number) & frame["metric"].isin(METRICS)]
    builder = _Builder(paper, number, frame.copy(), list(found))
    return builder.table(name)


class _Builder:
    def __init__(self, paper: str, number: str, frame: pd.DataFrame, found: list[dict]) -> None:
        self.paper, self.number, self.frame, self.found = paper, number, frame, found
        default = LABELS[:4], ["dataset", "metric"]
        self.rows, self.over = LAYOUTS.get((paper, number), default)
        self.over = [name for name in self.over if frame[name].nunique() > 1] or self.over[:1]
        self.doubts = _doubts(paper, number)
        self.errata: dict[str, None] = {}
        self.cells: list[runs.Cell] = []
        self.experiment = experiments.of_published(paper, number)
        self.tasks = experiments.datasets(self.experiment) if self.experiment else []

    def table(self, name: str) -> Table:
        columns = self.columns()
        table = Table(name, self.title(), columns, [])
        for r, (_, part) in enumerate(self.frame.groupby(self.rows, sort=False, dropna=False)):
            self.row(table, r, part)
        table.rank()
        table.notes = self.notes(table)
        table.errata = list(self.errata)
        return table

    def title(self) -> str:
        benchmarks = [BENCHMARKS[name] for name in self.frame["benchmark"].unique()]
        where = ", ".join(_backbone(*pair) for pair in self.pairs)
        of = f", {where}" if len(self.pairs) < 3 else ""
        kind = {"T": "Table ", "S": "Table S", "A": "Section A"}[self.number[0]]
        return f"{PAPERS[self.paper]}, {kind}{self.number[1:]}: {', '.join(benchmarks)}{of}"

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        pairs = self.frame[["backbone", "pretraining"]].drop_duplicates()
        return list(pairs.itertuples(index=False, name=None))

    def columns(self) -> list[Column]:
        """Labels that tell rows apart, the figures in the paper's order, both means, parameters."""
        frame, columns = self.frame, []
        for label in LABELS:
            several = label in self.rows and (label == "method" or frame[label].nunique() > 1)
            if several:
                columns.append(Column(label, label.capitalize(), "label"))
        groups = {task: group for group, tasks in published.tasks().items() for task in tasks}
        for values, cells in frame.groupby(self.over, sort=False):
            kinds = {METRICS[metric] for metric in cells["metric"]}
            kind = "score" if kinds == {"score"} else "plain"
            title = " ".join(titles().get(value, value) for value in values)
            columns.append(Column(_key(values), title, kind, groups.get(values[0], "means")))
        if "dataset" in self.over:
            shown = {column.key for column in columns}
            for mean in ("mean_all", "mean_group"):
                if mean not in shown and self.computable(mean):
                    columns.append(Column(mean, TITLES[mean], "score", "means"))
        if (frame["params_M"] != "").any() or (self.suite() and "backbone" not in self.over):
            columns += PARAMS if "backbone" not in self.over else [
                Column(f"{c.key}:{b}", f"{b} {c.title}", c.kind)
                for b in frame["backbone"].unique() for c in PARAMS
            ]  # fmt: skip
        return columns

    def suite(self) -> str | None:
        return SUITES.get(self.frame["benchmark"].iloc[0])

    def computable(self, mean: str) -> bool:
        return any(mean in self.means(part) for _, part in self.frame.groupby(published.ROW))

    def means(self, part: pd.DataFrame) -> dict[str, float]:
        numbers = dict(zip(part["dataset"], part["number"]))
        return published.recomputed(part["benchmark"].iloc[0], numbers)

    def row(self, table: Table, r: int, part: pd.DataFrame) -> None:
        first = part.iloc[0]
        key = {name: first[name] for name in self.rows}
        labels = {name: Entry(first[name]) for name in self.rows}
        printed = Line(r, "published", key, dict(labels))
        ours = Line(r, "ours", key, dict(labels))
        change = Line(r, "delta", key, dict(labels))
        scores = {column.key for column in table.columns if column.kind == "score"}
        lacking: dict[tuple, list[str]] = {}
        for identity, cells in part.groupby(published.ROW, sort=False):
            self.mark(printed, identity)
            here = self.ours(identity)
            self.published_part(printed, identity, cells)
            for column, entry, digits in self.our_part(identity, cells, here, table.columns):
                ours.entries[column] = entry
                if column in scores:
                    published_entry = printed.entries.get(column, NOTHING)
                    change.entries[column] = delta(entry, published_entry, digits)
            if any(runs.peeks(cell.record) for cell in here.values()):
                ours.marks, ours.why = DAGGER, {DAGGER: "the epoch was chosen on the test set"}
            if lost := [task for task in self.tasks if task not in here]:
                lacking[identity] = lost
            self.cells += here.values()
        table.lines.append(printed)
        if any(entry.text for name, entry in ours.entries.items() if name not in labels):
            table.lines.append(ours)
        if any(entry.text for name, entry in change.entries.items() if name not in labels):
            table.lines.append(change)
        for identity, lost in lacking.items():
            row = self.experiment_row(identity)
            gap = beside.missing(self.name(identity), self.experiment, row, lost)
            if gap not in table.missing:  # a row of two metrics has one run
                table.missing.append(gap)

    def mark(self, line: Line, identity: tuple) -> None:
        signs = {"peek": DAGGER, "borrowed": BORROWED}
        why = {signs[m]: reason for m, reason in published.origins().get(identity, {}).items()}
        line.why |= dict(sorted(why.items()))
        line.marks = "".join(sorted({*line.marks, *why}))

    def published_part(self, line: Line, identity: tuple, cells: pd.DataFrame) -> None:
        """What the paper prints in one row, and the means that it does not."""
        for cell in cells.itertuples():
            std = float(cell.std) if cell.std else None
            text = cell.value + (f" ± {cell.std}" if cell.std else "")
            entry = Entry(text, cell.number, std, doubt=self.doubt(identity, cell.dataset, cell))
            line.entries[_key(tuple(getattr(cell, name) for name in self.over))] = entry
        if "dataset" in self.over:
            for mean, value in self.means(cells).items():
                if mean in ("mean_all", "mean_group") and mean not in line.entries:
                    line.entries[mean] = Entry(f"{value:.2f}", value, computed=True)
        counts = {value for value in cells["params_M"] if value}
        for count in counts:
            known = published.count_of(identity, count) or {}
            column = "tuned" if known.get("head", "none") in ("none", "") else "with_head"
            doubt = known.get("reason", "") if known.get("agrees") == "no" else ""
            where = f"{column}:{identity[3]}" if "backbone" in self.over else column
            line.entries[where] = Entry(count, float(count), doubt=doubt)
            if doubt:
                self.errata[f"{self.name(identity)}, {count} M parameters: {doubt}"] = None

    def doubt(self, identity: tuple, dataset: str, cell: object) -> str:
        whole = self.doubts.get((*identity[3:], "", ""))
        doubt = self.doubts.get((*identity[3:], dataset, cell.metric), whole) or ""
        if doubt:
            where = "" if doubt == whole else f", {titles().get(dataset, dataset)} {cell.value}"
            self.errata[f"{self.name(identity)}{where}: {doubt}"] = None
        return doubt

    def name(self, identity: tuple) -> str:
        *_, backbone, pretraining, method, variant = identity
        several = len(self.pairs) > 1
        name = f"{method} ({variant})" if variant else method
        return name + f", {_backbone(backbone, pretraining)}" * several

    def ours(self, identity: tuple) -> dict[str, runs.Cell]:
        """Our cells of one row, by task."""
        row = self.experiment_row(identity)
        return {} if row is None else beside.cells_of(self.experiment, row, self.found)

    def experiment_row(self, identity: tuple) -> experiments.Row | None:
        return experiments.find(self.paper, self.number, *identity[3:])

    def our_part(
        self, identity: tuple, cells: pd.DataFrame, here: dict[str, runs.Cell],
        columns: Sequence[Column],
    ) -> Iterable[tuple[str, Entry, int]]:  # fmt: skip
        """Column, our entry and the decimals of the published one."""
        benchmark = identity[2]
        groups = published.averages(benchmark)
        for cell in cells.itertuples():
            column, digits = _key(tuple(getattr(cell, name) for name in self.over)), cell.decimals
            ours = here.get(self.tasks[0]) if self.tasks else None
            if cell.metric == "accuracy_fraction":  # of the one data set, which is not named
                yield column, beside.fraction(ours, digits), digits
            elif cell.metric == "trainable_params_pct":
                yield column, beside.share(ours, self.found, digits), digits
            elif cell.metric == "num_params":
                yield column, beside.count(ours), digits
            elif cell.dataset in groups:
                parts = [[here.get(task) for task in part] for part in groups[cell.dataset]]
                yield column, of_mean(parts, max(digits, 1)), max(digits, 1)
            elif cell.metric == "top1":
                yield column, of_cell(here.get(cell.dataset), max(digits, 1)), max(digits, 1)
        shown = {column.key for column in columns} - set(cells["dataset"])
        for mean in sorted(shown & {"mean_all", "mean_group"} & groups.keys()):
            parts = [[here.get(task) for task in part] for part in groups[mean]]
            yield mean, of_mean(parts), 2
        counts = of_params(list(here.values())) if here else {}
        for column, entry in counts.items():
            yield f"{column}:{identity[3]}" if "backbone" in self.over else column, entry, 3

    def notes(self, table: Table) -> list[str]:
        marks = {mark for line in table.lines for mark in line.marks}
        said = [
            "Published figures are as printed. Best bold, second underlined, for each backbone, "
            "among the published and among ours apart. A published parameter count stands in the "
            "column whose convention it follows. Δ is ours less the published."
        ]
        if any(entry.computed for line in table.lines for entry in line.entries.values()):
            said.append("In italics: means that the paper does not print, computed from its cells.")
        if DAGGER in marks:
            said.append(
                f"{DAGGER} The epoch was chosen by its accuracy on the test set, in ours or in the "
                "released code behind the published row: no estimate of test accuracy."
            )
        if BORROWED in marks:
            said.append(
                f"{BORROWED} Not measured by this paper, or the same measurement as in another one."
            )
        return said + (notes(self.cells, self.found) if self.cells else [NOT_RUN])


def _key(values: Sequence[str]) -> str:
    return "/".join(values)


def _backbone(backbone: str, pretraining: str) -> str:
    return f"{backbone}_{pretraining}" if pretraining not in ("", "unspecified") else backbone


def _doubts(paper: str, table: str) -> dict[tuple, str]:
    frame = published.errata()
    frame = frame[(frame["paper"] == paper) & (frame["table"] == table)]
    keys = frame[published.CELL[2:]].itertuples(index=False, name=None)
    return dict(zip(keys, frame["remark"]))
