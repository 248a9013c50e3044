"""Figures of records: what they show, and what they refuse."""

import pytest
from test_tables import record

from scripts import plot

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
