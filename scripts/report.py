"""One page with everything: our tables and the papers', plots, where each number comes from, what
is doubtful, and what is missing.

    python -m scripts.report [RECORDS_DIR] [--out FILE.html]

Reads results/records (or RECORDS_DIR) and results/published, nothing else, and writes one file that
needs no server and no network; its script sorts, filters and explains, and without it everything is
there to be read. The same records give the same bytes.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from peft import record as records
from scripts import compare, papers, plot, published
from scripts.page import Page, command, name_of, prose, safe
from scripts.runs import collect, tested
from scripts.tables import Table
from scripts.tabulate import RECORDS, TABLES, every, kept

PLOTS = {
    "params": "Accuracy against tuned parameters",
    "memory": "Accuracy against the peak memory of training",
    "time": "Accuracy against the time of training, beside whatever else ran on the machine",
    "seeds": "Every seed",
    "ranks": "Mean ranks, and what a test tells apart",
    "ablation": "Ablations",
    "heatmap": "Validation accuracy over learning rate and weight decay",
}
TO_HAVE_RUNS = (
    "python sweep.py sweep=mini action=run",
    "python -m scripts.tabulate --keep results/runs/mini",
    "make report",
)


def report(found: Sequence[dict]) -> str:
    """The whole page from these records. Raises ValueError as the tables do."""
    page = Page()
    made = every(found)
    theirs = {name: table for name, table in made.items() if "/" in name}
    page.add(_head(found, theirs), '<h2 id="ours">Our runs</h2>')
    if any(tested(record) for record in found):
        for suite in made.keys() - theirs.keys():
            of_suite = [record for record in found if record["suite"] == suite]
            if of_suite:
                page.table(made[suite])
                _own_plots(page, of_suite)
    else:
        page.add(
            '<p class="none"><strong>There are no runs of our own yet.</strong> Every line of ours '
            "below is empty, and says which command fills it. Run some, keep their records, and "
            "make this page again:</p>",
            *map(command, TO_HAVE_RUNS),
        )
    for paper, title in papers.PAPERS.items():
        page.add(f'<h2 id="{paper}">{title}</h2>')
        for name, table in theirs.items():
            if name.startswith(f"{paper}/"):
                page.table(table)
                _published_plots(page, table, found)
    page.add('<h2 id="errata">Errata</h2>', prose((published.PUBLISHED / "errata.md").read_text()))
    return page.text()


def _head(found: Sequence[dict], theirs: dict[str, Table]) -> str:
    """What there is, how to read it, and where."""
    ours = [record for record in found if tested(record)]
    beside = [
        t for t in theirs.values() if any(e.runs for x in t.lines for e in x.entries.values())
    ]
    have = f"There is no run of our own yet; there are {len(theirs)} published tables and figures."
    if ours:
        methods = len({record["method"] for record in ours})
        tasks = len({(record["suite"], record["task"]) for record in ours})
        have = (
            f"Tested runs of our own: {len(ours)}, of {methods} methods on {tasks} "
            f"{'task' if tasks == 1 else 'tasks'}. Of "
            f"{len(theirs)} published tables and figures, {len(beside)} have ours beside them."
        )
    links = ['<b>Ours</b><a href="#ours">Our runs</a><a href="#errata">Errata</a>']
    for paper, title in papers.PAPERS.items():
        links.append(f"<b>{title}</b>")
        for name, table in theirs.items():
            if name.startswith(f"{paper}/"):
                short = re.sub(r"^\w+, ", "", table.title)
                links.append(f'<a href="#{name_of(name)}">{safe(short)}</a>')
    return (
        "<h1>Visual PEFT: ours beside the published</h1>"
        f'<p class="lead">{have} Published numbers stand as printed; a field with a question mark '
        "is doubtful and says why. Choose any field (click, or arrow keys and Enter) to see where "
        "its number comes from; choose a heading to sort by it.</p>"
        f'<nav aria-label="Tables">{"".join(links)}</nav>'
    )


def _own_plots(page: Page, found: Sequence[dict]) -> None:
    page.add('<div class="plots">')
    for kind, caption in PLOTS.items():
        page.plot(caption, lambda kind=kind: plot.DRAW[kind](found, None))
    page.add("</div>")


def _published_plots(page: Page, shown: Table, found: Sequence[dict]) -> None:
    """What a table has enough numbers for."""
    try:
        table = compare.printed(shown.name)
    except ValueError:  # no accuracies, as in a table of parameter counts
        return
    whole = [row for row, cells in table.rows.items() if {*table.tasks} <= cells.keys()]
    suite = papers.SUITES[table.benchmark]
    ours = [record for record in found if record["suite"] == suite and tested(record)]
    draw = {}
    if compare.printed_lines(table):
        draw[PLOTS["ablation"]] = lambda: compare.ablation(ours, None, table)
    elif len(table.params) > 3:
        draw[PLOTS["params"]] = lambda: compare.cost(ours, "params", table)
    if len(table.tasks) > 4 and len(whole) > 4:
        draw[PLOTS["ranks"]] = lambda: compare.ranking([], table)
    if any(entry.runs for line in shown.lines for entry in line.entries.values()):
        draw["Ours beside the published"] = lambda: compare.beside(shown)
    if draw:
        page.add('<details><summary>Plots</summary><div class="plots">')
        for caption, make in draw.items():
            page.plot(f"{shown.title}: {caption[0].lower()}{caption[1:]}", make)
        page.add("</div></details>")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", nargs="?", type=Path, default=RECORDS, metavar="RECORDS_DIR")
    parser.add_argument("--out", type=Path, default=TABLES / "report.html", metavar="FILE.html")
    options = parser.parse_args(arguments)
    found = kept() if options.folder == RECORDS else collect(options.folder)
    text = report(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    records.write(options.out, text)
    print(f"written: {options.out} ({len(text.encode()) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
