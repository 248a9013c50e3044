"""Every experiment plans, has the rows of its published table, and runs."""

import csv
import re

import pytest
from conftest import applies, node
from omegaconf import OmegaConf

import sweep
import train
from peft import record as records
from peft import rows as tables
from peft.cells import Cell, cells_of, product
from peft.config import compose, plain
from scripts import effort, experiments
from scripts.published import PAPERS, PUBLISHED

NAMES = experiments.names()
OUTSIDE = {"glue", "commonsense", "segmentation", "depth", "text-to-image", "image-generation"}
OUTSIDE |= {"video", "cost", "spec"}
RUNNING = [(name, row) for name in NAMES for row in experiments.rows(name) if not row.absent]
FAMILIES = {"vit": "tiny_vit", "swin": "tiny_swin", "convnext": "tiny_convnext"}
FAMILIES |= {"as_mlp": "tiny_asmlp", "resnet": "tiny_resnet", "cnn": "tiny_vgg"}


def published() -> dict[tuple[str, str], list[tuple]]:
    """(paper, table) -> its rows in the paper's order, of the tables that hold scores of images."""
    found: dict[tuple[str, str], list[tuple]] = {}
    for paper in PAPERS:
        with (PUBLISHED / f"{paper}.csv").open() as file:
            for line in csv.DictReader(file):
                if line["benchmark"] in OUTSIDE or not line["method"]:
                    continue
                key = tuple(line[k] for k in ("backbone", "pretraining", "method", "variant"))
                own = found.setdefault((paper, line["table"]), [])
                own.append(key) if key not in own else None
    return found


def test_every_table_has_its_experiment_and_every_experiment_the_rows_of_its_table():
    there = published()
    # Sections that print claims and settings, not results: their grids are a31 and a32.
    for key in (("superlora", "A.3.1"), ("superlora", "A.3.2")):
        there.pop(key)
    assert len(there) == 40
    for (paper, table), rows in there.items():
        name = experiments.of_published(paper, table)
        assert name, f"no experiment publishes {paper}/{table}"
        assert [row.published for row in experiments.rows(name)] == rows, name
        for row, key in zip(experiments.rows(name), rows, strict=True):
            assert experiments.find(paper, table, *key) is row
    assert experiments.find("rlrr", "T2", "vit_b16", "in21k", "noah", "") is None
    assert experiments.of_published("alore", "T24") is None


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_its_table_command_numbers_and_cost(name):
    text = (tables.CONFIGS / "experiment" / f"{name}.yaml").read_text()
    head = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    assert head.startswith("@package _global_ ")
    assert f"python sweep.py experiment={name} action=plan" in head
    assert "Expected" in head and "Cost:" in head
    assert re.search(r"Cost: [\d,]+ (runs|evaluations)", head)
    assert experiments.sweep(name)["name"] == name
    assert len({row.label for row in experiments.rows(name)}) == len(experiments.rows(name))


SOME = {"rlrr/s11", "alore/table22", "superlora/a7", "lava/fig11"}  # a second each, or two
COSTS = [n if n in SOME else pytest.param(n, marks=pytest.mark.full) for n in NAMES]


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_of_the_comments_is_what_is_counted(name):
    said, counted = effort.comment(name)
    assert said == counted, f"python -m scripts.effort {name} --write"


def test_what_a_cell_costs():
    """By hand: FLOPs of a plain ViT-B are 35.1 GFLOP an image at 224 pixels."""
    image = effort.forward("vit_b16_in21k", 224, 47)
    assert image == pytest.approx(35.1e9, rel=1e-3)
    table = dict(experiments.sweep("rlrr/table2"), seeds=[1, 2])
    full, linear, rlrr = (
        effort.effort(cells_of(table, [], rows=[row], datasets=["dtd"])) for row in (1, 2, 11)
    )
    assert (rlrr.runs, rlrr.evaluations) == (2, 0)
    assert rlrr.operations == image * 2 * (2 * 100 * 1000 + 100 * 1880)  # tests every epoch
    assert linear.operations == image * (40 * (800 + 200) + 2 * (1000 + 1880))  # from features
    points = full.runs - 2
    assert full.operations == image * (points * (3 * 100 * 800 + 200) + 2 * (300 * 1000 + 1880))
    steps = cells_of(experiments.sweep("superlora/a7"), [], rows=[1])[0]
    passes, epochs = effort.trained(steps.cfg, 50000)
    assert (passes, epochs) == (2 * 3000 * 50000 / 782, 3000 / 782)


