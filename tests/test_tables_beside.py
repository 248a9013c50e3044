"""Our figures beside the published ones, row by row."""

import csv

import pytest
from test_tables import record

from peft import record as records
from scripts import papers, points, published, render, tabulate


def vtab(method="linear", seeds=(42, 44), lost=(), **changes) -> list[dict]:
    """Runs of a row of RLRR's Table 2: what its paper prints, and a point more for every seed."""
    row = published.numbers("rlrr")
    row = row[(row["table"] == "T2") & (row["method"] == method)]
    top1 = dict(zip(row["dataset"], row["number"]))
    found = []
    for group in ("natural", "specialized", "structured"):
        for task in published.tasks()[group]:
            for s, seed in enumerate(seeds if task not in lost else ()):
                one = record(
                    method, task, seed, top1[task] + s, group, suite="vtab",
                    backbone="vit_b16_in21k", protocol="vtab_honest",
                    config__backbone={"name": "vit_b16_in21k"},
                    config__dataset={"name": task, "suite": "vtab", "title": task},
                )  # fmt: skip
                found.append(one | changes)
    return found


def line_of(table, method, source):
    return next(
        line
        for line in table.lines
        if (line.key["method"], line.source) == (method, source)
        and line.key.get("pretraining", "in21k") == "in21k"
    )


def test_ours_stand_beside_the_published():
    table = papers.published_table("rlrr/table2", vtab("linear") + vtab("ssf"))
    theirs, ours, delta = (line_of(table, "linear", s) for s in ("published", "ours", "delta"))
    assert theirs.entries["dtd"].text == "63.2" and ours.entries["dtd"].text == "63.7 ± 0.7"
    assert delta.entries["dtd"].text == "+0.5" and delta.entries["mean_all"].text == "+0.5"
    mean = theirs.entries["mean_group"].value + 0.5
    assert ours.entries["mean_group"].text.startswith(f"{mean:.2f}")
    assert ours.entries["tuned"].text == "0.000" and len(ours.entries["mean_all"].runs) == 38
    missing = [row.label for row in table.missing]
    assert not any(row.startswith("linear") for row in missing)
    assert any(row.startswith("ssf") for row in missing)  # theirs is another backbone
    shown = {run["method"] for x in table.lines for e in x.entries.values() for run in e.runs}
    assert shown == {"linear"}


def test_a_row_that_is_not_whole_has_no_mean_and_says_what_it_lacks():
    table = papers.published_table("rlrr/table2", vtab("linear", lost=("svhn", "dmlab")))
    ours = line_of(table, "linear", "ours")
    assert ours.entries["svhn"].text == ours.entries["mean_natural"].text == tabulate.DASH
    assert ours.entries["mean_specialized"].text != tabulate.DASH
    (row,) = (row for row in table.missing if row.label.startswith("linear"))
    assert row.what == "2 of 19 tasks (svhn, dmlab)"
    assert row.command == "python sweep.py experiment=rlrr/table2 'rows=[2]'"


def test_a_table_of_means_is_filled_from_whole_groups():
    row = vtab("full", backbone="vit_l16_in21k")
    table = papers.published_table("rlrr/table4a", row)
    assert line_of(table, "full", "ours").entries["mean_natural"].text != tabulate.DASH
    table = papers.published_table("rlrr/table4a", row[2:])
    assert line_of(table, "full", "ours").entries["mean_natural"].text == tabulate.DASH


def alore(method: dict, variant: str, top1: float) -> dict:
    """A run of an ALoRE on DTD."""
    config = {"name": "alore", "rank": 4, "experts": 4, "location": "before_mha+before_ffn"}
    return record(
        "alore", "dtd", 42, top1, suite="vtab", backbone="vit_b16_in21k", variant=variant,
        config__method=config | method, config__backbone={"name": "vit_b16_in21k"},
        config__dataset={"name": "dtd", "suite": "vtab", "title": "DTD"},
    )  # fmt: skip


def ours_on_dtd(name: str, found: list[dict]) -> dict[str, str]:
    lines = [line for line in papers.published_table(name, found).lines if line.source == "ours"]
    shown = {line.key["variant"]: line.entries["dtd"].text for line in lines}
    return {variant: text for variant, text in shown.items() if text != tabulate.DASH}


def test_every_run_stands_in_its_row_of_an_ablation_and_in_no_other():
    default = alore({}, "", 50.0)
    config = records.derived([default], {"experts": "sliced_2"})
    derived = default | {
        "phase": "derived", "config": config, "variant": "experts=sliced_2",
        "key": records.key_of(config), "metrics": {"top1_last": 30.0},
    }  # fmt: skip
    found = [default, derived, alore({"rank": 8}, "rank=8", 60.0), record("alore", "dtd")]
    assert ours_on_dtd("alore/table18", found) == {"rank=4": "50.0", "rank=8": "60.0"}
    assert ours_on_dtd("alore/table19", found) == {"experts=4": "50.0"}
    expected = {"experts_kept=increment_4": "50.0", "experts_kept=sliced_2": "30.0"}
    assert ours_on_dtd("alore/table22", found) == expected
    assert ours_on_dtd("alore/table2", found) == {"": "50.0"}


