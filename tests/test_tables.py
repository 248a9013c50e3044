"""Tables and plots of records: what they show, and what they refuse."""

import copy
import json
import math
import statistics
import subprocess
import sys

import pytest

from peft import record as records
from scripts import papers, points, tabulate
from scripts.plot import accuracy_plot


def record(method="rlrr", task="digits", seed=42, top1=70.0, group="natural", **changes) -> dict:
    """A whole final record; `changes` are paths with __ for the dot."""
    config = {
        "phase": "final",
        "seed": seed,
        "data_seed": 0,
        "image_size": 56,
        "precision": "fp32",
        "weights": None,
        "preset": {"name": "mini"},
        "backbone": {"name": "tiny_vit"},
        "optim": {"epochs": 4, "lr": 1e-3},
        "method": {"name": method},
        "dataset": {"name": task, "suite": "mini", "title": task.capitalize(), "num_classes": 10},
        "protocol": {"name": "mini", "selection": "last"},
    }
    made = {
        "phase": "final",
        "config": config,
        "suite": "mini",
        "task": task,
        "group": group,
        "backbone": "tiny_vit",
        "method": method,
        "variant": "",
        "seed": seed,
        "protocol": "mini",
        "selection": "last",
        "trained_on": "train800val200",
        "selected_from": [],
        "metrics": {"top1_last": top1, "loss_last": 0.5},
        "tuned_params": 10 * len(method),
        "head_params": 110,
        "seconds": 1.0,
        "images_per_second": 9.0,
        "peak_memory_bytes": 1,
        "device": "cpu",
        "provenance": {
            "git_commit": None,
            "git_dirty": None,
            "versions": {},
            "weights": "vit.npz",
            "weights_sha256": "a",
            "data_sha256": {"test": "b"},
            "source": "raw",
            "pixels": "native",
            "kernel": "bicubic",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "precision": "fp32",
        },
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = made
        for part in parents:
            node = node[part]
        node[leaf] = value
    return made | {"key": records.key_of(config)}


def suite(seeds=(42, 44, 82)) -> list[dict]:
    tasks = {"digits": "natural", "textures": "natural", "location": "structured"}
    return [
        record(method, task, seed, 40 + 7 * m + 3 * t + s * s, group)
        for m, method in enumerate(("linear", "rlrr", "ssf"))
        for t, (task, group) in enumerate(tasks.items())
        for s, seed in enumerate(seeds)
    ]


def shown(found) -> dict[str, dict[str, str]]:
    """Method -> title of a column -> what stands there."""
    table = tabulate.table(found)
    return {
        line.entries["method"].text: {c.title: line.entry(c).text for c in table.columns}
        for line in table.lines
    }


def markdown(found) -> str:
    return tabulate.markdown(tabulate.table(found))


def test_every_cell_is_the_mean_and_deviation_over_seeds():
    frame = shown(suite())
    assert list(frame) == ["ssf", "rlrr", "linear"]  # by tuned parameters
    for m, method in enumerate(("linear", "rlrr", "ssf")):
        for t, task in enumerate(("Digits", "Textures", "Location")):
            values = [40 + 7 * m + 3 * t + s * s for s in range(3)]
            expected = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
            assert frame[method][task] == expected
    assert frame["rlrr"]["Tuned (M)"] == "0.000" and frame["rlrr"]["Seeds"] == "3"


def test_both_means():
    frame = shown(suite())
    digits, textures, location = (47 + 3 * t + 5 / 3 for t in range(3))
    std = statistics.stdev([0, 1, 4])
    row = frame["rlrr"]
    natural = (digits + textures) / 2
    assert row["Mean natural"] == f"{natural:.2f} ± {std / math.sqrt(2):.2f}"
    assert row["Mean of 3 tasks"].startswith(f"{(digits + textures + location) / 3:.2f} ± ")
    of_groups = math.sqrt((std**2 / 2 + std**2) / 4)
    assert row["Mean of 2 groups"] == f"{(natural + location) / 2:.2f} ± {of_groups:.2f}"


def test_one_seed_has_no_deviation_and_a_missing_cell_no_mean():
    found = [r for r in suite(seeds=(42,)) if (r["method"], r["task"]) != ("ssf", "digits")]
    frame = shown(found)
    assert frame["rlrr"]["Digits"] == "47.0"
    row = frame["ssf"]
    assert row["Digits"] == row["Mean natural"] == row["Mean of 3 tasks"] == tabulate.DASH
    assert row["Mean structured"] == "60.00"


def test_order_of_records_does_not_matter():
    found = suite()
    assert markdown(found) == markdown(found[::-1])


def test_rates_at_an_end_of_those_tried_are_counted():
    """Three cells that chose 1e-3: the largest, the middle and the smallest of three rates."""
    found = []
    for task, others in {"digits": [1e-4, 3e-4], "dtd": [1e-4, 1e-2], "pets": [1e-2, 1e-1]}.items():
        tried = []
        for lr in (*others, 1e-3):
            made = record("lora", task, phase="grid", config__phase="grid", config__optim__lr=lr)
            tried.append(made | {"metrics": {"top1_val": 50.0, "loss_last": 0.1}})
        found += [*tried, record("lora", task, selected_from=[r["key"] for r in tried])]
    said = "The chosen learning rate is the largest tried in 1 of 3 cells, the smallest in 1"
    assert said in markdown(found)
    assert "largest tried" not in markdown(found[4:8])  # the middle one alone


def test_grid_runs_are_not_shown():
    grid = record(
        "lora", metrics={"top1_val": 99.0, "loss_last": 0.1}, phase="grid", config__phase="grid"
    )
    assert "99.0" not in markdown([*suite(), grid])
    with pytest.raises(ValueError, match="no final run"):
        tabulate.table([grid])


def test_peeking_rows_are_marked_and_do_not_compete():
    peek = {"top1_last": 80.0, "top1_best": 90.0, "loss_last": 0.5}
    marked = record("peeking", selection="best_on_test", protocol="vtab_peek", metrics=peek)
    text = markdown([*suite(), marked])
    (line,) = (line for line in text.splitlines() if "peeking†" in line)
    assert "| 90.0 |" in line and "best epoch on the test set" in text
    assert "**" not in line  # not best although highest
    alone = markdown([marked, marked | {"method": "b", "key": "0"}])
    assert "**90.0**" in alone  # among its likes it may be


def test_where_chooses_among_runs_of_unlike_settings():
    found = [record(), record(seed=44, config__optim__lr=1e-2)]
    (left,) = tabulate.under(found, None, ["optim.lr=1e-2"])
    assert left["seed"] == 44 and len(tabulate.under(found, None, ["image_size=56"])) == 2
    with pytest.raises(ValueError, match=r"No run has optim.lr=7; there is 0.001, 0.01\."):
        tabulate.under(found, None, ["optim.lr=7"])
    with pytest.raises(ValueError, match=r"--where optim\.lr has no value"):
        tabulate.under(found, None, ["optim.lr"])


def test_a_run_of_steps_has_no_epochs():
    line, note = "| 40 steps |", ", 40 steps, seeds"
    assert line in (text := markdown([record(config__optim__steps=40)])) and note in text
    assert ", 1 epoch, seeds" in markdown([record(config__optim__epochs=1)])


def test_tasks_whose_split_is_our_own_are_named():
    assert "Own split" not in markdown(suite())
    ours = record("lora", "caltech101", provenance__source="raw-own")
    text = markdown([record("lora", "dtd"), ours])
    assert "Own split, where the published one cannot be rebuilt: caltech101." in text


def test_best_and_second_are_marked():
    text = markdown(suite())
    assert "**55.7 ± 2.1**" in text and "<u>48.7 ± 2.1</u>" in text and "**41.7" not in text


def test_suites_are_not_averaged_together():
    others = [record(task=t, suite="vtab", group="natural") for t in ("dtd", "svhn")]
    for other in others:
        other["config"]["dataset"]["suite"] = "vtab"
        other["key"] = records.key_of(other["config"])
    titles = [c.title for c in tabulate.table([*suite((42,)), *others]).columns]
    assert "Mean of 3 mini tasks" in titles and "Mean of 2 vtab tasks" in titles
    assert not any("5" in name for name in titles if name.startswith("Mean"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": "vtab_honest"}, "differ in protocol: mini .+ vtab_honest .+ --protocol"),
        (
            {"config__optim__epochs": 100},
            "differ in optim.epochs: 4 .+ 100 .+ --where optim.epochs=4",
        ),
        ({"config__optim__lr": 1e-2}, "differ in optim.lr: 0.001 .+ --where optim.lr=0.001"),
        ({"config__data_seed": 7}, "differ in data_seed"),
        ({"config__method__alpha": 7}, "differ in method.alpha"),
        ({"provenance__weights_sha256": "c"}, "differ in provenance.weights_sha256"),
        ({"provenance__pixels": "jpeg75"}, "differ in provenance.pixels: native .+ jpeg75"),
        ({"seed": 42, "config__optim__lr": 1e-2}, "differ in optim.lr: 0.001 .+ 0.01"),
    ],
)
def test_what_is_never_averaged(changes, reason):
    odd = record(**({"seed": 44} | changes))
    with pytest.raises(ValueError, match=reason):
        tabulate.table([record(), odd])


def test_an_untrained_backbone_differs_with_the_seed():
    runs = [
        record(seed=s, provenance__weights="random", provenance__weights_sha256=str(s))
        for s in (1, 2)
    ]
    assert shown(runs)["rlrr"]["Seeds"] == "2"


def test_what_is_derived_has_a_row_of_its_own_and_is_no_peek():
    best = {"top1_last": 70.0, "top1_best": 75.0, "loss_last": 0.5}
    of = record(selection="best_on_test", protocol="vtab_peek", metrics=best)
    config = records.derived([of], {"experts": "single_1"})
    made = of | {"phase": "derived", "config": config, "variant": "experts=single_1"}
    made |= {"key": records.key_of(config), "metrics": {"top1_last": 50.0}}
    found = shown([of, made])
    assert (
        found["rlrr"]["Digits"] == "75.0" and found["rlrr (experts=single_1)"]["Digits"] == "50.0"
    )
    text = markdown([of, made])
    assert "| rlrr† |" in text and "| rlrr (experts=single_1) |" in text
    tuned = record(phase="grid", config__phase="grid", metrics={"top1_val": 99.0})
    config = records.derived([tuned], {"experts": "single_1"})
    never = made | {"key": records.key_of(config), "config": config, "metrics": {"top1_val": 99.0}}
    assert "99.0" not in markdown([of, made, never])


def test_the_same_run_twice():
    with pytest.raises(ValueError, match="are the same run"):
        tabulate.table([record(), copy.deepcopy(record())])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metrics": {"top1_last": math.nan, "loss_last": 1.0}}, "top1_last=nan"),
        ({"metrics": {"top1_last": 101.0, "loss_last": 1.0}}, "top1_last=101"),
        ({"metrics": {"top1_last": "70", "loss_last": 1.0}}, "top1_last=70"),
        ({"metrics": {"loss_last": 1.0}}, "without top1_last"),
        ({"selection": "best_on_test"}, "without top1_best"),
        ({"tuned_params": math.nan}, "tuned_params=nan"),
        ({"head_params": 1.5}, "head_params=1.5"),
    ],
)
def test_impossible_figures(changes, reason):
    with pytest.raises(ValueError, match=reason):
        tabulate.table([record(**changes)])