def test_the_printed_numbers_of_the_comments_are_those_of_the_tables():
    for name in NAMES:
        paper, _, table = (experiments.sweep(name)["published"] or "").partition("/")
        if not table or (paper, table) == ("lava", "T1"):
            continue
        lines = (tables.CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()
        head = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
        said = re.search(r"Expected \(.*?\): (.*?)\.(?: |$)(?!\d)", head)[1]
        with (PUBLISHED / f"{paper}.csv").open() as file:
            values = {line["value"] for line in csv.DictReader(file) if line["table"] == table}
        numbers = re.findall(r" (\d+(?:\.\d+)?)(?=,| /|$)", f" {said}")
        assert len(numbers) >= len(experiments.rows(name)) and set(numbers) <= values, name


def test_every_row_applies_and_changes_keys_that_exist():
    for name, row in RUNNING:
        where = f"{name}, row {row.number}: {row.label}"
        assert applies(row.backbone, row.method), where
        names = {"method": row.method, "backbone": row.backbone, "optim": "adamw_cosine"}
        for path in [*tables.values(row.overrides), *row.variants]:
            group, _, key = path.partition(".")
            one = node(group, names[group])
            assert key.partition(".")[0] in one, f"{where}: {path}"


@pytest.mark.parametrize("name", sorted(p.stem for p in tables.CONFIGS.glob("recipe/*.yaml")))
def test_every_recipe_is_used_and_sets_keys_that_exist(name):
    said = tables.recipe(name)
    used = [row for _, row in RUNNING if row.recipe == name]
    assert used, "no experiment uses this recipe"
    row = used[0]
    names = [f"backbone={row.backbone}", f"method={row.method}", f"protocol={said['protocol']}"]
    cfg = compose("train", [*names, *said["overrides"]])
    for path in {
        *tables.axes(said["grid"]),
        *(path for own in said["tasks"].values() for path in own),
    }:
        assert OmegaConf.select(cfg, path, default=KeyError) is not KeyError, path
    for experiment, other in RUNNING:
        if other.recipe == name and said["tasks"]:
            assert set(experiments.datasets(experiment)) <= set(said["tasks"])
        if other.recipe == name:  # a grid of the method's must be of every method that has it
            own = {
                path.partition(".")[2]
                for path in tables.axes(said["grid"])
                if path.startswith("method.")
            }
            assert own <= set(node("method", other.method)), other.label


def test_what_comes_later_wins():
    sweep = dict(experiments.sweep("rlrr/table2"), seeds=[1])
    (cell,) = cells_of(sweep, [], rows=[11], datasets=["clevr_count"])
    assert (cell.cfg.optim.lr, cell.cfg.optim.layer_dropout) == (5e-3, 0.5)
    assert (cell.cfg.protocol.selection, cell.cfg.preset.name) == ("best_on_test", "vtab_rlrr")
    assert cell.expected == 1 and not cell.grid
    (cell,) = cells_of(sweep, ["optim.lr=0.25"], rows=[11], datasets=["clevr_count"])
    assert (cell.cfg.optim.lr, cell.cfg.optim.layer_dropout) == (0.25, 0.5)
    first, second = cells_of(sweep, [], rows=[9], datasets=["svhn", "dtd"])
    assert (first.cfg.method.rank, second.cfg.method.rank) == (32, 16)
    (cell,) = cells_of(sweep, [], rows=[2], datasets=["dtd"])
    assert len(cell.grid) == 40 and cell.cfg.dataset.source == "raw"
    assert cell.cfg.optim.name == "sgd_cosine" and cell.cfg.preset.name == "vtab_tf"
    short = {**sweep, "grid": {"optim.lr": [1.0]}}
    (cell,) = cells_of(short, ["dataset.source=folder"], rows=[2], datasets=["dtd"])
    assert len(cell.grid) == 1 and cell.cfg.dataset.source == "folder"


def test_a_derived_row_brings_the_row_that_it_derives_from():
    sweep = experiments.sweep("alore/table22")
    derived = next(row for row in experiments.rows("alore/table22") if row.derive)
    base, cell = cells_of(sweep, [], rows=[derived.number], datasets=["dtd"])
    assert cell.base is base and base.expected and not base.row.derive


def test_tables_share_their_runs():
    one = cells_of(experiments.sweep("rlrr/table2"), [], rows=[11], datasets=["dtd"])
    two = cells_of(experiments.sweep("rlrr/s10"), [], rows=[5], datasets=["dtd"])
    three = cells_of(experiments.sweep("rlrr/s10"), [], rows=[4], datasets=["dtd"])
    keys = [[run.key for run in cell.finals()] for (cell,) in (one, two, three)]
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])


