"""Figures of records: what they show, and what they refuse."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from test_tables import record

from peft import record as records
from scripts import compare, figures, papers, plot, published, ranks

LR, WD = (1e-3, 1e-2), (0.0, 1e-4)


def tuned(task="digits", method="rlrr", **changes) -> list[dict]:
    """A grid of four points, the last of which is best, and the final run that took it."""
    grid = [
        record(
            method,
            task,
            phase="grid",
            config__phase="grid",
            config__optim__lr=lr,
            config__optim__weight_decay=wd,
            metrics={"top1_val": 50.0 + 1000 * lr + 10000 * wd, "loss_last": 1.0},
            **changes,
        )
        for lr in LR
        for wd in WD
    ]
    last = {"config__optim__lr": LR[1], "config__optim__weight_decay": WD[1]}
    keys = [r["key"] for r in grid]
    return [*grid, record(method, task, selected_from=keys, **last, **changes)]


def test_heat_map_has_every_point_and_the_choice():
    ((panel,),), *_ = plot._maps([*tuned(), record("lora")])
    assert panel.xs == list(LR) and panel.ys == list(WD) and panel.title == "Digits"
    assert panel.scores == {(wd, lr): 50 + 1000 * lr + 10000 * wd for lr in LR for wd in WD}
    assert panel.chosen == {(WD[1], LR[1])}


def test_heat_map_before_the_choice_and_with_a_diverged_point():
    *grid, _ = tuned()
    ((panel,),), *_ = plot._maps(grid[1:])
    assert panel.chosen == set() and (WD[0], LR[0]) not in panel.scores


def test_heat_map_shows_the_best_of_what_it_folds():
    found = tuned()
    other = found[0] | {"key": "other", "metrics": {"top1_val": 99.0}, "variant": "dropout=0.1"}
    found[-1]["selected_from"].append("other")
    ((panel,),), *_, note = plot._maps([*found, other])
    assert panel.scores[WD[0], LR[0]] == 99.0 and "the best over" in note


def test_heat_maps_of_several_methods_stand_in_lines():
    found = [r for m in ("ssf", "rlrr") for t in ("digits", "textures") for r in tuned(t, m)]
    groups, *_ = plot._maps(found)
    assert [[panel.title for panel in group] for group in groups] == [
        ["Digits\nrlrr", "Textures\nrlrr"],
        ["Digits\nssf", "Textures\nssf"],
    ]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_same_records_same_bytes(tmp_path, kind):
    files = [tmp_path / f"{name}.{kind}" for name in "ab"]
    plot.heat_map(tuned(), files[0])
    plot.heat_map(tuned()[::-1], files[1])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_no_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no grid run"):
        plot.heat_map([record()], tmp_path / "map.png")


SCORES = {"linear": 40.0, "ssf": 60.0, "lora": 61.0, "rlrr": 65.0}
TASKS = ("digits", "textures", "location", "orientation")


def runs(scores=SCORES, tasks=TASKS, seeds=(42, 44), **changes) -> list[dict]:
    return [
        record(m, t, s, top + 5 * i + (s - 43) / 2, seconds=60.0 * len(m), **changes)
        for m, top in scores.items()
        for i, t in enumerate(tasks)
        for s in seeds
    ]


def drawn(monkeypatch, name: str, make, *arguments):
    """What a function of `figures` or `ranks` is given."""
    module = ranks if name == "critical_difference" else figures
    seen = []
    monkeypatch.setattr(module, name, lambda *given: seen.append(given))
    make(*arguments)
    return seen[0]


def test_front_is_what_nothing_beats():
    points = [
        figures.Point(name, x, y)
        for name, x, y in [("a", 1, 50), ("b", 1, 55), ("c", 2, 54), ("d", 3, 60), ("e", 9, 60)]
    ]
    assert [p.label for p in figures.front(points[::-1])] == ["b", "d"]


@pytest.mark.parametrize(("kind", "x"), [("params", 4e-5), ("memory", 2**-20), ("time", 4.0)])
def test_costs_are_means_over_tasks_and_seeds(monkeypatch, kind, x):
    (panels, *_) = drawn(monkeypatch, "pareto", compare.cost, runs(), kind)
    ((title, points),) = panels.items()
    rlrr = next(p for p in points if p.label == "rlrr")
    assert rlrr.x == pytest.approx(x) and rlrr.y == pytest.approx(65 + 7.5)
    assert rlrr.std == pytest.approx(math.sqrt(4 * 0.5) / 4) and rlrr.kind == "ours"
    assert "mini, tiny_vit" in title and "mean of 4 tasks" in title


def test_incomplete_rows_are_left_out_and_named(monkeypatch):
    found = [r for r in runs() if (r["method"], r["task"]) != ("ssf", "digits")]
    panels, _, _, note = drawn(monkeypatch, "pareto", compare.cost, found, "params")
    assert {p.label for p in next(iter(panels.values()))} == {"linear", "lora", "rlrr"}
    assert "ssf" in note


def test_devices_are_not_compared_by_time(monkeypatch):
    found = [*runs(), *runs({"vpt": 70.0}, device="cuda")]
    assert len(drawn(monkeypatch, "pareto", compare.cost, found, "time")[0]) == 2
    assert len(drawn(monkeypatch, "pareto", compare.cost, found, "params")[0]) == 1


def test_peeking_rows_are_no_part_of_ranks(monkeypatch):
    metrics = {"top1_last": 80.0, "top1_best": 99.0, "loss_last": 0.5}
    peek = {"selection": "best_on_test", "protocol": "vtab_peek", "metrics": metrics}
    found = [*runs(), *(record("vpt", t, s, **peek) for t in TASKS for s in (42, 44))]
    ((panel,),) = drawn(monkeypatch, "critical_difference", compare.ranking, found)
    assert list(panel.ranks) == ["rlrr", "lora", "ssf", "linear"] and "†" in panel.note
    points = next(iter(drawn(monkeypatch, "pareto", compare.cost, found, "params")[0].values()))
    assert [p.kind for p in points if p.label == "vpt†"] == ["peeks"]


def test_ranks_agree_with_scipy():
    draw = np.random.default_rng(0)
    table = {name: draw.normal(i, 1, 19) for i, name in enumerate("abcd")}
    panel = ranks.rank("", table)
    pairs = list(itertools.combinations(table, 2))
    raw = [stats.wilcoxon(table[a], table[b]).pvalue for a, b in pairs]
    order = sorted(raw)
    for (a, b), p in zip(pairs, raw):
        step = order.index(p)
        holm = min(1.0, max(q * (6 - i) for i, q in enumerate(order[: step + 1])))
        got = panel.adjusted.get((a, b)) or panel.adjusted[b, a]
        assert got == pytest.approx(holm)
    assert list(panel.ranks) == list("dcba") and sum(panel.ranks.values()) == pytest.approx(10)


def test_signed_ranks_with_ties_are_exact():
    differences = np.array([1, 1, -2, 3, 0, 3, 1.5, -1, 4])
    nonzero = differences[differences != 0]
    sums = stats.rankdata(abs(nonzero))
    signs = np.array(list(itertools.product((-1, 1), repeat=len(nonzero)))) @ sums
    observed = abs(np.sign(nonzero) @ sums)
    assert ranks.signed_ranks(differences) == pytest.approx((abs(signs) >= observed).mean())
    assert ranks.signed_ranks(np.zeros(5)) == 1.0


def test_no_pair_is_told_apart_where_friedman_sees_nothing():
    table = {"a": [1, 2, 3, 4], "b": [2, 1, 4, 3], "c": [1.5, 1.6, 3.4, 3.6]}
    panel = ranks.rank("", table)
    assert panel.adjusted == {} and panel.alike == [(0, 2)] and "independent" in panel.note
    with pytest.raises(ValueError, match="there are 2 methods and 1 such"):
        ranks.rank("", {"a": [1], "b": [2]})


def ablated(method="alore", key="rank", values=(4, 1, 16), **others) -> list[dict]:
    return [
        record(
            method,
            task,
            top1=50.0 + i,
            variant=f"{key}={value}",
            config__method={"name": method, key: value} | others,
        )
        for i, value in enumerate(values)
        for task in TASKS[:2]
    ]


def test_ablation_has_a_line_for_what_varies_alone(monkeypatch):
    found = [*ablated(experts=4), *ablated(key="experts", values=(1, 2), rank=4), *runs()]
    (panels, *_) = drawn(monkeypatch, "curves", compare.ablation, found)
    by = {key: lines for (_, key), lines in panels.items()}
    assert by["rank"][0].values == {"1": (51.0, None), "4": (50.0, None), "16": (52.0, None)}
    assert list(by["experts"][0].values) == ["1", "2", "4"] and len(by) == 2
    (panels, *_) = drawn(monkeypatch, "curves", compare.ablation, found, "rank")
    assert len(panels) == 1
    with pytest.raises(ValueError, match="what varies is: experts, rank"):
        compare.ablation(found, "groups")


def test_ablation_calls_where_alore_sits_location(monkeypatch):
    places = [(["qkv"], "sequential_before"), (["proj", "fc2"], "sequential_after")]
    found = [
        record(
            "alore",
            variant=f"sites={sites}",
            config__method={"name": "alore", "sites": sites, "position": position},
        )
        for sites, position in places
    ]
    (panels, *_) = drawn(monkeypatch, "curves", compare.ablation, found)
    ((_, key),) = panels
    assert key == "location"
    assert set(next(iter(panels.values()))[0].values) == {"before MHA", "after MHA +\nafter FFN"}


@pytest.fixture
def folder(tmp_path):
    for r in [*runs(), *ablated(), *tuned(method="bitfit")]:
        path = tmp_path / "runs" / f"{r['key'][:12]}"
        path.mkdir(parents=True)
        records.write(path / "record.json", r)
    return tmp_path / "runs"


@pytest.mark.parametrize("kind", sorted({*plot.DRAW} - {"published"}))
def test_every_kind_is_drawn_twice_alike(folder, kind, capsys):
    plot.main([kind, str(folder)])
    files = [folder / f"{kind}.png", folder / f"{kind}.svg"]
    first = [path.read_bytes() for path in files]
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1]
    plot.main([kind, str(folder)])
    assert [path.read_bytes() for path in files] == first
    assert capsys.readouterr().out.count("written: ") == 4


def vtab(**changes) -> list[dict]:
    """BitFit on all tasks of VTAB-1k, a point below what RLRR's Table 2 prints."""
    table = compare.printed("rlrr/table2")
    cells = table.rows["bitfit", "", "vit_b16_in21k"]
    changes = {"suite": "vtab", "backbone": "vit_b16_in21k"} | changes
    return [
        record("bitfit", task, top1=cells[task] - 1, group=group, **changes)
        for group in ("natural", "specialized", "structured")
        for task in published.tasks()[group]
    ]


