"""The papers' numbers: whole, and off exactly where the errata say."""

import hashlib
import re
import shutil
from collections import Counter
from functools import cache

import pandas as pd
import pytest

from scripts import papers, published, render

ROWS = {"rlrr": 1659, "alore": 2784, "lava": 487, "superlora": 44}
# Printed and recomputed, by paper, table, method or variant, and mean.
OFF = {
    ("rlrr", "T5", "mlp4", "mean_all"): (57.7, 56.14),
    ("rlrr", "T5", "vpt_shallow", "mean_all"): (62.9, 62.72),
    ("rlrr", "T5", "vpt_deep", "mean_all"): (67.7, 68.57),
    ("rlrr", "S7", "mlp4", "mean_structured"): (31.2, 35.02),
    ("rlrr", "S7", "vpt_shallow", "mean_all"): (62.9, 62.71),
    ("rlrr", "S7", "vpt_deep", "mean_all"): (67.7, 68.59),
    ("rlrr", "S8", "vpt_shallow", "mean_natural"): (40.0, 40.47),
    ("rlrr", "S9", "rlrr", "mean_structured"): (62.1, 60.78),
    ("rlrr", "S9", "rlrr", "mean_all"): (73.1, 71.96),
    ("alore", "T2", "adapter", "mean_all"): (71.44, 71.39),
    ("alore", "T2", "adapter", "mean_group"): (73.86, 73.78),
    ("alore", "T5a", "arc", "mean_all"): (73.01, 72.56),
    ("alore", "T5a", "arc", "mean_group"): (75.60, 75.17),
    ("alore", "T18", "alore", "mean_all"): (74.86, 75.39),
    ("lava", "T2", "adapter", "mean_all"): (85.0, 84.11),
    ("lava", "T8", "lava", "mean_all"): (78.2, 78.06),
}


