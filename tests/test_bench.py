"""The benchmarks count right, run, and say what they measured. No time is asserted."""

import json

import pytest
import torch

import peft
from scripts.bench import cost, measure, pages, readme, run, step
from scripts.bench.__main__ import main

TINY = ["backbone=tiny_vit", "blocks=2", "batch=2"]

# Three ViT-B blocks, batch 8, rank 4, all four linear layers of a block adapted: GFLOP and MiB,
# counted once by hand-written prototypes of these forward passes, in another program.
ELSEWHERE = {
    "LoRA, W'": (207.6, 301),
    "LoRA, low-rank path": (141.5, 227),
    "DoRA, W'": (207.6, 382),
    "DoRA, factored": (141.7, None),  # how it is factored decides what is kept
    "RLRR, W'": (207.1, None),
    "RLRR, factored": (274.0, 351),
    "SSF, W'": (207.1, 301),
    "SSF, on the output": (140.1, 268),
}


@pytest.fixture
def result(tmp_path, monkeypatch):
    """Runs a benchmark and returns what it wrote, of which tables can be made."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)

    def call(name: str, *given: str) -> dict:
        assert main([name, *given]) == 0
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["benchmark"] == name
        assert found["hardware"]["cpu"]
        assert f"## {name}\n" in pages.page({name: found})
        if name in readme.FIGURES and name != "cost":
            assert pages.machine(found) in readme.table({name: found})
        return found

    return call


def test_the_counts_are_those_of_an_independent_program():
    rows = {row["variant"]: row for row in cost.variants("vit_b16_in21k", 3, 8)}
    assert set(rows) == set(ELSEWHERE)
    for name, (gflop, mebibytes) in ELSEWHERE.items():
        assert abs(rows[name]["gflop"] - gflop) < 0.06, name
        if mebibytes is not None:
            assert abs(rows[name]["saved_mebibytes"] - mebibytes) < 1.01, name


def test_a_forward_pass_counted_by_hand():
    """Linear probing has no backward pass but the head's."""
    width, tokens, blocks, batch = 64, 101, 2, 2  # 160 pixels in patches of 16, a class token
    patches = 2 * (tokens - 1) * width * 3 * 16 * 16
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    head = 2 * 2 * width * measure.CLASSES  # forward, and the gradient of its weight
    model = measure.model_of(measure.configured("tiny_vit", "linear", blocks), "meta")
    expected = batch * (patches + blocks * block + head)
    assert cost.count(model, batch)["gflop"] == round(expected / 1e9, 4)


@pytest.mark.parametrize("method", ["full", "lora", "vpt_deep", "superlora_projected", "convpass"])
def test_tensors_without_content_count_like_real_ones(method):
    cfg = measure.configured("tiny_vit", method, 2)
    model = measure.model_of(cfg)
    images, labels = measure.batch_of(model, 2)
    model.train()
    operations, kept = measure.counted(model, lambda: step.loss_of(model, images, labels))
    hollow = cost.count(measure.model_of(cfg, "meta"), 2)
    assert hollow["gflop"] == round(operations / 1e9, 4)
    assert hollow["saved_mebibytes"] == round(kept / 2**20, 1)


def test_cost(result):
    found = result("cost", *TINY, "methods=full,linear,lora,svdiff")
    rows = {row["method"]: row for row in found["methods"]}
    assert rows["full"]["gflop_to_full"] == 1.0
    assert rows["linear"]["gflop_to_full"] < rows["lora"]["gflop_to_full"] < 1
    assert rows["lora"]["own_forward"] == ["LoRA"]
    assert rows["lora"]["materialised"]["gflop"] > rows["lora"]["gflop"]
    assert "materialised" not in rows["svdiff"]  # it has no other forward pass
    model = peft.create("tiny_vit", "lora", num_classes=5, **{"backbone.model.depth": 2})
    assert rows["lora"]["tuned_params"] == peft.count(model)["tuned"]


def test_materialising_changes_the_way_and_not_the_function():
    cfg = measure.configured("tiny_vit", "ssf", 2)
    model = measure.model_of(cfg).eval()
    images, _ = measure.batch_of(model, 2)
    before = model.get_submodule("blocks")(model.patch_embed(images).flatten(1, -2))
    assert cost.materialise(model) == ["SSF"]
    after = model.get_submodule("blocks")(model.patch_embed(images).flatten(1, -2))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert cost.materialise(model) == []


def test_step(result, monkeypatch):
    monkeypatch.setattr(step, "SLOW", 0.0)  # says of each where its time goes
    found = result("step", *TINY, "rounds=1", "methods=lora,vpt_deep")
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows) == ["lora", "vpt_deep"]
    for method, row in rows.items():
        assert {"to_linear_forward", "to_full", "to_floor", "excess", "seconds"} <= set(row)
        assert abs(sum(row["time_goes_to"]["kinds"].values()) - 1) < 0.01
        cfg = measure.configured("tiny_vit", method, 2)
        assert row["gflop"] == cost.count(measure.model_of(cfg, "meta"), 2)["gflop"]
    assert rows["lora"]["merged_to_bare"] > 0
    assert "merged_to_bare" not in rows["vpt_deep"]  # prompts cannot be folded in