def test_published_rows_and_their_means_are_those_of_the_csv():
    table = compare.printed("rlrr/T2")
    assert table.rows["rlrr", "", "vit_b16_in21k"]["mean_all"] == 74.5 and len(table.tasks) == 19
    assert table.score(("rlrr", "", "vit_b16_in21k")) == (74.5, "mean over tasks")
    assert table.label(("ssf", "", "vit_b16_augreg_in21k")) == "ssf (augreg_in21k)"
    assert compare.printed("lava/table5").label(("full", "", "vgg11"), "vgg11") == "full"
    with pytest.raises(ValueError, match=r"no table 'rlrr/table9'.* nearest: "):
        compare.printed("rlrr/table9")


def test_ours_beside_the_published(monkeypatch):
    table = papers.published_table("rlrr/table2", vtab())
    rows, panels, note = drawn(monkeypatch, "beside", compare.beside, table)
    pairs = dict(zip(rows, panels["Mean of 19 tasks"]))
    pair = pairs["bitfit, vit_b16_in21k"]
    assert pair.ours[0] == pytest.approx(62.1 - 1, abs=0.1) and pair.published == 62.1
    assert pairs["rlrr, vit_b16_in21k"].ours is None and "yet" not in note
    table = papers.published_table("rlrr/table2")
    *_, note = drawn(monkeypatch, "beside", compare.beside, table)
    assert "No run of ours" in note