def fresh() -> None:
    for cached in (published.read, published.numbers, published.tasks, published.errata,
                   published.origins, published.counts):  # fmt: skip
        cached.cache_clear()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the files that may be spoilt."""
    folder = tmp_path / "published"
    shutil.copytree(published.PUBLISHED, folder)
    monkeypatch.setattr(published, "PUBLISHED", folder)
    fresh()
    yield folder
    fresh()


def test_every_number_is_there():
    assert {paper: len(published.numbers(paper)) for paper in published.PAPERS} == ROWS
    tasks = published.tasks()
    assert [len(tasks[group]) for group in (*published.GROUPS, "fgvc")] == [7, 4, 8, 5]


def test_exactly_the_known_means_are_off():
    every = pd.concat(map(published.means, published.PAPERS))
    assert len(every) == 622
    off = {
        (row.paper, row.table, row.method, row.dataset): (row.printed, row.recomputed)
        for row in published.check().itertuples()
    }
    assert off.keys() == OFF.keys()
    for cell, (printed, recomputed) in OFF.items():
        assert off[cell] == (printed, pytest.approx(recomputed, abs=0.006)), cell


def test_every_mean_is_explained():
    page = (published.PUBLISHED / "errata.md").read_text()
    table = page.partition("## Means")[2].partition("## Cells")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(OFF)
    for (paper, name, method, _), (printed, recomputed) in OFF.items():
        cells = f"{paper} {name}".lower(), method, (f"| {printed} |", f"| {printed:.2f} |")
        assert any(
            line.lower().startswith(f"| {cells[0]} ")
            and cells[1] in line
            and any(value in line for value in cells[2])
            and any(f"| {recomputed + e:.2f} |" in line for e in (0, 0.01))
            for line in lines
        ), (paper, name, method)


def spoil(folder, name, old, new, renew=True):
    """Edits a file; renews its digest unless that is what is tested."""
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if renew:
        sums = (folder / "SHA256SUMS").read_text()
        before = hashlib.sha256(text.encode()).hexdigest()
        after = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "SHA256SUMS").write_text(sums.replace(before, after))


CELL = "rlrr,T2,vtab-1k,vit_b16,in21k,full,,cifar100,top1,68.9"


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (CELL.replace("68.9", "78.9"), "contradicts its cells"),
        (CELL.replace("68.9", "6B.9"), r"rlrr\.csv, line \d+: the value is no number"),
        (CELL.replace("68.9", "689"), r"rlrr\.csv, line \d+: not a percentage"),
        (CELL.replace("cifar100", "dtd"), r"rlrr\.csv, line \d+: a cell that is there already"),
        (CELL.replace("rlrr", "alore"), r"rlrr\.csv, line \d+: a row of another paper"),
    ],
)
def test_a_wrong_edit_is_refused(copy, new, reason):
    spoil(copy, "rlrr.csv", CELL, new)
    with pytest.raises(ValueError, match=reason):
        published.check()


def test_any_unannounced_edit_is_refused(copy):
    spoil(copy, "rlrr.csv", CELL, CELL.replace("68.9", "68.8"), renew=False)
    with pytest.raises(ValueError, match=r"rlrr\.csv is not the file that was checked"):
        published.check()


def test_errata_name_real_cells(copy):
    assert len(published.errata()) == 36
    spoil(copy, "errata.csv", "dsprites_location", "dsprites_place", renew=False)
    fresh()
    with pytest.raises(ValueError, match=r"errata\.csv, line \d+: no table prints"):
        published.errata()


def test_an_erratum_that_adds_up_is_refused(copy):
    line = next(
        line
        for line in (copy / "errata.csv").read_text().splitlines()
        if line.startswith("alore,T18")
    )
    spoil(copy, "errata.csv", line, line.replace("mean_all", "mean_group"), renew=False)
    with pytest.raises(ValueError, match="contradicts its cells, other than"):
        published.check()


@cache
def table(name):
    return papers.published_table(name)


def test_every_table_is_rendered_cell_by_cell():
    """Every figure of the papers that the suite covers stands in a table once, as printed."""
    printed = pd.concat(map(published.numbers, published.PAPERS))
    printed = printed[
        printed["benchmark"].isin(papers.BENCHMARKS) & printed["metric"].isin(papers.METRICS)
    ]
    expected, found = Counter(), Counter()
    for row in printed.itertuples():
        expected[row.paper, row.table, row.value + f" ± {row.std}" * bool(row.std)] += 1
    for name in papers.names():
        for line in table(name).lines:
            for column in table(name).columns:
                entry = line.entry(column)
                if line.source == "published" and column.kind in ("score", "plain"):
                    where = papers.catalogue()[name]
                    found[(*where, entry.text)] += entry.text != "" and not entry.computed
    assert +found == expected


@pytest.mark.parametrize("name", papers.names())
def test_a_cell_stands_in_its_row_and_column(name):
    """Each cell of the CSV is found by what its row and its column are called, doubts included."""
    paper, number = papers.catalogue()[name]
    made = table(name)
    lines = [line for line in made.lines if line.source == "published"]
    frame = published.numbers(paper)
    frame = frame[(frame["table"] == number) & frame["metric"].isin(papers.METRICS)]
    doubts = set(published.errata()[published.CELL].itertuples(index=False, name=None))
    for cell in frame.itertuples():
        (line,) = (
            line
            for line in lines
            if all(getattr(cell, label) == value for label, value in line.key.items())
        )
        keys = cell.dataset, cell.metric, cell.backbone, cell.method
        entries = [line.entries[key] for key in keys if key in line.entries]
        assert cell.value in [entry.text for entry in entries if not entry.computed], cell
        where = tuple(getattr(cell, column) for column in published.CELL)
        doubtful = where in doubts or (*where[:-2], "", "") in doubts
        assert doubtful == any(entry.doubt for entry in entries), cell
    tex = "\n".join(line for line in render.latex(made).splitlines() if line[0:1] != "%")
    assert re.search(r"(?<!\\)[_#%^~]", tex.replace("%\n", "")) is None  # nothing to trip over
    assert tex.count("{") == tex.count("}") and tex.isascii()
    for text in (render.markdown(made), tex, render.html(made)):
        assert all(value in text for value in frame["value"])
    order = [line.key for line in lines]
    assert order == [dict(zip(order[0], row)) for row in dict.fromkeys(
        frame[[*order[0]]].itertuples(index=False, name=None))]  # fmt: skip


def test_marks_of_origin():
    """Rows said to be another table's, cell by cell, are; rows of a paper's own are not marked."""
    frame = pd.concat(map(published.numbers, ("rlrr", "alore")))
    tasks = {task for group in published.tasks().values() for task in group}
    frame = frame[frame["dataset"].isin(tasks)]
    rows = {
        row: dict(zip(part["dataset"], part["value"]))
        for row, part in frame.groupby(published.ROW, sort=False)
    }
    twins = {"T2": "T2", "T3": "T1", "S5": "T11", "S6": "T12", "S7": "T13", "S8": "T16",
             "S9": "T17"}  # fmt: skip
    marked = published.origins()
    for row, cells in rows.items():
        paper, table, *rest = row
        if paper == "rlrr" and table in twins:
            same = rows.get(("alore", twins[table], *rest)) == cells
            assert same == marked.get(row, {}).get("borrowed", "").startswith("cell by cell"), row
        if rest[3] in ("alore", "alore_attn") or (paper, rest[3]) == ("rlrr", "rlrr"):
            assert "borrowed" not in marked.get(row, {}), row
    assert {why for row in marked for why in marked[row]} == {"peek", "borrowed"}


def test_a_rule_about_no_row_is_refused(copy):
    spoil(copy, "origins.csv", "arc_attn", "arc_attention", renew=False)
    with pytest.raises(ValueError, match=r"origins\.csv, line \d+: .*no arc_attention"):
        published.origins()


def test_both_means_where_a_paper_prints_one():
    line = next(line for line in table("rlrr/table2").lines if line.key["method"] == "rlrr")
    assert line.entries["mean_all"].text == "74.5" and not line.entries["mean_all"].computed
    groups = [
        sum(line.entries[task].value for task in published.tasks()[group]) / count
        for group, count in (("natural", 7), ("specialized", 4), ("structured", 8))
    ]
    mean = line.entries["mean_group"]
    assert mean.computed and mean.text == f"{sum(groups) / 3:.2f}" and mean.text[:4] == "76.7"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("rlrr/table22", r"nearest: .*rlrr/table2"), ("rlr/table2", "nearest: rlrr/table2")],
)
def test_an_unknown_table_names_its_neighbours(name, reason):
    with pytest.raises(ValueError, match=reason):
        papers.find(name)
    assert papers.find("RLRR/T2") == papers.find("rlrr/2") == ["rlrr/table2"]
    assert papers.find("rlrr/table4") == ["rlrr/table4a", "rlrr/table4b"]
