"""Which experiment stands behind a published table, and which command fills a row of it.

    python -m scripts.experiments                # every experiment, its table, its rows
    python -m scripts.experiments rlrr/table2    # its rows, each with the command that fills it

A pure look-up: a row of results/published is found by its backbone, method and variant.
"""

import sys
from collections.abc import Mapping
from functools import cache

from omegaconf import OmegaConf

from peft import config
from peft.rows import CONFIGS, Row, matches, rows_of

__all__ = ["Row", "command", "datasets", "find", "matches", "names", "of_published", "rows"]


@cache
def names() -> list[str]:
    """Every experiment, e.g. rlrr/table2, tables in the papers' order."""

    def order(name: str) -> tuple:
        paper, _, table = name.partition("/")
        papers = ["rlrr", "alore", "lava", "superlora"]
        kinds = ["table", "s", "fig", "a"]
        kind = next(kind for kind in kinds if table.startswith(kind))
        number = table.removeprefix(kind)
        digits = number.rstrip("abcd")
        return papers.index(paper), kinds.index(kind), int(digits), number

    folder = CONFIGS / "experiment"
    found = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(found, key=order)


@cache
def sweep(name: str) -> Mapping:
    """The `sweep` of an experiment, with the datasets of the part that it builds on. Raises
    ValueError for an unknown name, naming near ones."""
    if name not in names():
        raise ValueError(f"there is no experiment {name!r}; {config.near(name, names())}")
    said = OmegaConf.load(CONFIGS / "experiment" / f"{name}.yaml")
    base = next(entry["override /sweep"] for entry in said.defaults)
    below = OmegaConf.load(CONFIGS / "sweep" / f"{base}.yaml")
    own = OmegaConf.to_container(OmegaConf.merge(below, said.sweep))
    own.pop("defaults", None)
    return {"grid": None, "seeds": None, "overrides": [], **own}


@cache
def rows(name: str) -> list[Row]:
    """The rows of an experiment in the paper's order."""
    return rows_of(sweep(name))


def datasets(name: str) -> list[str]:
    """Its tasks, in the paper's order."""
    return [dataset.rpartition("/")[2] for dataset in sweep(name)["dataset"]]


@cache
def of_published(paper: str, table: str) -> str | None:
    """The experiment of a table as results/published names it: rlrr, T2 -> rlrr/table2."""
    for name in names():
        if sweep(name).get("published") == f"{paper}/{table}":
            return name
    return None


def find(
    paper: str, table: str, backbone: str, pretraining: str, method: str, variant: str
) -> Row | None:
    """The row that a line of results/published belongs to; None where no experiment has it."""
    name = of_published(paper, table)
    key = (backbone, pretraining, method, variant)
    return next((row for row in rows(name) if row.published == key), None) if name else None


def command(name: str, row: Row | None = None, dataset: str | None = None) -> str:
    """The command that fills a table, one of its rows, or a single cell, quoted for any shell."""
    parts = [f"python sweep.py experiment={name}"]
    parts += [f"'rows=[{row.number}]'"] if row else []
    parts += [f"'datasets=[{dataset}]'"] if dataset else []
    return " ".join(parts)


def main() -> None:
    chosen = sys.argv[1:]
    for name in chosen or names():
        try:
            own = rows(name)
        except ValueError as error:
            sys.exit(f"error: {error}")
        absent = sum(bool(row.absent) for row in own)
        print(
            f"{name}: {sweep(name)['published'] or 'no printed numbers'}, {len(own)} rows"
            + (f", {absent} of them without runs" if absent else "")
        )
        for row in own if chosen else []:
            print(f"  {row.label}: {row.absent or command(name, row)}")


if __name__ == "__main__":
    main()