def test_a_mean_beside_a_published_one_is_over_the_same_tasks(monkeypatch):
    table = compare.printed("rlrr/table2")
    panels, *_ = drawn(monkeypatch, "pareto", compare.cost, vtab(), "params", table)
    points = panels["vtab, vit_b16_in21k\nmean of 19 tasks"]
    assert {p.kind for p in points if p.label == "bitfit"} == {"ours", "published"}
    panels, *_ = drawn(monkeypatch, "pareto", compare.cost, vtab()[1:], "params", table)
    assert {p.kind for points in panels.values() for p in points} == {"published"}


def test_published_ablation_and_ranks(monkeypatch):
    table = compare.printed("alore/table18")
    (panels, *_) = drawn(monkeypatch, "curves", compare.ablation, [], None, table)
    (((_, key), (line,)),) = panels.items()
    assert (
        key == "rank" and line.published and list(line.values) == ["1", "2", "4", "8", "16", "32"]
    )
    assert line.values["16"] == (74.86, None)  # as printed, although its cells say 75.39
    table = compare.printed("alore/table2")
    ((panel,),) = drawn(monkeypatch, "critical_difference", compare.ranking, [], table)
    assert next(iter(panel.ranks)) == "alore" and len(panel.ranks) == 17
    assert panel.note.startswith("19 tasks")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["seeds", "--published", "rlrr/table2"], "print nothing for seeds"),
        (["published"], "Which table"),
        (["params", "--published", "lava/table5"], "prints no numbers of parameters"),
        (["params", "--over", "rank"], "goes with ablation"),
        (["params", "--protocol", "vtab_peek"], "there is mini"),
        (["params", "--out", "figure.jpg"], "neither"),
    ],
)
def test_bad_arguments_are_named(folder, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        plot.main([arguments[0], str(folder), *arguments[1:]])


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no record"):
        plot.main(["params", str(tmp_path)])
    out = tmp_path / "a.svg"
    plot.main(["published", str(tmp_path), "--published", "rlrr/table6", "--out", str(out)])
    assert b"<svg" in out.read_bytes()
