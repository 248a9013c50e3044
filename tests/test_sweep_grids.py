"""The sweeps of configs/sweep: every one plans, and the papers' grids are the printed ones."""

import functools
import itertools

import pytest
from omegaconf import OmegaConf

import sweep
from peft.cells import check, product
from peft.config import CONFIGS, catalogue, compose, plain
from peft.rows import axes

# As printed: RLRR's supplement (Table 3), ALoRE's (Table 8).
PRINTED = {
    "rlrr_full": {
        "optim.lr": {0.2, 0.1, 0.05, 0.01, 0.005, 0.001, 0.0001},
        "optim.weight_decay": {0.05, 0.01, 0.005, 0.001, 0},
        "optim.layer_dropout": {0, 0.1, 0.3, 0.5, 0.7},
        "optim.batch_size": {256, 128, 32},
    },
    "rlrr_lr_wd": {
        "optim.lr": {0.2, 0.1, 0.05, 0.01, 0.005, 0.001, 0.0001},
        "optim.weight_decay": {0.05, 0.01, 0.005, 0.001, 0},
    },
    "alore_full": {
        "optim.lr": {0.05, 0.01, 0.005, 0.001},
        "optim.weight_decay": {0.05, 0.01, 0.005, 0.001, 0},
        "method.dropout": {0, 0.1},
    },
    "vpt_full": {
        "method.num_prompts": {1, 5, 10, 50, 100, 200},
        "optim.batch_size": {128, 64},
        "optim.lr": {50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05},
        "optim.weight_decay": {0.01, 0.001, 0.0001, 0},
    },
    "repadapter_scales": {"method.scale": {0.1, 0.5, 1, 5, 10}},
}
POINTS = {"rlrr_full": 525, "rlrr_lr_wd": 35, "alore_full": 40, "vpt_full": 240}


@functools.cache
def sweep_of(name: str) -> dict:
    return plain(compose("sweep", [f"sweep={name}"]).sweep)


@pytest.mark.parametrize("name", PRINTED)
def test_a_papers_grid_is_the_printed_one(name):
    grid = sweep_of(name)["grid"]
    points = [tuple(point.values()) for point in product(grid)]
    assert {path: {p[path] for p in product(grid)} for path in axes(grid)} == PRINTED[name]
    assert len(set(points)) == len(points) == POINTS.get(name, 5)


def test_an_empty_axis_is_found_in_every_part_of_a_grid():
    whole = sweep_of("vpt_full")
    with pytest.raises(ValueError, match=r"vpt_full has nothing to run: optim.lr is empty"):
        check({**whole, "grid": [whole["grid"][0], {"optim.lr": []}]})


def test_vtab_grids_have_the_19_tasks_and_an_honest_choice():
    tasks = {f"vtab/{path.stem}" for path in (CONFIGS / "dataset/vtab").glob("[!_]*.yaml")}
    assert len(tasks) == 19
    for name in [*PRINTED, "ssf_full", "fact_scales", "convpass_scales", "coarse"]:
        found = sweep_of(name)
        assert set(found["dataset"]) == tasks and len(found["dataset"]) == 19
        assert found["protocol"] == "vtab_honest"


def test_superloras_ranks_are_those_of_its_supplement():
    rows = [tuple(point.values()) for point in product(sweep_of("superlora_ranks")["variants"])]
    assert len(set(rows)) == len(rows) == 428
    counted = {
        group: len(list(own))
        for group, own in itertools.groupby(sorted((r[0], r[2], str(r[3])) for r in rows))
    }
    wide = dict.fromkeys([(2, False, g) for g in ("weight", "1", "4", "8", "12")], 34)
    wide |= dict.fromkeys([(2, True, g) for g in ("1", "4", "12")], 34) | {(2, True, "8"): 23}
    tensor = {3: (15, 15, 15, 15), 4: (14, 11, 12, 9), 5: (7, 7, 7, 6)}
    for order, counts in tensor.items():
        groups = zip(("1", "4", "8", "12"), counts, strict=True)
        wide |= {(order, True, group): count for group, count in groups}
    assert counted == wide


@pytest.mark.parametrize("name", catalogue("sweep"))
def test_every_sweep_plans(name, tmp_path):
    """All of it in shape; a dataset, two methods and the ends of every axis as runs."""
    whole = sweep_of(name)
    check(whole)
    for dataset in whole["dataset"]:
        assert (CONFIGS / "dataset" / f"{dataset}.yaml").is_file(), f"{name} names no {dataset}"
    cfg = compose("sweep", [f"sweep={name}", f"runs_dir={tmp_path}/runs"])
    variants = whole.get("variants") or {}
    blocks = [variants] if isinstance(variants, dict) else variants
    few = [{path: [values[-1]] for path, values in block.items()} for block in blocks]
    grid = whole["grid"] or {}
    parts = [grid] if isinstance(grid, dict) else grid
    ends = [{path: sorted({v[0], v[-1]}) for path, v in part.items()} for part in parts if part]
    few = few[0] if isinstance(variants, dict) else few[::5]
    methods = whole["method"][:: max(1, len(whole["method"]) - 1)]
    cfg.sweep = {**whole, "dataset": whole["dataset"][:1], "grid": ends, "variants": few}
    cfg.sweep.method = methods
    cells = sweep.cells(cfg)
    assert len(cells) == len(methods) * len(product(few))
    for cell in cells:
        keys = {run.key for run in cell.grid}
        assert len(keys) == len(cell.grid) == len(product(ends)) * bool(ends)
        for run in cell.grid:
            found = OmegaConf.create(run.config)
            assert {path: OmegaConf.select(found, path) for path in run.point} == run.point
