"""What released code does and ours does when told: timm's rates, tests every so many epochs, heads
that do not start at zero, names that are spared weight decay."""

from functools import partial

import pytest
import timm
import torch
from conftest import tiny
from test_train import config, done, folder
from timm.scheduler import CosineLRScheduler

import train
from peft.backbone import build_backbone, start_head
from peft.config import compose
from peft.optimiser import spared


@pytest.mark.parametrize(("schedule", "told"), [("timm_epoch", 0), ("timm_late", 1)])
def test_timms_rates_are_timms(tmp_path, schedule, told):
    """Against its own scheduler, in a loop as the released ones: step(epoch) when an epoch is over,
    or step(epoch + 1)."""
    values = ["optim.epochs=20", "optim.lr=3e-3", "optim.min_lr=1e-5", "optim.warmup_lr=1e-6"]
    cfg = config(tmp_path, f"optim.schedule={schedule}", "optim.warmup_epochs=5", *values)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    timms = CosineLRScheduler(optimizer, t_initial=20, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(20):
        ours = [train.learning_rate(step, 7, cfg.optim) for step in range(7 * epoch, 7 * epoch + 7)]
        assert ours == pytest.approx([optimizer.param_groups[0]["lr"]] * 7)
        timms.step(epoch + 1 - told)
    with pytest.raises(ValueError, match=r"restart_epochs goes with optim.schedule=step"):
        train.run(config(tmp_path, f"optim.schedule={schedule}", "optim.restart_epochs=2"))


def test_bolts_rates_are_those_of_its_closed_form(tmp_path):
    """Eight epochs with a warm-up of four, by hand: from start to rate in three steps, then a
    cosine over four epochs; the first two epochs are alike, as the scheduler is told late."""
    cfg = config(
        tmp_path,
        *("optim.schedule=bolts_late", "optim.epochs=8", "optim.warmup_epochs=4"),
        *("optim.lr=1e-3", "optim.warmup_lr=1e-5", "optim.min_lr=1e-6"),
    )
    ours = [train.learning_rate(5 * epoch, 5, cfg.optim) for epoch in range(8)]
    cosine = [1e-6 + 9.99e-4 * (1 + turn) / 2 for turn in (1, 0.5**0.5, 0)]
    assert ours == pytest.approx([1e-5, 1e-5, 3.4e-4, 6.7e-4, 1e-3, *cosine])


def test_a_test_set_is_asked_as_often_as_told(tmp_path):
    choice = ["protocol=vtab_peek", "preset=mini", "image_size=32", "optim.epochs=5"]
    train.run(config(tmp_path, *choice, "optim.warmup_epochs=1", "protocol.peek_every=2"))
    lines = (folder(tmp_path) / "log.csv").read_text().splitlines()
    asked = [line.rpartition(",")[2] for line in lines]
    assert asked[0] == "top1" and [bool(a) for a in asked[1:]] == [False, True, False, True, True]
    best = max(float(a) for a in asked[1:] if a)
    assert done(tmp_path)["metrics"]["top1_best"] == best


def test_the_head_starts_as_told():
    starts = {
        init: build_backbone(
            partial(timm.create_model, "test_vit"),
            {"head": "head"},
            num_classes=500,
            head_init=init,
        ).head
        for init in ("zero", "linear", "normal_002", "kaiming_out")
    }
    deviations = {init: head.weight.std().item() for init, head in starts.items()}
    assert deviations == pytest.approx(  # d = 64: uniform to 1/8, and sqrt(2 / 500)
        {"zero": 0, "linear": 3**-0.5 / 8, "normal_002": 0.02, "kaiming_out": 0.0632}, rel=0.05
    )
    biased = [init for init, head in starts.items() if head.bias.any()]
    assert biased == ["linear"]
    with pytest.raises(ValueError, match="head_init=ones: there is zero, normal_002"):
        start_head(starts["zero"], "ones")


def test_what_a_method_touches_is_told_without_a_checkpoint(capsys):
    """Neither the hub nor a file of weights is asked."""
    for backbone, tuned in (("vit_b16_mocov3_in1k", "294,912"), ("resnet18_in1k", "")):
        cfg = compose("train", [f"backbone={backbone}", "method=lora", "dataset=vtab/pets"])
        cfg.info = True
        assert train.run(cfg) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"lora on {backbone}, 37 classes") and f"tuned {tuned}" in said


def test_what_rlrrs_rule_spares():
    """Its code: names with bias or norm in them. It calls the shift of a layer shift_bias, and the
    patches' scale and shift otherwise."""
    model = tiny("tiny_vit", "rlrr")
    rule = spared("names")
    found = {n for n, p in model.named_parameters() if p.requires_grad and rule(n, p)}
    named = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in named - found if not n.endswith(("row", "col"))} == {
        "patch_embed.proj.gamma",
        "patch_embed.proj.beta",
        "head.weight",
    }
    assert any(n.endswith("qkv.shift") for n in found) and "head.bias" in found
