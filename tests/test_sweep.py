"""A whole sweep on made-up images: tuned on validation, tested once, never repeated."""

import json

import pytest
import timm

import sweep
import train
from peft import record as records
from peft.config import compose

CHOICE = [
    "sweep.backbone=[tiny_vit]",
    "sweep.dataset=[fake]",
    "sweep.method=[linear,lora]",
    "sweep.seeds=[1,2]",
    "sweep.per_method={}",
    'sweep.overrides=["image_size=32","optim.epochs=1","optim.batch_size=16"]',
    "device=cpu",
    "workers=0",
    "engine=here",
]


def config(tmp_path, *overrides):
    return compose(
        "sweep", [*CHOICE, f"runs_dir={tmp_path}/runs", f"data_root={tmp_path}/data", *overrides]
    )


def all_records(tmp_path) -> list[dict]:
    return [records.read(path) for path in tmp_path.glob("runs/fake/fake/*/record.json")]


def test_grid_choice_finals_and_table(tmp_path, capsys):
    cfg = config(tmp_path, "sweep.grid={optim.lr:[1e-4,1e-2],optim.weight_decay:[1e-4]}")
    sweep.run(cfg)
    found = all_records(tmp_path)
    grid, finals = ([r for r in found if r["phase"] == phase] for phase in ("grid", "final"))
    assert len(grid) == 2 * 2 and len(finals) == 2 * 2
    assert all("top1_last" not in r["metrics"] for r in grid), "a grid run was tested"
    for method in ("linear", "lora"):
        points = [r for r in grid if r["method"] == method]
        best = max(points, key=lambda r: (r["metrics"]["top1_val"], -r["config"]["optim"]["lr"]))
        for final in (r for r in finals if r["method"] == method):
            assert final["config"]["optim"]["lr"] == best["config"]["optim"]["lr"]
            assert set(final["selected_from"]) == {r["key"] for r in points}
            assert final["trained_on"] == "train800val200"
    assert {r["seed"] for r in finals} == {1, 2}
    table = (tmp_path / "runs/mini/table.md").read_text()
    assert "lora" in table and (tmp_path / "runs/mini/table.png").stat().st_size > 5000
    for method in ("linear", "lora"):
        assert (tmp_path / f"runs/mini/heat_{method}.png").stat().st_size > 5000
    capsys.readouterr()

    calls = []
    original, train.train = train.train, lambda *a: calls.append(a)
    try:
        sweep.run(cfg)
    finally:
        train.train = original
    assert not calls and "8 done, 0 failed, 0 missing" in capsys.readouterr().out
    assert (tmp_path / "runs/mini/table.md").read_text() == table


def test_a_wider_grid_with_the_same_choice_is_told_by_the_finals(tmp_path):
    narrow = config(tmp_path, "sweep.method=[linear]", "sweep.grid={optim.lr:[1e-4,1e-2]}")
    wide = config(tmp_path, "sweep.method=[linear]", "sweep.grid={optim.lr:[1e-9,1e-4,1e-2]}")
    seen = []
    for cfg in (narrow, wide, narrow):
        sweep.run(cfg)
        seen.append(sorted(all_records(tmp_path), key=lambda r: r["key"]))
    finals = [[r for r in found if r["phase"] == "final"] for found in seen]
    assert len(finals[0]) == 2
    for before, after, later in zip(*finals, strict=True):
        grid = {r["key"] for r in seen[1] if r["phase"] == "grid"}
        assert set(before["selected_from"]) < set(after["selected_from"]) == grid and len(grid) == 3
        assert before == after | {"selected_from": before["selected_from"]} and later == after
    record = next(tmp_path.glob("runs/fake/fake/*-final-*/record.json"))
    record.unlink()  # as if this one had diverged
    failure = {"reason": "loss", "traceback": "FloatingPointError: loss"}
    (record.parent / "failure.json").write_text(json.dumps(failure))
    sweep.run(wide)
    assert not record.exists()


def test_plan_touches_nothing(tmp_path, capsys):
    sweep.run(config(tmp_path, "action=plan"))
    assert not (tmp_path / "runs").exists()
    assert "2 cells, 10 runs: 0 done, 0 failed, 10 missing" in capsys.readouterr().out


