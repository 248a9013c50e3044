"""Our own records: collected, checked, and grouped into cells whose runs belong together.

Records that disagree about what they measured are refused, never averaged.
"""

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from peft import record as records

RESULTS = Path(__file__).parent.parent / "results"
PUBLISHED = RESULTS / "published"
SUITES = ("mini", "vtab", "fgvc", "cifar")
GROUPS = ("natural", "specialized", "structured")

# What the runs of one cell must have in common, as paths into a record, beside all of their
# configuration but the seed.
RULED = ["protocol", "selection", "trained_on"]
MEASURED = [
    *("tuned_params", "head_params", "provenance.weights_sha256", "provenance.data_sha256"),
    *("provenance.pixels", "provenance.kernel", "provenance.mean", "provenance.std"),
    "provenance.weights",
]
COMMON = [*RULED, *MEASURED]


@dataclass(frozen=True)
class Cell:
    """One method on one task: top-1 in percent by seed, and the records by seed."""

    top1: dict[int, float]
    runs: tuple[dict, ...]

    @property
    def record(self) -> dict:
        return self.runs[0]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None with one seed."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else None


def collect(folder: str | Path) -> list[dict]:
    """Every record below a folder, in the order of their paths, each with its path under "file".

    `folder` may be one record, too. Raises FileNotFoundError where there is none, ValueError naming
    the file of a bad one.
    """
    folder = Path(folder)
    paths = [folder] if folder.is_file() else sorted(folder.rglob("record.json"))
    if not paths:
        failed = " (but a failure.json, which says why)" * (folder / "failure.json").exists()
        raise FileNotFoundError(
            f"There is no record.json below {folder}{failed}: run something first (make demo, "
            "python train.py, python sweep.py), or name the folder where the runs are."
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
    missing += [path for path in COMMON if not missing and not _has(record, path)]
    if missing:
        raise ValueError(f"{named(record)} lacks {', '.join(missing)}: it is not a whole record.")
    metrics = dict(record["metrics"])
    needed = metric_of(record)
    if needed not in metrics:
        raise ValueError(
            f"{named(record)} is a {record['phase']} run without {needed} among its metrics."
        )
    for name, value in metrics.items():
        top = 100 if name.startswith("top1") else math.inf
        if not _number(value) or not 0 <= value <= top:
            raise ValueError(f"{named(record)} has {name}={value}, which cannot be.")
    for name in ("tuned_params", "head_params"):
        if not _number(record[name]) or record[name] != int(record[name]) or record[name] < 0:
            raise ValueError(f"{named(record)} has {name}={record[name]}, which is no count.")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def tested(record: dict) -> bool:
    """Whether a run saw the test split: final runs, and what is derived from them."""
    return records.scored_as(record["config"]) == "final"


def peeks(record: dict) -> bool:
    """Whether the epoch that counts was chosen on the test set. What is derived from a run has the
    weights of its last epoch."""
    return record["selection"] == "best_on_test" and record["phase"] == "final"


def metric_of(record: dict) -> str:
    """The accuracy that counts under a record's protocol."""
    return "top1_best" if peeks(record) else "top1_last" if tested(record) else "top1_val"


def cells(found: Iterable[dict]) -> dict[tuple, dict[tuple, Cell]]:
    """Tested runs by row (method, variant, backbone), then by column (suite, group, task).

    Raises ValueError, naming the records, for a key or seed that comes twice in one cell and for
    records that do not measure the same thing.
    """
    rows: dict[tuple, dict[tuple, list[dict]]] = {}
    keys: dict[str, dict] = {}
    for record in found:
        validate(record)
        if not tested(record):
            continue
        twin = keys.setdefault(record["key"], record)
        if twin is not record:
            raise ValueError(
                f"{named(twin)} and {named(record)} are the same run (key {record['key'][:8]}): it "
                "would count twice. Name a folder that holds it once."
            )
        rows.setdefault(row_of(record), {}).setdefault(column_of(record), []).append(record)
    return {
        row: {column: cell_of(runs) for column, runs in columns.items()}
        for row, columns in rows.items()
    }


def row_of(record: dict) -> tuple[str, str, str]:
    return record["method"], record["variant"], record["backbone"]


def column_of(record: dict) -> tuple[str, str | None, str]:
    return record["suite"], record["group"], record["task"]


def cell_of(runs: Sequence[dict]) -> Cell:
    """Raises ValueError, naming two records, where they do not measure the same thing."""
    first, seeds = runs[0], {}
    where = f"{first['method']} on {first['task']}"
    for record in runs:
        for path, one, other, choose in differences(first, record):
            raise ValueError(
                f"The runs of {where} differ in {path}: {one} in {named(first)}, {other} in "
                f"{named(record)}. Such numbers are not averaged: {choose}name a folder that holds "
                "only one kind."
            )
        twin = seeds.setdefault(record["seed"], record)
        if twin is not record:
            raise ValueError(
                f"Two runs of {where} have seed {record['seed']}: {named(twin)} and "
                f"{named(record)}. Which one counts cannot be guessed; name a folder with one."
            )
    ordered = [seeds[seed] for seed in sorted(seeds)]
    return Cell(
        {record["seed"]: record["metrics"][metric_of(first)] for record in ordered}, tuple(ordered)
    )


def differences(first: dict, record: dict) -> Iterator[tuple[str, object, object, str]]:
    """In what two runs of one cell are unlike and must not be, (path, one, other, which option
    would choose): who may see the test set, any of their settings but the seed, what was found."""
    drawn = first["provenance"]["weights"] == "random"  # follow the seed, as they should
    for path in RULED:
        if (one := at(first, path)) != (other := at(record, path)):
            yield path, one, other, f"choose with --protocol {first['protocol']}, or "
    said, own = (records.flat(records.identity(r["config"])) for r in (first, record))
    for path in dict.fromkeys([*said, *own]):
        one, other = said.get(path), own.get(path)
        if one != other and path not in ("seed", "derived.of"):
            yield path, one, other, f"choose with --where {path}={one}, or "
    for path in MEASURED:
        one, other = at(first, path), at(record, path)
        if one != other and not (drawn and path.endswith("weights_sha256")):
            yield path, one, other, ""


def at(record: dict, path: str) -> object:
    for part in path.split("."):
        record = record[part]
    return record


def _has(record: dict, path: str) -> bool:
    try:
        at(record, path)
    except (KeyError, TypeError):
        return False
    return True


def row_order(grid: dict[tuple, dict[tuple, Cell]]) -> list[tuple]:
    """Methods by the number of parameters they tune, the head apart."""
    return sorted(grid, key=lambda row: (params(grid[row].values(), "tuned_params"), *row))


@cache
def _published_order() -> dict[str, int]:
    with open(PUBLISHED / "datasets.csv", newline="") as file:
        return {row["dataset"]: i for i, row in enumerate(csv.DictReader(file))}


def column_order(column: tuple) -> tuple:
    """Suites, groups and tasks as the papers print them; what they do not have follows by name."""
    suite, group, task = column
    place = _published_order().get(task, math.inf)
    return index(SUITES, suite), suite, index(GROUPS, group), group or "", place, task


def index(names: Sequence[str], name: str | None) -> int:
    return names.index(name) if name in names else len(names)


def title_of(column: tuple, grid: dict) -> str:
    record = next(row[column].record for row in grid.values() if column in row)
    return record["config"]["dataset"].get("title") or column[2]


def mean_of_means(parts: Sequence[Sequence[Cell]]) -> tuple[float, float | None]:
    """Mean over groups of their means over tasks; its deviation, taking tasks as independent."""
    mean = statistics.fmean(statistics.fmean(cell.mean for cell in part) for part in parts)
    if any(cell.std is None for part in parts for cell in part):
        return mean, None
    variance = sum(sum(c.std**2 for c in part) / len(part) ** 2 for part in parts) / len(parts) ** 2
    return mean, math.sqrt(variance)


def params(row: Iterable[Cell], name: str) -> float:
    """Mean over tasks, as the papers give it where heads differ in size."""
    return statistics.fmean(cell.record[name] for cell in row)


def span(values: Iterable[int]) -> str:
    low, *_, high = sorted({*values}) * 2
    return f"{low}" if low == high else f"{low}–{high}"


def listed(names: Iterable) -> str:
    return ", ".join(str(name) for name in sorted(names))