def test_missing_field_is_named():
    broken = record()
    del broken["tuned_params"]
    with pytest.raises(ValueError, match="lacks tuned_params"):
        tabulate.table([broken])


@pytest.fixture
def folder(tmp_path):
    for r in suite():
        run = tmp_path / "runs" / r["task"] / f"{r['method']}-s{r['seed']}"
        run.mkdir(parents=True)
        records.write(run / "record.json", r)
    return tmp_path / "runs"


def test_command_writes_table_and_plots(folder, capsys):
    out, png, svg = (folder / "tables" / name for name in ("t.md", "t.png", "t.svg"))
    tabulate.main([str(folder), "--out", str(out), "--plot", str(png)])
    assert out.read_text().strip() in capsys.readouterr().out
    first = png.read_bytes()
    tabulate.main([str(folder), "--out", str(out), "--plot", str(svg)])
    accuracy_plot(tabulate.collect(folder), png)
    assert png.read_bytes() == first, "the same records draw the same bytes"
    assert "<svg" in svg.read_text() and sorted(p.name for p in out.parent.iterdir()) == [
        "t.md", "t.png", "t.svg",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"neither \.png nor \.svg"):
        accuracy_plot(tabulate.collect(folder), folder / "t.jpg")


@pytest.mark.parametrize(
    "damage", ["cut", "nan", "null", "list", "config", "inner", "key", "field"]
)
def test_bad_file_is_named(folder, damage):
    path = folder / "digits" / "rlrr-s44" / "record.json"
    text = path.read_text()
    broken = json.loads(text)
    if damage == "cut":
        text = text[:100]
    elif damage == "nan":
        text = text.replace('"loss_last": 0.5', '"loss_last": NaN')
    elif damage == "null":
        text = text.replace('"loss_last": 0.5', '"loss_last": null')
    elif damage == "list":
        text = "[]"
    elif damage == "config":
        del broken["config"]["dataset"]
        text = json.dumps(broken)
    elif damage == "inner":
        del broken["provenance"]["pixels"]
        text = json.dumps(broken)
    elif damage == "key":
        broken["config"]["optim"]["lr"] = 1
        text = json.dumps(broken)
    else:
        del broken["seconds"]
        text = json.dumps(broken)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"digits/rlrr-s44/record\.json"):
        tabulate.main([str(folder)])


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """results/records and results/tables of another place, and two tables of the papers."""
    monkeypatch.setattr(papers, "names", lambda: ["rlrr/table2", "lava/table5"])
    monkeypatch.setattr(points, "names", lambda: ["rlrr/fig2"])
    monkeypatch.setattr(tabulate, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(tabulate, "TABLES", tmp_path / "tables")
    return tmp_path / "records"


def files(folder) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_kept_records_are_what_all_tables_are_made_from(folder, kept, capsys):
    tabulate.main(["--keep", str(folder)])
    tabulate.main(["--keep", str(folder / "digits")])  # those are there already
    assert len(files(kept)) == len(suite())
    assert {*files(kept).values()} == {*files(folder).values()}
    (folder / "digits" / "rlrr-s42" / "adapter.safetensors").write_bytes(b"weights")
    tabulate.main(["--keep", str(folder / "digits" / "rlrr-s42")])
    assert {name.rpartition("/")[2] for name in files(kept)} == {"record.json"}
    tabulate.main(["all"])
    first = files(kept.parent / "tables")
    assert f"from {len(suite())} records" in capsys.readouterr().out
    assert "**55.7 ± 2.1**" in first["mini.md"].decode() and "rlrr/table2.tex" in first
    stamps = [path.stat().st_mtime_ns for path in (kept.parent / "tables").rglob("*.*")]
    tabulate.main(["all"])
    assert files(kept.parent / "tables") == first
    assert stamps == [path.stat().st_mtime_ns for path in (kept.parent / "tables").rglob("*.*")]


def test_all_tables_without_any_record(kept, capsys):
    tabulate.main(["all"])
    assert "from 0 records" in capsys.readouterr().out
    assert "There is no final run here yet" in files(kept.parent / "tables")["mini.md"].decode()


def test_nothing_is_kept_that_cannot_stand_beside_the_others(folder, kept):
    tabulate.main(["--keep", str(folder)])
    before = files(kept)
    good, other = record("lora", "digits"), record(seed=7, protocol="vtab_peek")
    other["metrics"]["top1_best"], other["selection"] = 99.0, "best_on_test"
    for name, one in (("good", good), ("other", other)):
        (folder.parent / "new" / name).mkdir(parents=True)
        records.write(folder.parent / "new" / name / "record.json", one)
    with pytest.raises(ValueError, match=r"differ in protocol: .+new/other/record\.json"):
        tabulate.main(["--keep", str(folder.parent / "new")])
    assert files(kept) == before
    path = folder / "digits" / "rlrr-s42" / "record.json"
    records.write(path, records.read(path) | {"selected_from": ["0" * 64]})
    tabulate.main(["--keep", str(path)])  # but a grid may have been widened
    changed = [name for name, content in files(kept).items() if content != before[name]]
    assert len(changed) == 1 and records.read(kept / changed[0])["selected_from"] == ["0" * 64]
    before = files(kept)
    for name, top1 in (("one", 50.0), ("two", 51.0)):  # measured twice, and neither is kept yet
        twice = record(seed=9)
        twice["metrics"]["top1_last"] = top1
        (folder.parent / "twice" / name).mkdir(parents=True)
        records.write(folder.parent / "twice" / name / "record.json", twice)
    with pytest.raises(ValueError, match=r"two/record\.json and .+one/record\.json are"):
        tabulate.main(["--keep", str(folder.parent / "twice")])
    path.write_text(path.read_text().replace('"top1_last": 47', '"top1_last": 48'))
    with pytest.raises(ValueError, match="the same run with other results"):
        tabulate.main(["--keep", str(path)])
    assert files(kept) == before


def test_tables_need_no_torch():
    code = "import sys, scripts.tabulate, scripts.diff; print({'torch', 'timm'} & {*sys.modules})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_empty_folder_and_unknown_protocol(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no record\.json below .+make demo"):
        tabulate.main([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="'vtab_peek'; there is mini"):
        tabulate.main([str(folder), "--protocol", "vtab_peek"])
