"""Tables of our runs and of the papers, ours beside theirs, from records and results/published.

    python -m scripts.tabulate TABLE        a paper's table (rlrr/table2, rlrr/s5 ...), ours beside
    python -m scripts.tabulate RUNS_DIR     our runs below a folder, alone
    python -m scripts.tabulate all          every table, into results/tables
    python -m scripts.tabulate --keep RUN…  copies the records of runs into results/records

A cell of ours is the mean ± standard deviation of top-1 over seeds, of final runs only, since only
they saw the test set as their protocol says. Records that disagree about what they measured are
refused, never averaged.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from peft import record as records
from peft.rows import meant
from scripts import papers, points, published
from scripts.render import FORMATS, markdown
from scripts.runs import (
    PUBLISHED,
    RESULTS,
    SUITES,
    Cell,
    cells,
    collect,
    column_order,
    listed,
    named,
    peeks,
    row_order,
    title_of,
)
from scripts.tables import DAGGER, DASH, NO_RUNS, Table, own_table, text_of

RECORDS, TABLES = RESULTS / "records", RESULTS / "tables"


def table(found: Iterable[dict], name: str = "") -> Table:
    """Our runs alone. Raises ValueError where there is no final run among them."""
    made = own_table(found, name)
    if not made.lines:
        raise ValueError(
            "There is no final run among these records, and only final runs have a test accuracy. "
            "Let the sweep finish (python sweep.py sweep=NAME), or train with phase=final."
        )
    return made


def kept() -> list[dict]:
    """The records that tables are made from; none in a checkout without runs."""
    return collect(RECORDS) if any(RECORDS.rglob("record.json")) else []


WHERE = "only the runs whose configuration says so, such as optim.lr=1e-3; may be repeated"


def under(found: Sequence[dict], protocol: str | None, where: Sequence[str] = ()) -> list[dict]:
    """The records under one protocol whose configurations have some values, `where` (key=value).
    Raises ValueError for a protocol or a value that no run has."""
    there = {record["protocol"] for record in found}
    if protocol and protocol not in there:
        raise ValueError(
            f"No run has protocol {protocol!r}; there is {listed(there) or 'no run at all'}."
        )
    found = [record for record in found if protocol in (None, record["protocol"])]
    for word in where:
        path, given, text = word.partition("=")
        if not given:
            raise ValueError(f"--where {word} has no value: give KEY=VALUE, such as optim.lr=1e-3")
        value = meant(text)
        own = [(record, records.flat(record["config"]).get(path)) for record in found]
        found = [record for record, has in own if has == value]
        if not found:
            there = listed({str(has) for _, has in own})
            raise ValueError(f"No run has {path}={value}; there is {there or 'no run at all'}.")
    return found


def find(name: str) -> list[str]:
    """The tables meant by a name. Raises ValueError naming the nearest for one that is not."""
    return [name.lower()] if name.lower() in points.names() else papers.find(name)


def named_table(name: str, found: Sequence[dict]) -> Table:
    make = points.table if name in points.names() else papers.published_table
    return make(name, found)


def every(found: Sequence[dict]) -> dict[str, Table]:
    """Name -> table: every table of the papers, and one of our own for every suite with runs."""
    published.check()
    made = {name: named_table(name, found) for name in [*papers.names(), *points.names()]}
    for suite in SUITES:
        of_suite = [record for record in found if record["suite"] == suite]
        if of_suite or suite == "mini":
            made[suite] = own_table(of_suite, suite)
    return made


def write(made: dict[str, Table], folder: Path) -> list[Path]:
    """Writes tables in every format; all of them are made before the first is written."""
    files = {
        folder / f"{name}.{kind}": render(made[name])
        for name in made
        for kind, render in FORMATS.items()
    }
    if len(made) > 1:
        files[folder / "README.md"] = contents(made)
        files[folder / "all.tex"] = document(made)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            records.write(path, text)
    return list(files)


def contents(made: dict[str, Table]) -> str:
    lines = ["# Tables", "", "Made by `make tables`, never by hand.", ""]
    for name, one in made.items():
        rows = sorted({line.row for line in one.lines})
        ours = {line.row for line in one.lines if line.source == "ours" and _measured(line)}
        others = ", ".join(f"[{kind}]({name}.{kind})" for kind in FORMATS if kind != "md")
        state = f"ours in {len(ours)} of {len(rows)} rows" if rows else "no run yet"
        lines.append(f"- [{one.title}]({name}.md): {state} ({others})")
    return "\n".join(lines) + "\n"


def _measured(line) -> bool:
    return any(entry.runs for entry in line.entries.values())


def document(made: dict[str, Table]) -> str:
    """A LaTeX document of all tables: pdflatex all.tex in its folder."""
    inputs = "\n".join(f"\\input{{{name}.tex}}\n\\clearpage" for name in made)
    return (
        "\\documentclass[a3paper]{article}\n"
        "\\usepackage[landscape,margin=1cm]{geometry}\n\\usepackage{booktabs,graphicx}\n"
        f"\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )


def keep(sources: Sequence[Path]) -> list[dict]:
    """Copies the records at or below `sources` into results/records, each as it is; one that is
    there already only where it has been chosen from a wider grid since.

    Raises ValueError, with nothing copied, for a bad record, one that is there already with other
    content, or one that cannot stand in a table beside those that are kept.
    """
    found = [record for source in sources for record in collect(source)]
    taken: dict[Path, dict] = {}
    for record in found:
        target = RECORDS / records.folder_of(record["config"], "") / "record.json"
        tried, there = record["selected_from"], taken.get(target)
        if there is None and target.exists():
            there = records.read(target) | {"file": str(target)}
        if there and {**there, "selected_from": tried, "file": record["file"]} != record:
            raise ValueError(
                f"{record['file']} and {there['file']} are the same run with other results, "
                "and one measurement is kept of each: delete the one that you do not trust."
            )
        if there is None or set(there["selected_from"]) < set(tried):
            taken[target] = record
    cells([*kept(), *(record for target, record in taken.items() if not target.exists())])
    for target, record in taken.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        records.write(target, Path(record["file"]).read_bytes())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.tabulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", nargs="?", help="a table of a paper, a folder of runs, or all")
    parser.add_argument("--keep", nargs="+", type=Path, metavar="RUN", help="keep these records")
    parser.add_argument("--protocol", help="only the runs under this protocol")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help=WHERE)
    parser.add_argument("--records", type=Path, help="records to show beside a paper's figures")
    parser.add_argument("--format", choices=FORMATS, default="md", help="what to print")
    parser.add_argument("--out", type=Path, help="also write the table; its name says the format")
    parser.add_argument("--plot", type=Path, help="also draw the accuracies (.png or .svg)")
    options = parser.parse_args(arguments)
    if options.keep:
        done = keep(options.keep)
        print(f"{len(done)} records are in {RECORDS}; `make tables` shows them.")
    if options.what is None:
        return parser.error("name a table, a folder or all") if not options.keep else None
    chosen = partial(under, protocol=options.protocol, where=options.where)
    if options.what == "all":
        found = chosen(collect(options.records) if options.records else kept())
        folder = options.out or TABLES
        paths = write(every(found), folder)
        print(f"{len(paths)} files in {folder}, from {len(found)} records")
        return None
    if Path(options.what).exists():
        found = chosen(collect(options.what))
        made = {"": table(found, Path(options.what).name)}
    else:
        found = chosen(collect(options.records) if options.records else kept())
        made = {name: named_table(name, found) for name in find(options.what)}
    print("\n".join(FORMATS[options.format](one) for one in made.values()))
    if options.out:
        kind = options.out.suffix[1:]
        if kind not in FORMATS:
            raise ValueError(f"{options.out} is none of {', '.join('.' + k for k in FORMATS)}.")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        records.write(options.out, "\n".join(FORMATS[kind](one) for one in made.values()))
    if options.plot:
        from scripts.plot import accuracy_plot

        accuracy_plot(found, options.plot)
    return None


__all__ = [
    "DAGGER", "DASH", "NO_RUNS", "PUBLISHED", "Cell", "cells", "collect", "column_order", "listed",
    "markdown", "named", "peeks", "row_order", "table", "text_of", "title_of",
]  # fmt: skip

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
