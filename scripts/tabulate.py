"""Tables of our own runs, from their records alone.

    python -m scripts.tabulate RUNS_DIR [--protocol NAME] [--out FILE.md] [--plot FILE.png]

Rows are methods, columns tasks in their groups; a cell is the mean ± standard deviation of top-1
over seeds. Only final runs are shown, since only they saw the test set as their protocol says.
Records that disagree about what they measured are refused, never averaged.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from peft import record as records

PUBLISHED = Path(__file__).parent.parent / "results" / "published"
SUITES = ("mini", "vtab", "fgvc", "cifar")
GROUPS = ("natural", "specialized", "structured")
DASH = "–"  # where there is no run
DAGGER = "†"  # the epoch was chosen on the test set

# What the runs of one cell must have in common, as paths into a record. The learning rate and the
# weight decay may differ: they are tuned.
COMMON = [
    *("protocol", "selection", "trained_on", "config.optim.epochs", "config.image_size"),
    *("tuned_params", "head_params", "provenance.weights_sha256", "provenance.data_sha256"),
    *("provenance.pixels", "provenance.kernel", "provenance.mean", "provenance.std"),
    "provenance.weights",
]


@dataclass(frozen=True)
class Cell:
    """One method on one task: top-1 in percent by seed, and one of its records."""

    top1: dict[int, float]
    record: dict

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None with one seed."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else None


def collect(folder: str | Path) -> list[dict]:
    """Every record below a folder, in the order of their paths, each with its path under "file".

    Raises FileNotFoundError where there is none, ValueError naming the file of a bad one.
    """
    paths = sorted(Path(folder).rglob("record.json"))
    if not paths:
        raise FileNotFoundError(
            f"There is no record.json below {folder}: run something first (make demo, python "
            "train.py, python sweep.py), or name the folder where the runs are."
        )
    found = [records.read(path) | {"file": str(path)} for path in paths]
    for record in found:
        validate(record)
    return found


def named(record: dict) -> str:
    return record.get("file") or f"the record with key {str(record.get('key'))[:8]}"


def validate(record: dict) -> None:
    """Raises ValueError for a missing field or a number that cannot be, naming the record."""
    missing = [field for field in records.FIELDS if field not in record]
    if missing:
        raise ValueError(f"{named(record)} lacks {', '.join(missing)}: it is not a whole record.")
    metrics = dict(record["metrics"])
    if record["phase"] == "final":
        needed = "top1_best" if peeks(record) else "top1_last"
        if needed not in metrics:
            raise ValueError(f"{named(record)} is a final run without {needed} among its metrics.")
    for name, value in metrics.items():
        top = 100 if name.startswith("top1") else math.inf
        if not _number(value) or not 0 <= value <= top:
            raise ValueError(f"{named(record)} has {name}={value}, which cannot be.")
    for name in ("tuned_params", "head_params"):
        if not _number(record[name]) or record[name] != int(record[name]) or record[name] < 0:
            raise ValueError(f"{named(record)} has {name}={record[name]}, which is no count.")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def peeks(record: dict) -> bool:
    """Whether the epoch that counts was chosen on the test set."""
    return record["selection"] == "best_on_test"


def cells(found: Iterable[dict]) -> dict[tuple, dict[tuple, Cell]]:
    """Final runs by row (method, variant, backbone), then by column (suite, group, task).

    Raises ValueError, naming the records, for a key or seed that comes twice in one cell and for
    records that do not measure the same thing.
    """
    rows: dict[tuple, dict[tuple, list[dict]]] = {}
    keys: dict[str, dict] = {}
    for record in found:
        validate(record)
        if record["phase"] != "final":
            continue
        twin = keys.setdefault(record["key"], record)
        if twin is not record:
            raise ValueError(
                f"{named(twin)} and {named(record)} are the same run (key {record['key'][:8]}): it "
                "would count twice. Name a folder that holds it once."
            )
        row = record["method"], record["variant"], record["backbone"]
        column = record["suite"], record["group"], record["task"]
        rows.setdefault(row, {}).setdefault(column, []).append(record)
    return {
        row: {column: _cell(runs) for column, runs in columns.items()}
        for row, columns in rows.items()
    }


def _cell(runs: Sequence[dict]) -> Cell:
    first, seeds = runs[0], {}
    where = f"{first['method']} on {first['task']}"
    for record in runs:
        for path in COMMON:
            one, other = _at(first, path), _at(record, path)
            drawn = path.endswith("weights_sha256") and first["provenance"]["weights"] == "random"
            if one != other and not drawn:  # random weights follow the seed, as they should
                raise ValueError(
                    f"The runs of {where} differ in {path}: {one} in {named(first)}, {other} in "
                    f"{named(record)}. Such numbers are not averaged: choose with --protocol NAME, "
                    "or name a folder that holds only one kind."
                )
        twin = seeds.setdefault(record["seed"], record)
        if twin is not record:
            raise ValueError(
                f"Two runs of {where} have seed {record['seed']}: {named(twin)} and "
                f"{named(record)}. Which one counts cannot be guessed; name a folder with one."
            )
    metric = "top1_best" if peeks(first) else "top1_last"
    return Cell({seed: seeds[seed]["metrics"][metric] for seed in sorted(seeds)}, first)


def _at(record: dict, path: str) -> object:
    for part in path.split("."):
        record = record[part]
    return record


def row_order(grid: dict[tuple, dict[tuple, Cell]]) -> list[tuple]:
    """Methods by the number of parameters they tune, the head apart."""
    return sorted(grid, key=lambda row: (_params(grid[row].values(), "tuned_params"), *row))


@cache
def _published_order() -> dict[str, int]:
    with open(PUBLISHED / "datasets.csv", newline="") as file:
        return {row["dataset"]: i for i, row in enumerate(csv.DictReader(file))}


def column_order(column: tuple) -> tuple:
    """Suites, groups and tasks as the papers print them; what they do not have follows by name."""
    suite, group, task = column
    place = _published_order().get(task, math.inf)
    return _index(SUITES, suite), suite, _index(GROUPS, group), group or "", place, task


def _index(names: Sequence[str], name: str | None) -> int:
    return names.index(name) if name in names else len(names)


def table(found: Iterable[dict]) -> pd.DataFrame:
    """Rows: methods by tuned parameters. Columns: counts, epochs, seeds, tasks, means; all as text.

    `attrs` hold what the text cannot: "best" and "second", sets of (row, column) positions, and
    "notes", the sentences to print below. Raises ValueError as `cells` does, and for no final run.
    """
    grid = cells(found)
    if not grid:
        raise ValueError(
            "There is no final run among these records, and only final runs have a test accuracy. "
            "Let the sweep finish (python sweep.py sweep=NAME), or train with phase=final."
        )
    columns = sorted({column for row in grid.values() for column in row}, key=column_order)
    titles = {column: title_of(column, grid) for column in columns}
    several = len({backbone for _, _, backbone in grid}) > 1
    means = _mean_columns(columns)

    # Rows that peeked at the test set compete for best and second only where all did.
    everywhere = all(peeks(cell.record) for row in grid.values() for cell in row.values())

    lines, scores = [], {}
    for r, row in enumerate(row_order(grid)):
        cells_of_row = grid[row].values()
        honest = not any(peeks(cell.record) for cell in cells_of_row)
        tuned = _params(cells_of_row, "tuned_params")
        line = {
            "Method": _label(row, several) + DAGGER * (not honest),
            "Tuned (M)": _millions(tuned),
            "with head (M)": _millions(tuned + _params(cells_of_row, "head_params")),
            "Epochs": _span(c.record["config"]["optim"]["epochs"] for c in cells_of_row),
            "Seeds": _span(len(c.top1) for c in cells_of_row),
        }
        for column in columns:
            cell = grid[row].get(column)
            line[titles[column]] = DASH if cell is None else text_of(cell.mean, cell.std, 1)
            if cell is not None and (honest or everywhere):
                scores[r, len(line) - 1] = round(cell.mean, 1)
        for title, groups in means.items():
            parts = [[grid[row].get(column) for column in group] for group in groups]
            if any(cell is None for part in parts for cell in part):
                line[title] = DASH
                continue
            mean, std = _mean_of_means(parts)
            line[title] = text_of(mean, std, 2)
            if honest or everywhere:
                scores[r, len(line) - 1] = round(mean, 2)
        lines.append(line)
    frame = pd.DataFrame(lines)
    frame.attrs = _ranks(scores) | {"notes": _notes(grid)}
    return frame


def title_of(column: tuple, grid: dict) -> str:
    record = next(row[column].record for row in grid.values() if column in row)
    return record["config"]["dataset"].get("title") or column[2]


def _label(row: tuple, several_backbones: bool) -> str:
    method, variant, backbone = row
    return method + f" ({variant})" * bool(variant) + f", {backbone}" * several_backbones


def _mean_columns(columns: Sequence[tuple]) -> dict[str, list[list[tuple]]]:
    """Title -> groups of columns, over whose means is averaged. Suites are never mixed."""
    means: dict[str, list[list[tuple]]] = {}
    suites = sorted({column[0] for column in columns}, key=lambda suite: _index(SUITES, suite))
    for suite in suites:
        own = [column for column in columns if column[0] == suite]
        groups: dict[str | None, list[tuple]] = {}
        for column in own:
            groups.setdefault(column[1], []).append(column)
        of = f"{suite} " * (len(suites) > 1)
        if len(groups) > 1 and len(own) > len(groups):
            for group, members in groups.items():
                means[f"Mean {of}{group or 'others'}"] = [members]
            means[f"Mean of {len(groups)} {of}groups"] = list(groups.values())
        if len(own) > 1:
            means[f"Mean of {len(own)} {of}tasks"] = [own]
    return means


def _mean_of_means(parts: Sequence[Sequence[Cell]]) -> tuple[float, float | None]:
    """Mean over groups of their means over tasks; its deviation, taking tasks as independent."""
    mean = statistics.fmean(statistics.fmean(cell.mean for cell in part) for part in parts)
    if any(cell.std is None for part in parts for cell in part):
        return mean, None
    variance = sum(sum(c.std**2 for c in part) / len(part) ** 2 for part in parts) / len(parts) ** 2
    return mean, math.sqrt(variance)


def _params(row: Iterable[Cell], name: str) -> float:
    """Mean over tasks, as the papers give it where heads differ in size."""
    return statistics.fmean(cell.record[name] for cell in row)


def _millions(count: float) -> str:
    return "0" if count == 0 else f"{count / 1e6:.3f}"


def _span(values: Iterable[int]) -> str:
    low, *_, high = sorted({*values}) * 2
    return f"{low}" if low == high else f"{low}–{high}"


def text_of(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _ranks(scores: dict[tuple[int, int], float]) -> dict[str, set]:
    """The best and second values of each column, ties included, as printed; one row has no rank."""
    ranks: dict[str, set] = {"best": set(), "second": set()}
    for c in {c for _, c in scores}:
        column = {position: value for position, value in scores.items() if position[1] == c}
        if len(column) < 2:
            continue
        for name, value in zip(ranks, sorted(set(column.values()), reverse=True), strict=False):
            ranks[name] |= {position for position, v in column.items() if v == value}
    return ranks


def _notes(grid: dict) -> list[str]:
    runs = [cell for row in grid.values() for cell in row.values()]
    notes = ["Top-1 accuracy on the test split in percent; ± standard deviation over seeds."]
    for name in sorted({cell.record["protocol"] for cell in runs}):
        of = [cell for cell in runs if cell.record["protocol"] == name]
        seeds = sorted({seed for cell in of for seed in cell.top1})
        sizes = _span(cell.record["config"]["image_size"] for cell in of)
        notes.append(
            f"Protocol {name}: trained on {_list({c.record['trained_on'] for c in of})} at {sizes} "
            f"pixels, seeds {_list(seeds)}, "
            + ("best epoch on the test set." if peeks(of[0].record) else "last epoch.")
        )
        untuned = {c.record["method"] for c in of if not c.record["selected_from"]}
        if untuned:
            notes.append(f"Fixed learning rate and weight decay, not tuned: {_list(untuned)}.")
    backbones = {(c.record["backbone"], c.record["provenance"]["weights"]) for c in runs}
    notes.append("Backbone: " + _list(f"{name} ({weights})" for name, weights in backbones) + ".")
    if any(peeks(cell.record) for cell in runs):
        notes.append(f"{DAGGER} Best epoch on the test set: comparable only with rows so marked.")
    return notes


def _list(names: Iterable) -> str:
    return ", ".join(str(name) for name in sorted(names))


def markdown(frame: pd.DataFrame) -> str:
    """The table as GitHub prints it: best bold, second underlined, notes below."""
    marks = {"best": "**{}**", "second": "<u>{}</u>"}
    rows = [[str(text).replace("|", r"\|") for text in row] for row in frame.to_numpy()]
    for kind, mark in marks.items():
        for r, c in frame.attrs.get(kind, ()):
            rows[r][c] = mark.format(rows[r][c])
    lines = [list(frame.columns), ["---", *["---:"] * (len(frame.columns) - 1)], *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text + "\n\n" + "\n".join(f"- {note}" for note in frame.attrs.get("notes", ())) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.tabulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", metavar="RUNS_DIR", type=Path, help="where records lie, below it")
    parser.add_argument("--protocol", help="only the runs under this protocol")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    parser.add_argument("--plot", type=Path, help="also draw the accuracies (.png or .svg)")
    options = parser.parse_args(arguments)
    found = collect(options.folder)
    if options.protocol:
        there = {record["protocol"] for record in found}
        if options.protocol not in there:
            raise ValueError(f"No run has protocol {options.protocol!r}; there is {_list(there)}.")
        found = [record for record in found if record["protocol"] == options.protocol]
    text = markdown(table(found))
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        records.write(options.out, text)
    if options.plot:
        from scripts.plot import accuracy_plot

        accuracy_plot(found, options.plot)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
