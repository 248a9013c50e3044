"""Our runs of one row of an experiment, and the command that fills what is not there."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from scripts import experiments, runs
from scripts.tables import DASH, Entry, Missing, score


def cells_of(
    name: str, row: experiments.Row, found: Iterable[dict], point: Mapping = MappingProxyType({})
) -> dict[str, runs.Cell]:
    """Our cells of one row of an experiment, by task. Raises ValueError as `runs.cell_of` does."""
    by_task: dict[str, list[dict]] = {}
    for record in found:
        place = f"{record['suite']}/{record['task']}"
        here = runs.tested(record) and place in experiments.sweep(name)["dataset"]
        if here and belongs(record, row, point):
            by_task.setdefault(record["task"], []).append(record)
    return {task: runs.cell_of(records) for task, records in by_task.items()}


def belongs(record: dict, row: experiments.Row, point: Mapping) -> bool:
    """Whether a record is a run of a row, at one of the points that it runs through."""
    wanted = {path.removeprefix("method."): value for path, value in point.items()}
    return experiments.matches(record, row) and wanted.items() <= record["config"]["method"].items()


def missing(
    label: str, name: str | None, row: experiments.Row | None, lost: Sequence[str]
) -> Missing:
    """What a row lacks, and the command that fills it, or why there is none."""
    if name is None or row is None or row.absent:
        return Missing(label, "no run", why=row.absent if row else "no experiment has this row")
    whole = len(experiments.datasets(name))
    what = f"{len(lost)} of {whole} tasks" if whole > 1 else "no run"
    what += f" ({', '.join(lost)})" * (len(lost) < whole and len(lost) <= 3)
    only = lost[0] if len(lost) == 1 < whole else None
    return Missing(label, what, experiments.command(name, row, only))


def fraction(cell: runs.Cell | None, digits: int) -> Entry:
    """An accuracy from 0 to 1."""
    if cell is None:
        return Entry(DASH)
    std = None if cell.std is None else cell.std / 100
    return score(cell.mean / 100, std, digits, cell.runs)


def share(cell: runs.Cell | None, found: Iterable[dict], digits: int) -> Entry:
    """What a run trains, in percent of the whole model: of the parameters that full fine-tuning of
    the same backbone on the same task trains. A dash where no such run is there."""
    if cell is None:
        return Entry(DASH)
    record = cell.record
    same = ("suite", "task", "backbone")
    whole = {
        other["tuned_params"] + other["head_params"]
        for other in found
        if other["method"] == "full" and all(other[key] == record[key] for key in same)
    }
    if len(whole) != 1:
        return Entry(DASH)
    percent = 100 * (record["tuned_params"] + record["head_params"]) / whole.pop()
    return Entry(f"{percent:.{digits}f}", percent, runs=cell.runs)


def count(cell: runs.Cell | None) -> Entry:
    """The number of tuned parameters, without the head."""
    if cell is None:
        return Entry(DASH)
    tuned = cell.record["tuned_params"]
    return Entry(str(tuned), tuned, runs=cell.runs)