def test_ties_go_to_the_smaller_rate_then_decay_then_the_order(tmp_path):
    cfg = config(
        tmp_path,
        "sweep.method=[linear]",
        "sweep.grid={optim.lr:[3e-2,1e-2],optim.weight_decay:[1e-2,1e-3]}",
    )
    (cell,) = sweep.cells(cfg)
    assert cell.chosen() is None and cell.finals() == []

    def score(values: list[float]) -> tuple[float, float]:
        for run, value in zip(cell.grid, values, strict=True):
            run.entry = {"metrics": {"top1_val": value}}
        chosen = cell.chosen().config["optim"]
        return chosen["lr"], chosen["weight_decay"]

    assert score([50, 50, 50, 50]) == (1e-2, 1e-3)
    assert score([50, 51, 50, 51]) == (1e-2, 1e-3)
    assert score([51, 51, 50, 50]) == (3e-2, 1e-3)
    assert score([60, 51, 50, 50]) == (3e-2, 1e-2)


def test_folders_with_any_name(tmp_path):
    odd = tmp_path / "a, (b)=é"
    told = ["sweep.grid={}", f'runs_dir="{odd}"', f'data_root="{odd}"', "action=plan"]
    cfg = compose("sweep", [*CHOICE, *told])
    assert {cell.cfg.runs_dir for cell in sweep.cells(cfg)} == {str(odd)}


def test_a_failed_run_is_told_kept_and_retried(tmp_path, capsys):
    def bad(*overrides: str):
        cfg = config(tmp_path, "sweep.method=[lora]", "sweep.seeds=[1]", *overrides)
        cfg.sweep.grid = {"method.rank": [4, 400]}
        return cfg

    with pytest.raises(RuntimeError, match=r"1 runs failed:\n.*rank=400 must lie in"):
        sweep.run(bad())
    assert len(all_records(tmp_path)) == 1, "no final run without a whole grid"
    (failure,) = tmp_path.glob("runs/fake/fake/*/failure.json")
    assert json.loads(failure.read_text())["status"] == "failed"
    stamp = failure.stat().st_mtime_ns
    with pytest.raises(RuntimeError, match="action=retry"):
        sweep.run(bad())
    assert failure.stat().st_mtime_ns == stamp
    with pytest.raises(RuntimeError):
        sweep.run(bad("action=retry"))
    assert failure.stat().st_mtime_ns != stamp
    said = capsys.readouterr().out
    assert "again: lora-tiny_vit-grid-s1-" in said and "rank=400 must lie in" in said
    sweep.run(bad("action=status"))
    assert (
        "1 of 3" in (said := capsys.readouterr().out) and "failed: lora-tiny_vit-grid-s1-" in said
    )


