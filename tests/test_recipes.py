"""What published recipes ask of the loop: parts of a batch, averages, mixtures, restarts, features
that are computed once, compilation. Each on or off changes what it should and nothing else."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import ROOT, TINY, config, done, folder

import peft
import train
from data.mixing import mixing
from peft import parallel
from peft import record as records


@pytest.mark.parametrize("method", ["partial", "lora_late"])
def test_what_a_frozen_beginning_computes_is_computed_once(tmp_path, monkeypatch, method):
    """Partial tuning, and tuners in the last blocks only."""
    choice = ["method=partial"]
    if method == "lora_late":
        choice = ["method=lora", "+method.attention.0.layers=[4,5]", "optim.ema=0.9"]
    short, seen = config(tmp_path / "short", *choice), []
    real = train.Pack

    def spied(model, net, *rest):
        seen.append(len(net.blocks))
        return real(model, net, *rest)

    monkeypatch.setattr(train, "Pack", spied)
    train.run(short)
    monkeypatch.setattr(
        train, "cached_features", lambda net, batches, scored, _: (net, batches, net, scored)
    )
    train.run(config(tmp_path / "long", *choice))
    assert seen[0] < seen[1] == 6
    both = [folder(tmp_path / name) for name in ("short", "long")]
    a, b = (load_file(path / "adapter.safetensors") for path in both)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    a, b = (records.read(path / "record.json")["metrics"] for path in both)
    assert a == pytest.approx(b)


@pytest.mark.parametrize(
    ("choice", "blocks"),
    [("preset=vtab_rlrr", 6), ("optim.mixup=1", 6), ("optim.layer_dropout=0.1", 5)],
)
def test_what_changes_is_computed_anew(tmp_path, monkeypatch, choice, blocks):
    """Flips and mixup change all features, dropout those of all blocks but the first."""
    seen, real = [], train.Pack

    def spied(model, net, *rest):
        seen.append(len(net.blocks))
        return real(model, net, *rest)

    monkeypatch.setattr(train, "Pack", spied)
    train.run(config(tmp_path, "method=linear", "optim.epochs=1", "dataset.name=pets", choice))
    assert seen == [blocks]


def test_an_average_of_the_weights_is_what_is_judged_and_stored(tmp_path, monkeypatch):
    """By hand: the average starts where training does and follows every step."""
    steps, real = [], train.Pack.average

    def average(pack, decay):
        real(pack, decay)
        steps.append([leaf.detach().clone() for leaf in pack.trained(0)])

    monkeypatch.setattr(train.Pack, "average", average)
    starts, build = [], train.make_optimizer

    def begin(pack, optims):
        starts.append([leaf.detach().clone() for leaf in pack.trained(0)])
        return build(pack, optims)

    monkeypatch.setattr(train, "make_optimizer", begin)
    train.run(config(tmp_path, "method=bitfit", "optim.ema=0.7", "optim.no_decay=none"))
    expected = starts[0]
    for after in steps:
        expected = [0.7 * e + 0.3 * a for e, a in zip(expected, after, strict=True)]
    stored = load_file(folder(tmp_path) / "adapter.safetensors")
    model = peft.create("tiny_vit", "bitfit", num_classes=4)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(steps) == 10 and len(expected) == len(names)
    for name, tensor in zip(names, expected, strict=True):
        torch.testing.assert_close(stored[name], tensor.detach())
    assert not torch.equal(stored["head.weight"], steps[-1][names.index("head.weight")])


def test_a_batch_in_parts_is_the_same_step(tmp_path):
    for parts in (1, 3):
        choice = ["method=lava", "optim=sgd_cosine", "optim.lr=0.02", "optim.batch_size=20"]
        choice += ["optim.epochs=2", f"optim.accumulate={parts}"]
        train.run(config(tmp_path / str(parts), *choice))
    one, three = (load_file(folder(tmp_path / n) / "adapter.safetensors") for n in "13")
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-4)
    for key, value in done(tmp_path / "1")["metrics"].items():
        assert done(tmp_path / "3")["metrics"][key] == pytest.approx(value, rel=1e-4)


def test_activations_computed_again_give_the_same_bits(tmp_path):
    choice = ["method=vpt_deep", "optim.layer_dropout=0.2"]
    for again in ("false", "true"):
        train.run(config(tmp_path / again, *choice, f"grad_checkpointing={again}"))
    a, b = (folder(tmp_path / n) / "adapter.safetensors" for n in ("false", "true"))
    assert a.read_bytes() == b.read_bytes() and a.parent.name == b.parent.name
    for said, choice in (
        ("VGG knows no gradient checkpointing", ["backbone=tiny_vgg", "method=bitfit"]),
        ("Prompts runs blocks as one", ["method=vpt_shallow"]),
    ):
        with pytest.raises(ValueError, match=rf"{said}.*optim\.accumulate"):
            train.run(config(tmp_path, "grad_checkpointing=true", *choice))


@pytest.mark.parametrize(
    "choice",
    [
        ["optim.ema=0.9", "optim.mixup=0.8", "optim.cutmix=1", "optim.label_smoothing=0.1"],
        ["optim.steps=13", "optim.accumulate=2", "optim.restart_epochs=1"],
    ],
)
def test_every_recipe_goes_on_to_the_same_bits(tmp_path, monkeypatch, choice):
    choice = ["method=lora", "method.dropout=0.1", "optim.epochs=3", *choice]
    train.run(config(tmp_path / "whole", *choice))
    real = train.learning_rate

    def crash(step: int, *rest):
        if step == 8:
            raise RuntimeError("the power went out")
        return real(step, *rest)

    monkeypatch.setattr(train, "learning_rate", crash)
    with pytest.raises(RuntimeError, match="power"):
        train.run(config(tmp_path / "cut", *choice, "checkpoint_seconds=0"))
    monkeypatch.setattr(train, "learning_rate", real)
    train.run(config(tmp_path / "cut", *choice))
    whole, cut = folder(tmp_path / "whole"), folder(tmp_path / "cut")
    for name in ("adapter.safetensors", "log.csv"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_a_cosine_with_restarts(tmp_path):
    """Periods of 10, 20, 40 ... epochs after the warm-up, as torch has them."""
    choice = ["optim.restart_epochs=10", "optim.restart_factor=2", "optim.epochs=75"]
    optim = config(tmp_path, *choice, "optim.warmup_epochs=5", "optim.min_lr=1e-5").optim
    parameter = torch.nn.Parameter(torch.zeros(()))
    reference = torch.optim.SGD([parameter], lr=optim.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(reference, 20, 2, 1e-5)
    for step in range(10, 150):
        rate = train.learning_rate(step, 2, optim)
        assert rate == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)
        reference.step()
        schedule.step()


def test_mixtures_are_timms_and_repeat():
    x = torch.arange(5.0)[:, None, None, None].expand(5, 3, 8, 8).contiguous()
    labels = torch.tensor([0, 1, 2, 1, 0])
    mix = mixing(0.8, 1.0, 0.1, 3, data_seed=7)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    kinds = set()
    for batch in range(8):
        images, targets = mix(x, labels, 0, batch)
        again = mix(x, labels, 0, batch)
        assert torch.equal(images, again[0]) and torch.equal(targets, again[1])
        assert torch.equal(images[4], x[4]) and targets[4].argmax() == 0, "the odd one stays"
        share = (targets[0, 0] - 0.1 / 3) / 0.9  # of image 0 in itself; the rest is image 3
        assert images[0].mean().item() == pytest.approx(3 * (1 - share.item()), abs=1e-5)
        torch.testing.assert_close(targets.sum(1), torch.ones(5))
        kinds.add(bool(images[0].std() > 1e-6 and images[0].unique().numel() == 2))
    assert kinds == {True, False}, "both CutMix and mixup were drawn"
    assert x[0].max() == 0 and np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert not torch.equal(mix(x, labels, 0, 0)[1], mix(x, labels, 1, 0)[1])
    one, soft = mix(x[:1], labels[:1], 0, 0)
    assert torch.equal(one, x[:1]) and soft[0, 0] == pytest.approx(0.9 + 0.1 / 3)
    assert mixing(0.0, 0.0, 0.1, 3, 7) is None


@pytest.mark.parametrize(("count", "parts", "world"), [(8, 1, 1), (7, 3, 1), (7, 2, 3), (1, 4, 2)])
def test_the_pieces_of_a_batch_weigh_as_much_as_it_does(monkeypatch, count, parts, world):
    seen, mean = [], 0.0
    for rank in range(world):
        monkeypatch.setattr(parallel, "world", lambda: world)
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        pieces = list(parallel.pieces(count, parts))
        assert [last for *_, last in pieces] == [False] * (len(pieces) - 1) + [True]
        for piece, weight, _ in pieces:
            values = list(range(count))[piece]
            seen += values if weight else []
            mean += weight * sum(values) / len(values) / world
    assert seen == list(range(count)) and mean == pytest.approx((count - 1) / 2)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("optim.epochs=0", "optim.epochs=0 should be a whole number from 1"),
        ("optim.steps=0", "optim.steps=0 should be null or a whole number from 1"),
        ("optim.ema=1", "optim.ema=1 should be null or a number between 0 and 1"),
        ("optim.accumulate=0", "optim.accumulate=0 should be"),
        ("optim.restart_epochs=0", "optim.restart_epochs=0 should be"),
        ("compile=reduce-overhead optim.accumulate=2", "overwrites them: with optim.accumulate=2"),
        ("optim.layer_dropout=1", "optim.layer_dropout=1 should be a number from 0 to below 1"),
        ("optim.drop_path=-0.1", "optim.drop_path=-0.1 should be a number from 0 to below 1"),
        ("optim.no_decay=bias", "optim.no_decay=bias should be one of one_dim, names, none"),
        ("optim.optimizer=adam", "optim.optimizer=adam should be one of adamw, sgd"),
        ("optim.optimizer=sgd", "optim.optimizer=sgd needs optim.momentum: take optim=sgd_cosine"),
        ("pack=some", "pack=some should be auto, all or a number from 1"),
        ("pack=0", "pack=0 should be auto"),
        ("precision=half", "precision=half should be one of bf16, fp16, fp32"),
        ("device=cuda:7", r"device=cuda:7 is not here .*; there is cpu, or auto"),
        ("device=gpu", r"device=gpu is not here .*; there is cpu, or auto"),
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path, choice, message):
    with pytest.raises(ValueError, match=message):
        train.run(config(tmp_path, *choice.split()))


def test_a_batch_larger_than_the_set(tmp_path):
    train.run(config(tmp_path / "a", "optim.batch_size=500"))
    assert done(tmp_path / "a")["metrics"]["loss_last"] > 0
    with pytest.raises(ValueError, match=r"has 80 images, fewer than one batch of 500.*batch_size"):
        train.run(config(tmp_path / "b", "optim.batch_size=500", "optim.drop_last=true"))


def test_compilation_that_works_changes_nothing(tmp_path, monkeypatch):
    compiled, real = [], torch.compile

    def graphs(function, mode, **said):  # without code generation, which takes a minute
        compiled.append(mode)
        return real(function, backend="eager", **said)

    monkeypatch.setattr(torch, "compile", graphs)
    for name, mode in (("plain", "false"), ("true", "true"), ("mode", "reduce-overhead")):
        train.run(config(tmp_path / name, "method=lora", f"compile={mode}", "method.dropout=0.1"))
    a, *others = (folder(tmp_path / n) / "adapter.safetensors" for n in ("plain", "true", "mode"))
    assert compiled == [None, "reduce-overhead"]
    for b in others:
        assert a.parent.name == b.parent.name, "compile is no part of the identity"
        torch.testing.assert_close(load_file(a), load_file(b))


def test_a_compilation_that_fails_says_so_and_trains(tmp_path, monkeypatch, capsys):
    def broken(function, **said):
        def call(*inputs):
            function(*inputs)
            raise RuntimeError("no C++ compiler\nlong story")

        return call

    train.run(config(tmp_path / "plain", "method=full", "backbone=tiny_resnet"))
    monkeypatch.setattr(torch, "compile", broken)
    train.run(config(tmp_path / "broken", "method=full", "backbone=tiny_resnet", "compile=true"))
    said = capsys.readouterr().out
    assert "compile=True does not work here (RuntimeError: no C++ compiler): going on" in said
    a, b = (folder(tmp_path / n) / "adapter.safetensors" for n in ("plain", "broken"))
    assert a.read_bytes() == b.read_bytes(), "the attempt left a trace"


def torchrun(*choice: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "train.py", *TINY, *choice],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_processes_end_together_where_one_cannot_go_on(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    data = f"data_root={tmp_path}/data"
    for choice, said in (
        ([f"runs_dir={file}/runs", "method=lora"], "cannot write to"),
        ([f"runs_dir={tmp_path}/runs", "method=noah_supernet"], "a Supernet takes one process"),
    ):
        ended = torchrun(data, *choice)
        assert ended.returncode and said in ended.stderr


def test_two_processes_take_the_steps_of_one(tmp_path):
    """As torchrun starts them: uneven shares, in parts, with a penalty, clipping and an average."""
    choice = ["method=lava", "optim=sgd_cosine", "optim.lr=0.05", "optim.batch_size=27"]
    choice += ["optim.epochs=2", "optim.accumulate=2", "optim.ema=0.8", "optim.clip_norm=1"]
    train.run(config(tmp_path / "one", *choice))
    pair = torchrun(f"runs_dir={tmp_path}/two/runs", f"data_root={tmp_path}/two/data", *choice)
    assert pair.returncode == 0, pair.stderr
    assert pair.stdout.count("epoch 1/") == 1, "the first process alone speaks"
    one, two = done(tmp_path / "one"), done(tmp_path / "two")
    assert one["key"] == two["key"] and two["provenance"]["processes"] == 2
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    a, b = (load_file(folder(tmp_path / n) / "adapter.safetensors") for n in ("one", "two"))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