def cifar(method: dict, task: str, backbone: str, variant: str = "", **changes) -> dict:
    title = task.upper()
    return record(
        method["name"], task, 42, 91.25, None, suite="cifar", backbone=backbone, variant=variant,
        config__method=method, config__backbone={"name": backbone},
        config__dataset={"name": task, "suite": "cifar", "title": title}, **changes,
    )  # fmt: skip


def test_fractions_counts_and_shares():
    dense = {"name": "superlora", "form": "dense"}
    one = cifar(dense, "cifar100", "vit_b16_in21k", "form=dense", tuned_params=14155776)
    table = papers.published_table("superlora/a6", [one])
    ours = next(line for line in table.lines if (line.source, line.row) == ("ours", 4))
    fraction = ours.entries["accuracy_fraction"]
    assert fraction.text == "0.9125" and fraction.value == pytest.approx(0.9125)
    assert ours.entries["num_params"].text == "14155776"

    rank = {"name": "lava", "rank": 3, "strength": 0.0}
    lava = cifar(rank, "cifar10", "alexnet_in1k", "rank=3,strength=0.0", tuned_params=6303,
                 head_params=40970)  # fmt: skip
    full = cifar({"name": "full"}, "cifar10", "alexnet_in1k", tuned_params=57003840,
                 head_params=40970)  # fmt: skip
    for name, key in (("lava/table1", "lava"), ("lava/table5", "alexnet")):
        lines = papers.published_table(name, [lava, full]).lines
        shares = [
            line.entries[key].text
            for line in lines
            if line.source == "ours" and line.entries.get(key) and line.entries[key].runs
        ]
        assert shares[0] == "0.08"  # as the paper has it
    alone = papers.published_table("lava/table1", [lava])  # of what, cannot be said
    shown = {line.entries["lava"].text for line in alone.lines if line.source == "ours"}
    assert shown == {tabulate.DASH}


def test_points_of_an_experiment_without_printed_numbers():
    point = {"name": "rlrr", "ffn": False, "norm": False, "mha": True, "layers": 4}
    one = record(
        "rlrr", "cifar100", 42, 60.0, suite="vtab", backbone="vit_b16_in21k",
        variant="ffn=False,layers=4,norm=False", config__method=point,
        config__backbone={"name": "vit_b16_in21k"},
        config__dataset={"name": "cifar100", "suite": "vtab", "title": "CIFAR-100"},
    )  # fmt: skip
    table = points.table("rlrr/fig2", [one])
    shown = {
        (line.key["variant"], column.title): line.entry(column).text
        for line in table.lines
        for column in table.columns
        if line.entry(column).runs
    }
    assert shown == {("modules=mha", "layers=4"): "60.00"}
    assert [row.what for row in table.missing][:2] == ["5 of 6 points", "6 of 6 points"]
    assert table.missing[1].command == "python sweep.py experiment=rlrr/fig2 'rows=[2]'"
    assert tabulate.find("rlrr/fig2") == ["rlrr/fig2"]


def test_what_is_never_averaged_is_not_averaged_beside_a_paper_either():
    found = vtab("linear") + vtab("linear", seeds=(7,), protocol="other")
    with pytest.raises(ValueError, match="linear on cifar100 differ in protocol"):
        papers.published_table("rlrr/table2", found)


def test_our_peeking_rows_are_marked_and_do_not_compete():
    best = {"top1_last": 80.0, "top1_best": 99.0, "loss_last": 0.5}
    peek = vtab("linear", selection="best_on_test", metrics=best)
    table = papers.published_table("rlrr/table2", peek + vtab("full") + vtab("bitfit"))
    ours = line_of(table, "linear", "ours")
    assert ours.marks == "†" and not ours.entries["dtd"].rank
    assert line_of(table, "full", "ours").entries["dtd"].rank == 1
    assert "| linear‡ | " in render.markdown(table) and "| ours† |" in render.markdown(table)


def test_formats_say_the_same(tmp_path, capsys):
    folder = tmp_path / "runs"
    for one in vtab("linear"):
        run = folder / f"{one['task']}-s{one['seed']}"
        run.mkdir(parents=True)
        records.write(run / "record.json", one)
    table = papers.published_table("rlrr/table2", vtab("linear"))
    rows = list(csv.DictReader(render.long(table).splitlines()))
    wanted = ("linear", "ours", "dtd")
    (one,) = (row for row in rows if (row["method"], row["source"], row["column"]) == wanted)
    assert one["text"] == "63.7 ± 0.7" and one["seeds"] == "42 44" and float(one["value"]) == 63.7
    assert len(one["keys"].split()) == 2
    assert "63.7{\\scriptsize$\\pm$0.7}" in render.latex(table)
    assert "63.7 ± 0.7" in render.html(table) and "<td" in render.page(table)
    for kind, start in (("md", "# "), ("csv", "table,"), ("tex", "% "), ("html", "<!doctype")):
        out = tmp_path / f"t.{kind}"
        tabulate.main(["rlrr/table2", "--records", str(folder), "--out", str(out)])
        assert out.read_text().startswith(start)
    tabulate.main(["rlrr/table4", "--records", str(folder), "--format", "csv"])
    shown = capsys.readouterr().out
    assert "rlrr/table4a,1," in shown and "rlrr/table4b,1," in shown
    with pytest.raises(ValueError, match=r"t\.doc is none of \.md, \.csv"):
        tabulate.main(["rlrr/table2", "--records", str(folder), "--out", str(tmp_path / "t.doc")])