def test_a_point_that_diverges_loses_and_the_cell_goes_on(tmp_path, capsys):
    choice = ["sweep.method=[lora]", "sweep.seeds=[1]"]
    grid = "sweep.grid={optim.lr:[1e-3,1e30],optim.weight_decay:[1e-4]}"
    sweep.run(config(tmp_path, *choice, grid))
    assert "2 of 3 runs done" in capsys.readouterr().out
    (final,) = (r for r in all_records(tmp_path) if r["phase"] == "final")
    assert final["config"]["optim"]["lr"] == 1e-3 and len(final["selected_from"]) == 2
    sweep.run(config(tmp_path, *choice, grid, "action=plan"))
    assert "2 done, 1 diverged, 0 failed, 0 missing" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"every point of lora on fake.*diverged"):
        sweep.run(config(tmp_path, *choice, "sweep.grid={optim.lr:[1e30,1e31]}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.grid={optim.lr:[]}", "nothing to run: optim.lr is empty"),
        ("sweep.method=[]", "nothing to run: method is empty"),
        ("+sweep.grids={}", "unknown key grids"),
        ("sweep.method=[lora,lorra]", "no method 'lorra'; did you mean lora"),
        ("+sweep.grid={optim.lrr:[1]}", "'optim.lrr', which is no key of a run; did you mean lr?"),
        ("+sweep.grid={metod.rank:[1]}", "'metod.rank', .* did you mean method"),
        ('overrides=["swep=mini"]', "no key or group 'swep'; did you mean sweep"),
        ('overrides=["merged=true"]', "'merged' is for eval.py, sweep.py takes: action, attempts"),
        ("action=go", "no action 'go'; there is: plan, run"),
        ("sweep.grid=3", r"grid is 3 and should be \{path: \[values\]\}"),
        ("sweep.grid={optim.lr:[fast]}", "optim.lr=fast should be a number above 0"),
        ("sweep.seeds=[one]", "sweep.seeds=.* should be null or a list"),
        ("datasets=digits", "datasets=digits should be null or a list"),
        ("pack=some", "pack=some should be auto, all or a number"),
        ('overrides=["optim.epochs=x"]', "optim.epochs=x should be a whole number from 1"),
        ('overrides=["method=lora"]', r"method=lora: a sweep .* give 'sweep.method=\[lora\]'"),
        ('overrides=["seed=3"]', r"seed=3: a sweep .* give 'sweep.seeds=\[3\]'"),
        ('overrides=["force=true"]', "force=true: .* has a record is not run again, delete its"),
        ('overrides=["info=true"]', "info=true: .* give action=plan, or ask train.py"),
        ('overrides=["optim.lr=1"]', r"optim.lr=1 would be without effect.*\{optim.lr:\[1\]\}"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        sweep.run(config(tmp_path, override))
    assert not (tmp_path / "runs").exists()


def test_everything_that_is_not_here_is_said_before_anything_runs(tmp_path, monkeypatch):
    def refused(*overrides: str) -> str:
        with pytest.raises(FileNotFoundError) as told:
            sweep.run(config(tmp_path, *overrides))
        assert not (tmp_path / "runs").exists()
        return str(told.value)

    said = refused("sweep.dataset=[vtab/dtd,fake,vtab/svhn]")
    assert said.count("vtab-1k/dtd with train800.txt") == 1, "once, not for every split and method"
    assert "vtab-1k/svhn with" in said and "python -m scripts.doctor" in said

    def offline(*_, **__):
        raise OSError("no such host")

    monkeypatch.setattr(timm, "create_model", offline)
    said = refused("sweep.backbone=[vit_b16_in21k]", "sweep.overrides=['image_size=224']")
    assert "weights=FILE, the original of https://storage.googleapis.com/vit_models" in said


def test_a_record_that_was_edited_or_cut_off_is_refused_by_name(tmp_path):
    own = ["sweep.method=[linear]", "sweep.seeds=[1]"]
    sweep.run(config(tmp_path, *own))
    choice = config(tmp_path, *own, "action=plan")
    path = next(tmp_path.glob("runs/fake/fake/*-grid-*/record.json"))
    text = path.read_text()
    figure = f'"top1_val": {records.read(path)["metrics"]["top1_val"]}'
    for damaged in (text.replace(figure, '"top1_val": 99.5'), text[:500]):
        assert damaged != text
        path.write_text(damaged)
        with pytest.raises(ValueError, match=rf"{path.parent.name}/record.json .*edited"):
            sweep.run(choice)
    path.write_text(text)
    sweep.run(choice)


def test_a_key_of_the_runs_needs_no_quoting(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "main", lambda: seen.extend(sweep.sys.argv[1:]))
    line = ["sweep.py", "sweep=demo", "optim.epochs=1", "action=plan", "sweep.seeds=[1]", "seed=3"]
    monkeypatch.setattr(sweep.sys, "argv", line)
    sweep.command()
    assert seen[:3] == ["sweep=demo", "action=plan", "sweep.seeds=[1]"]
    cfg = compose("sweep", seen)
    assert list(cfg.overrides) == ["optim.epochs=1", "seed=3"]


def test_a_grid_that_is_given_replaces_the_yamls(monkeypatch):
    """Hydra alone would merge the two, and refuse a key that the yaml's grid does not vary."""
    seen = []
    monkeypatch.setattr(sweep, "main", lambda: seen.extend(sweep.sys.argv[1:]))
    grid, variants = "sweep.grid={method.rank:[2,4]}", "sweep.variants={optim.epochs:[1,2]}"
    line = ["sweep.py", "sweep=mini", grid, variants, "sweep.per_method={}"]
    monkeypatch.setattr(sweep.sys, "argv", line)
    sweep.command()
    found = compose("sweep", seen).sweep
    assert found.grid == {"method.rank": [2, 4]} and found.per_method == {}
    assert found.variants == {"optim.epochs": [1, 2]}


def test_a_grid_of_what_others_refer_to_is_resolved_anew(tmp_path):
    cfg = config(
        tmp_path,
        "sweep.method=[lora]",
        "sweep.grid=null",
        "+sweep.variants={method.alpha:[2,4]}",
    )
    cfg.sweep.grid = {"method.rank": [2, 4], "optim.lr": [1e-3]}
    two, four = sweep.cells(cfg)
    placed = [run.portable["method"]["placements"][0]["tuner"] for run in two.grid + four.grid]
    assert [(p["rank"], p["alpha"]) for p in placed] == [(2, 2), (4, 2), (2, 4), (4, 4)]
    composed = compose(
        "train",
        [
            *("backbone=tiny_vit", "dataset=fake", "method=lora", "protocol=mini", "phase=grid"),
            *("seed=1", "method.rank=4", "method.alpha=2", "optim.lr=1e-3", "image_size=32"),
            *("optim.epochs=1", "optim.batch_size=16"),
        ],
    )
    alone = records.key_of(records.portable(sweep.configuration.plain(composed)))
    assert two.grid[1].key == alone, "a run of train.py is that of the sweep"


@pytest.mark.parametrize("suite", ["mini", "vtab", "fgvc", "cifar"])
def test_cells_that_share_a_composition_are_those_composed_alone(tmp_path, suite):
    names = [n for n in sweep.configuration.catalogue("dataset") if n.startswith(suite)]
    cfg = config(tmp_path, "sweep.method=[lora]", f"sweep.dataset=[{','.join(names)}]")
    for name, cell in zip(names, sweep.cells(cfg), strict=True):
        (alone,) = sweep.cells(config(tmp_path, "sweep.method=[lora]", f"sweep.dataset=[{name}]"))
        assert [run.key for run in cell.grid] == [run.key for run in alone.grid]
        assert cell.grid[0].config == alone.grid[0].config


def test_optuna_proposes_points_of_the_grid_and_goes_on_from_the_records(tmp_path, capsys):
    pytest.importorskip("optuna")
    choice = ["sweep.method=[linear]", "sweep.seeds=[1]", "sampler=optuna", "sampler.trials=4"]
    cfg = config(
        tmp_path, *choice, "sweep.grid={optim.lr:[1e-4,1e-3,1e-2],optim.weight_decay:[0,1e-4]}"
    )
    sweep.run(cfg)
    found = all_records(tmp_path)
    grid = [r for r in found if r["phase"] == "grid"]
    assert len(grid) == 4 and len(found) == 5
    assert set(found[[r["phase"] for r in found].index("final")]["selected_from"]) == {
        r["key"] for r in grid
    }
    assert "Chosen by Optuna (tpe) among 4 of the 6 points" in capsys.readouterr().out
    cfg.sampler.trials = 5
    sweep.run(cfg)
    assert len([r for r in all_records(tmp_path) if r["phase"] == "grid"]) == 5
    cfg.sampler = {"name": "optuna", "sampler": "grid", "trials": 1, "halving": None, "seed": 0}
    with pytest.raises(ValueError, match="neither tpe nor random"):
        sweep.run(cfg)


def test_halving_lets_only_the_best_train_in_full(tmp_path):
    pytest.importorskip("optuna")
    cfg = config(
        tmp_path,
        *("sweep.method=[linear]", "sweep.seeds=[1]", "sampler=optuna", "sampler.trials=4"),
        *("sampler.halving=2", 'overrides=["optim.epochs=4"]'),
        "sweep.grid={optim.lr:[1e-4,1e-3,1e-2],optim.weight_decay:[0,1e-4]}",
    )
    sweep.run(cfg)
    found = all_records(tmp_path)
    epochs = [r["config"]["optim"]["epochs"] for r in found if r["phase"] == "grid"]
    assert epochs.count(1) == 4 and 2 <= epochs.count(2) <= 3 and 1 <= epochs.count(4) <= 2
    (final,) = (r for r in found if r["phase"] == "final")
    full = [r for r in found if r["phase"] == "grid" and r["config"]["optim"]["epochs"] == 4]
    best = max(full, key=lambda r: r["metrics"]["top1_val"])
    assert final["config"]["optim"]["epochs"] == 4
    assert set(final["selected_from"]) == {r["key"] for r in full} and best in full