def test_a_record_is_told_to_belong_to_its_row():
    rows = experiments.rows("alore/table18")
    method = plain(compose("train", ["backbone=vit_b16_in21k", "method=alore"]).method)
    record = {"backbone": "vit_b16_in21k", "method": "alore", "task": "dtd", "variant": "rank=8"}
    record["config"] = {"method": method | {"rank": 8}}
    assert [experiments.matches(record, row) for row in rows] == [row.number == 4 for row in rows]
    record["variant"] = "dropout=0.1,rank=8"  # the grid varies it
    assert experiments.matches(record, rows[3])
    record["variant"] = "experts=2,rank=8"
    assert not experiments.matches(record, rows[3])
    default = record | {"variant": "", "config": {"method": method}}
    assert [row.number for row in rows if experiments.matches(default, row)] == [3]


BAD = [
    ({"rows": [{"backbone": "b", "method": "m", "recipe": "r", "what": 1}]}, "row 1.*unknown key"),
    ({"rows": [{"backbone": "b", "recipe": "r"}]}, "names no backbone and method"),
    ({"rows": [{"backbone": "b", "method": "m"}]}, "neither a recipe nor a reason"),
    ({"rows": [{"backbone": "vit_b16_in21k", "method": "rlrr", "recipe": "r"}]}, "no recipe 'r'"),
    (
        {"rows": [{"backbone": "convnext_b_in1k", "method": "rlrr", "recipe": "rlrr_vtab"}]},
        "does not apply to convnext",
    ),
    (
        {
            "rows": [{"backbone": "vit_b16_in21k", "method": "rlrr", "recipe": "rlrr_vtab"}],
            "dataset": ["cifar/cifar10"],
        },
        "no values for cifar10",
    ),
]


@pytest.mark.parametrize(("change", "reason"), BAD, ids=[reason[:12] for _, reason in BAD])
def test_a_wrong_table_is_refused_with_its_reason(change, reason):
    with pytest.raises(ValueError, match=reason):
        cells_of({**experiments.sweep("rlrr/s10"), "recipe": None, **change}, [])


def test_a_wrong_choice_is_refused_with_what_there_is():
    sweep = experiments.sweep("rlrr/s10")
    with pytest.raises(ValueError, match="has no row 9; there is: 1 rlrr init=normal"):
        cells_of(sweep, [], rows=[9])
    with pytest.raises(ValueError, match="no dataset 'clevr_dist'; did you mean clevr_distance"):
        cells_of(sweep, [], datasets=["clevr_dist"])
    with pytest.raises(ValueError, match="no experiment 'rlrr/table22'; did you mean"):
        experiments.rows("rlrr/table22")


def first_cells() -> dict[tuple, tuple]:
    """The first cell of every experiment, and one of every recipe: (name, row), each once."""
    found: dict[tuple, tuple] = {}
    firsts = [(name, next(r for r in experiments.rows(name) if not r.absent)) for name in NAMES]
    recipes = {row.recipe: (name, row) for name, row in reversed(RUNNING)}
    for name, row in [*firsts, *recipes.values()]:
        own = (experiments.datasets(name)[0], row.recipe, row.method, *row.overrides)
        found.setdefault((node("backbone", row.backbone).family, *own), (name, row))
    return found


