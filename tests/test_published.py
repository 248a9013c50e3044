"""The papers' numbers: whole, and off exactly where the errata say."""

import hashlib
import shutil

import pandas as pd
import pytest

from scripts import published

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
    for cached in (published.read, published.numbers, published.tasks, published.errata):
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
    assert len(published.errata()) == 28
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
