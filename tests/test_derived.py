"""Results without training: an ALoRE with some of its experts, several RLRRs as one; their numbers,
their records, and how they are found again."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import peft
import train
from peft import record as records
from peft.config import compose

HERE = ["device=cpu", "workers=0"]
RUN = [
    *("backbone=tiny_vit", "backbone.model.depth=2", "dataset=fake", "image_size=32", *HERE),
    *("optim.batch_size=16", "optim.epochs=1", "optim.lr=0.05"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one ALoRE and of RLRRs that differ in their learning rate, data seed or task."""
    root, made = tmp_path_factory.mktemp("derived"), {}
    wanted = {
        "alore": ["method=alore", "seed=44"],
        "tuned": ["method=alore", "phase=grid"],
        "one": ["method=rlrr"],
        "two": ["method=rlrr", "optim.lr=0.01", "data_seed=3"],
        "ranked": ["method=rlrr", "method.rank=2"],
        "left": ["method=rlrr", "method.sides=left"],
        "lora": ["method=lora"],
        "seeded": ["method=rlrr", "seed=44"],
    }
    for name, told in wanted.items():
        before = set(root.glob("fake/fake/*"))
        train.run(compose("train", [*RUN, f"runs_dir={root}", *told]))
        (made[name],) = set(root.glob("fake/fake/*")) - before
    return made


def derive(*told: str) -> float:
    return evaluation.run(compose("eval", [*HERE, *told]))


def beside(run, word: str) -> list:
    return sorted(run.parent.glob(f"*-{word}-*"))


def test_experts(runs, capsys):
    run = runs["alore"]
    before = beside(run, "derived")
    top1 = derive(f"run={run}", "experts=single_2")
    (folder,) = set(beside(run, "derived")) - set(before)
    record, source = (records.read(f / "record.json") for f in (folder, run))
    assert record["phase"] == "derived" and record["derived_from"] == [source["key"]]
    assert record["metrics"] == {"top1_last": top1} and record["variant"] == "experts=single_2"
    assert (record["method"], record["task"], record["seed"]) == ("alore", "fake", 44)
    assert record["tuned_params"] == source["tuned_params"] and record["key"] != source["key"]

    state, whole = (load_file(f / "adapter.safetensors") for f in (folder, run))
    ups = [name for name in state if name.endswith(".up")]
    assert len(ups) == 4 and all(not state[n][[0, 2, 3]].any() and state[n][1].any() for n in ups)
    assert all(torch.equal(state[n], whole[n]) for n in whole if n not in ups)

    assert derive(f"run={run}", "experts=single_2") == top1
    assert f"already done: {top1:.2f} %" in capsys.readouterr().out
    assert derive(f"run={folder}") == top1  # a derived record is reproduced as any other
    assert "reproduced" in capsys.readouterr().out
    assert derive(f"run={run}", "experts=increment_4") == source["metrics"]["top1_last"]


def test_nothing_is_derived_on_other_weights(runs, monkeypatch, capsys):
    """A record of it would name the weights of its sources. A run that is only evaluated is told
    so."""
    monkeypatch.setattr(peft.state, "digest", lambda model: "0" * 64)
    before = beside(runs["one"], "derived")
    with pytest.raises(ValueError, match=r"weights are not those .* sha256 is 00000000"):
        derive(f"combine=[{runs['one']},{runs['two']}]", "weights=[0.9,0.1]")
    assert beside(runs["one"], "derived") == before
    derive(f"run={runs['one']}")
    assert "beware: the backbone's weights are not those" in capsys.readouterr().out


def test_what_is_derived_from_a_grid_run_sees_no_test_image(runs):
    before = beside(runs["tuned"], "derived")
    top1 = derive(f"run={runs['tuned']}", "experts=sliced_1")
    (folder,) = set(beside(runs["tuned"], "derived")) - set(before)
    record = records.read(folder / "record.json")
    assert record["metrics"] == {"top1_val": top1} and record["trained_on"] == "train800"
    assert record["config"]["derived"]["phase"] == "grid"
    assert derive(f"run={folder}") == top1