def tiny(name: str, row: tables.Row, tmp_path) -> Cell:
    """The first cell of a row as its experiment plans it, cut down: the tiny backbone of its
    family, made-up images of as many classes, two steps, one seed, the first point of the grid."""
    point = next(iter(product(tables.recipe(row.recipe)["grid"])), {})
    said = {**experiments.sweep(name), "seeds": [1], "grid": [point] if point else {}}
    machine = [f"runs_dir={tmp_path}", "device=cpu", "workers=0", "image_size=32"]
    cell = cells_of(said, machine, rows=[row.number], datasets=experiments.datasets(name)[:1])[0]
    cell = getattr(cell, "base", cell)
    cfg, fake = cell.cfg, node("dataset", "fake").copy()
    small = node("backbone", FAMILIES[cfg.backbone.family]).copy()
    small.head = cfg.backbone.get("head")
    splits = {part for use in (cfg.protocol.tune, cfg.protocol.final) for part in use.values()}
    trained = {cfg.protocol.tune.train_on, cfg.protocol.final.train_on}
    fake.num_classes = cfg.dataset.num_classes
    batch = point.get("optim.batch_size", cfg.optim.batch_size)
    fake.splits = {split: 2 * batch if split in trained else 4 for split in splits}
    cfg.backbone, cfg.dataset, cfg.optim.steps, cfg.optim.warmup_epochs = small, fake, 2, 0
    return Cell(cfg, [point] if point else [], [1])


@pytest.mark.parametrize(
    ("name", "row"),
    first_cells().values(),
    ids=lambda x: x.replace("/", "-") if isinstance(x, str) else f"{x.number}-{x.method}",
)
def test_the_first_cell_runs(name, row, tmp_path):
    cell = tiny(name, row, tmp_path)
    run = cell.wanted()[0]
    assert (run.config["phase"] == "grid") == bool(cell.grid)
    train.run(OmegaConf.create(run.config))
    record = records.read(run.folder / "record.json")
    said = tables.recipe(row.recipe)
    protocol = compose("train", [f"protocol={said['protocol']}"]).protocol
    assert (record["protocol"], record["selection"]) == (protocol.name, protocol.selection)
    peeks = record["phase"] == "final" and protocol.selection == "best_on_test"
    assert ("top1_best" in record["metrics"]) == peeks
    task = experiments.datasets(name)[0]
    fits = experiments.matches({**record, "backbone": row.backbone, "task": task}, row)
    assert fits != bool(row.derive)  # what is derived has records of its own


def test_rows_that_are_derived_are_evaluated_and_not_trained(tmp_path, capsys):
    rows = [
        {"backbone": "tiny_vit", "method": "alore", "derive": {"experts": "increment_1"}},
        {"backbone": "tiny_vit", "method": "alore"},
    ]
    cfg = compose(
        "sweep",
        [
            *(f"{key}={tmp_path}/{key}" for key in ("runs_dir", "data_root")),
            *("sweep=_table", "device=cpu", "workers=0", "engine=here"),
            *("sweep.name=masks", "sweep.dataset=[fake]", "sweep.recipe=alore_vtab"),
            *("sweep.grid={}", "sweep.seeds=[1,2]", "sweep.rows=[]"),
            'sweep.overrides=["image_size=32","optim.epochs=1","optim.batch_size=16"]',
        ],
    )
    cfg.sweep.rows = rows
    cfg.action = "plan"
    sweep.run(cfg)
    said = capsys.readouterr().out
    assert "2 cells, 4 runs" in said and "1 alore, tiny_vit: 2 evaluations, 0 done" in said
    cfg.action = "run"
    sweep.run(cfg)
    found = [records.read(path) for path in tmp_path.glob("runs_dir/fake/fake/*/record.json")]
    finals = {r["key"]: r for r in found if r["phase"] == "final"}
    derived = [r for r in found if r["phase"] == "derived"]
    assert len(finals) == len(derived) == 2
    assert {key for r in derived for key in r["derived_from"]} == set(finals)
    assert {r["config"]["derived"]["experts"] for r in derived} == {"increment_1"}
    capsys.readouterr()
    cfg.action = "plan"
    cfg.rows = [1]  # alone: it brings the row that it derives from
    sweep.run(cfg)
    assert "2 cells, 4 runs: 4 done, 0 failed, 0 missing" in capsys.readouterr().out
    own, other = tables.rows_of({"name": "masks", "recipe": "alore_vtab", "rows": rows})
    assert all(experiments.matches(r, own) and not experiments.matches(r, other) for r in derived)
    assert not any(experiments.matches(r, own) for r in finals.values())