def test_every_method_that_applies_is_measured(monkeypatch):
    monkeypatch.setattr(measure, "catalogue", lambda group: ["lava_reshaped", "lora", "vpt_deep"])
    methods, others = measure.chosen({}, "tiny_vit")
    assert methods == ["lora", "vpt_deep"]
    assert "without convolutions" in others["lava_reshaped"]
    with pytest.raises(ValueError, match="without convolutions"):
        measure.chosen({"methods": "lava_reshaped"}, "tiny_vit")


def test_the_floor_is_below_every_method_that_reaches_the_first_block():
    shape = measure.Shape("tiny_vit", 2, "cpu", 2, 1)
    works, _ = step.references(shape)
    floor, full = measure.flops(works["floor"]), measure.flops(works["full"])
    lora = measure.model_of(measure.configured("tiny_vit", "lora", 2))
    assert measure.flops(works["linear_forward"]) < floor < full
    assert floor < measure.flops(step.training(lora, shape))


def test_paths(result):
    found = result("paths", *TINY, "rounds=1", "methods=lora,lora_r16,ssf", "cnn=tiny_resnet")
    assert [row["tuners"] for row in found["methods"]] == [["LoRA"], ["SSF"]]
    for kind, published in (("matrix", 1.18), ("conv", 1.2)):
        table = found["lava_table16"][kind]
        assert table["ours"]["lora"] == 1.0
        assert table["published"]["lava"] == published


def test_merge(result):
    found = result("merge", *TINY, "rounds=1", "methods=lora,rlrr,vpt_deep,bitfit")
    assert {row["method"] for row in found["methods"]} == {"lora", "rlrr"}
    assert all(row["operations_to_bare"] == 1.0 for row in found["methods"])
    assert found["smallest"] <= found["largest"]
    assert "cannot be folded" in found["not_merged"]["vpt_deep"]
    assert "no tuners" in found["not_merged"]["bitfit"]


def test_pack(result):
    found = result("pack", *TINY, "rounds=1", "members=1,3", "methods=lora")
    (row,) = found["methods"]
    assert [p["members"] for p in row["packs"]] == [1, 3]
    alone, together = row["packs"]
    assert alone["gflop_to_solo"] == 1.0
    assert together["gflop_to_solo"] < 1  # what comes before the first tuner runs once for all
    assert row["chosen"] in (1, 3)


def test_run(result):
    found = result(
        "run", *TINY, "images=4", "test=6", "pixels=40", "method=rlrr", "backbone=tiny_vit"
    )
    assert found["method"] == "rlrr"
    assert set(found["measured_seconds"]["ours"]) >= {"fill", "input", "step", "evaluation"}
    for name in ("naive", "ours"):
        assert set(found["hours"][name]) == {"decoding", "compiling", "step", "evaluation"}
    assert found["ratio"] > 0


def test_a_run_is_scaled_as_it_says():
    """1,000 images and 100 epochs, 20,416 test images: by hand."""
    seconds = run.Clock(fill=1, input=2, step=4, test_input=0.5, evaluation=1, compiling=36)
    naive = run.scaled(seconds, images=10, test=20, epochs=2, tests=2)
    assert naive["step"] == round(4.0 / 20 * 100_000 / 3600, 4)
    assert naive["evaluation"] == round(1.0 / 40 * 2_041_600 / 3600, 4)
    ours = run.scaled(seconds, images=10, test=20, epochs=2, tests=1)
    assert ours["evaluation"] == round(1.0 / 20 * 20_416 / 3600, 4)
    assert ours["compiling"] == 0.01, "once a run"
    decoding = 1.0 * 100 + 2.0 / 20 * 100_000 + 0.5 / 20 * 20_416
    assert ours["decoding"] == round(decoding / 3600, 4)


def test_readme(result, tmp_path, monkeypatch):
    page = tmp_path / "README.front.md"
    monkeypatch.setattr(readme, "README", page)
    page.write_text(f"before\n{readme.BEGIN}\nafter\n")
    assert main(["readme"]) == 1  # nothing was measured yet
    result("cost", *TINY, "methods=full")
    result("merge", *TINY, "rounds=1", "methods=lora")
    for _ in range(2):  # the second time changes nothing
        assert main(["readme"]) == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n")
        assert text.count(readme.BEGIN) == text.count(readme.END) == 1
        assert "full fine-tuning" in text.partition(readme.BEGIN)[2].partition(readme.END)[0]
    tables = (tmp_path / "README.md").read_text()
    assert "## cost" in tables and "## merge" in tables and "## step" not in tables
    page.write_text("no marker\n")
    assert main(["readme"]) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["step", "devise=cuda"], "did you mean device"),
        (["step", "methods=lorra"], "did you mean lora"),
        (["cost", "batch=0"], "batch=0 must be a whole number"),
        (["pack", "members=1,x"], "members=x must be a whole number"),
        (["merge", "device=cuda:7"], "device=cuda:7 is not here"),
        (["cost", "backbone=vit_b"], "there is no backbone"),
    ],
)
def test_bad_input(given, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert main(given) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    assert main(["nothing"]) == 2
    assert main(["step", "help"]) == 0
    assert "rounds" in capsys.readouterr().out


@pytest.mark.full
def test_listing_lists_every_record(result):
    found = result("listing", "records=525")
    assert found["records"] == 525 and found["cells"] == 1
    assert set(found["seconds"]) == {"start", "first", "plan", "status"}