@pytest.mark.parametrize("form", ["vectors", "products"])
def test_combine(runs, form):
    both = f"combine=[{runs['one']},{runs['two']}]"
    before = beside(runs["one"], "derived")
    top1 = derive(both, "weights=[0.75,0.25]", f"form={form}")
    (folder,) = set(beside(runs["one"], "derived")) - set(before)
    record = records.read(folder / "record.json")
    sources = [records.read(runs[name] / "record.json") for name in ("one", "two")]
    assert record["derived_from"] == [source["key"] for source in sources]
    assert record["variant"] == f"combine={form},weights=[0.75, 0.25]"
    assert derive(f"run={folder}") == top1

    _, cfg = evaluation.restore(folder, compose("eval", HERE))
    model = evaluation.model_of(cfg, torch.device("cpu"))
    peft.load_adapter_state(model, load_file(folder / "adapter.safetensors"))
    one, two = (load_file(runs[name] / "adapter.safetensors") for name in ("one", "two"))
    name = "blocks.1.mlp.fc1"
    row, col = (
        [state[f"{name}.{vector}"].double() for state in (one, two)] for vector in ("row", "col")
    )
    expected = (0.75 * row[0] + 0.25 * row[1]) * (0.75 * col[0] + 0.25 * col[1])[0]
    if form == "products":
        expected = 0.75 * row[0] * col[0][0] + 0.25 * row[1] * col[1][0]
    tuner = peft.tuners(model)[name].double()
    weight, bias = tuner.base.weight, tuner.base.bias
    shift = 0.75 * one[f"{name}.shift"] + 0.25 * two[f"{name}.shift"]
    torch.testing.assert_close(tuner.weight, weight + expected * weight, atol=1e-7, rtol=0)
    torch.testing.assert_close(tuner.bias, bias + shift, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        model.head.weight, 0.75 * one["head.weight"] + 0.25 * two["head.weight"]
    )


def test_other_weights_another_order_or_form_are_other_runs(runs):
    ours, theirs = runs["one"], runs["two"]
    before = len(beside(ours, "derived"))
    derive(f"combine=[{ours},{theirs}]")  # equal weights
    derive(f"combine=[{ours},{theirs}]", "weights=[0.5,0.5]")  # the same
    derive(f"combine=[{ours},{theirs}]", "weights=[0.25,0.75]")
    derive(f"combine=[{theirs},{ours}]", "weights=[0.5,0.5]")
    assert len(beside(ours, "derived")) == before + 3


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("run={alore} experts=single_5", r"kept='single_5', but there are 4 experts"),
        ("run={alore} experts=second", r"kept='second' .*increment_i, single_i or sliced_i"),
        ("run={one} experts=single_1", r"with no experts"),
        ("run={lora} experts=single_1", r"with no experts"),  # though it has an up and a down
        ("run={alore} experts=single_1 split=val200", r"nothing else: .*a run of its own"),
        ("combine=[{one},{two}] run={one}", r"nothing else"),
        ("combine=[{one},{two}] weights=[1]", r"weights=\[1\] must be 2 numbers"),
        ("combine=[{one},{two}] weights=FILE.npz", r"checkpoint=FILE here"),
        ("combine=[{one},{two}] form=sums", r"form='sums': there is vectors, products"),
        ("combine=[{one},{alore}]", r"alore.* and .*rlrr.* differ in config.method"),
        ("combine=[{alore},{tuned}]", r"do not combine: they differ in phase"),
        ("combine=[{one},{ranked}]", r"differ in config.method\."),
        ("combine=[{one},{seeded}]", r"differ in weights_sha256"),  # random weights: not one origin
        ("combine=[{lora}]", r"no RLRR among these tensors"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(runs, told, message):
    before = beside(runs["one"], "derived")
    with pytest.raises(ValueError, match=message):
        derive(*told.format(**runs).split(" "))
    assert beside(runs["one"], "derived") == before


def test_one_sided_vectors_and_their_sum(runs):
    """A one-sided RLRR has no product: both forms are one vector again."""
    before = beside(runs["left"], "derived")
    derive(f"combine=[{runs['left']},{runs['left']}]", "weights=[0.5,1]", "form=products")
    (folder,) = set(beside(runs["left"], "derived")) - set(before)
    state, whole = (load_file(f / "adapter.safetensors") for f in (folder, runs["left"]))
    torch.testing.assert_close(state["blocks.0.mlp.fc1.col"], 1.5 * whole["blocks.0.mlp.fc1.col"])


def test_a_spoilt_adapter_is_named(runs, tmp_path):
    copy = tmp_path / runs["alore"].name
    copy.mkdir()
    (copy / "record.json").write_bytes((runs["alore"] / "record.json").read_bytes())
    state = load_file(runs["alore"] / "adapter.safetensors")
    save_file(
        {name: t for name, t in state.items() if "head" not in name}, copy / "adapter.safetensors"
    )
    with pytest.raises(ValueError, match=r"does not fit the model in 2 places.*\n.*missing head"):
        derive(f"run={copy}", "experts=single_1")
    assert not beside(copy, "derived")
