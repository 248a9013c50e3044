"""What only a GPU can show: `make test-gpu`, which does not hide it. Skipped without one."""

import pytest
import torch
from conftest import home, jitter, tiny
from safetensors.torch import load_file
from test_train import config, done, ending_before, folder
from torch.nn.functional import cross_entropy

import peft
import train
from peft.config import catalogue
from peft.pack import Pack
from peft.speed import fastest_pack

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
DEVICE, METHODS = "cuda", catalogue("method")


def on_gpu(path, *overrides: str):
    return config(path, f"device={DEVICE}", *overrides)


def gradients(method: str, images: torch.Tensor, device: str) -> list[torch.Tensor]:
    """Logits and the gradients of all that trains, in fp32, then on the CPU."""
    model = jitter(tiny(home(method), method)).eval().to(device)
    labels = torch.tensor([0, 1], device=device)
    torch.manual_seed(0)
    logits = model(images.to(device))
    (cross_entropy(logits, labels) + peft.penalty(model)).backward()
    return [
        logits.detach().cpu(),
        *(p.grad.cpu() for p in model.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_cpu(method, images, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for ours, theirs in zip(
        gradients(method, images, DEVICE), gradients(method, images, "cpu"), strict=True
    ):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm() + 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["rlrr", "lora", "lava", "superlora_projected", "alore"])
def test_mixed_precision_trains_to_the_loss_of_fp32(tmp_path, method, precision):
    losses = {}
    for kind in ("fp32", precision):
        train.run(on_gpu(tmp_path / kind, f"method={method}", f"precision={kind}", "optim.lr=1e-3"))
        record = done(tmp_path / kind)
        assert record["provenance"]["precision"] == kind
        assert record["device"] == torch.cuda.get_device_name() and record["peak_memory_bytes"] > 0
        losses[kind] = record["metrics"]["loss_last"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_crash_resumes(tmp_path, precision):
    choice = ["method=lora", "method.dropout=0.1", "checkpoint_seconds=0", f"precision={precision}"]
    train.run(on_gpu(tmp_path / "whole", *choice))
    with ending_before(7), pytest.raises(MemoryError):
        train.run(on_gpu(tmp_path / "cut", *choice))
    train.run(on_gpu(tmp_path / "cut", *choice))
    whole, cut = (load_file(folder(tmp_path / n) / "adapter.safetensors") for n in ("whole", "cut"))
    torch.testing.assert_close(cut, whole, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("compiled", ["false", "true", "reduce-overhead"])
@pytest.mark.parametrize("members", [1, 3])
def test_packs_and_compilation_change_no_number(tmp_path, capsys, members, compiled):
    rates = [f"optim.lr={rate}" for rate in (1e-3, 2e-3, 3e-3)[:members]]
    for rate in rates:
        train.run(on_gpu(tmp_path / "plain", "method=lora", rate))
    losses = [r["metrics"]["loss_last"] for r in of(tmp_path / "plain")]
    choice = ["method=lora", "pack=all", f"compile={compiled}"]
    packed = train.run_pack([on_gpu(tmp_path / "pack", *choice, rate) for rate in rates])
    assert "does not work" not in capsys.readouterr().out
    assert all(isinstance(outcome, float) for outcome in packed)
    ours = [r["metrics"]["loss_last"] for r in of(tmp_path / "pack")]
    assert ours == pytest.approx(losses, rel=0.02)


def of(path) -> list[dict]:
    """The records below, by learning rate."""
    found = [peft.record.read(p) for p in path.glob("runs/fake/fake/*/record.json")]
    return sorted(found, key=lambda record: record["config"]["optim"]["lr"])


def test_the_size_of_a_pack_fits_and_pays():
    half = torch.autocast("cuda", torch.bfloat16)
    model = tiny("tiny_vit", "lora").to(DEVICE)
    assert 2 <= fastest_pack(model, torch.Size([8, 3, 64, 64]), half, 8) <= 8


def test_a_pack_that_does_not_fit_is_trained_in_halves(tmp_path, monkeypatch, capsys):
    real = Pack.__call__

    def hungry(pack: Pack, images: torch.Tensor):
        if len(pack.members) > 1:
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)  # CUDA's own words
        return real(pack, images)

    monkeypatch.setattr(Pack, "__call__", hungry)
    rates = ("optim.lr=1e-3", "optim.lr=2e-3")
    outcomes = train.run_pack([on_gpu(tmp_path, "method=lora", "pack=all", r) for r in rates])
    assert "a pack of 2 does not work (CUDA out of memory" in capsys.readouterr().out
    assert all(isinstance(outcome, float) for outcome in outcomes)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
def test_a_step_waits_for_nothing(images):
    """CUDA's own check, beside the pretended device's."""
    for method in ("rlrr", "lava", "superlora_projected", "vpt_deep"):
        model = tiny("tiny_vit", method).train().to(DEVICE)
        start = {name: t.clone() for name, t in peft.adapter_state(model).items()}
        pack = Pack(model, model, [start] * 2, train.spared("one_dim"))
        x = images.to(DEVICE)
        try:
            torch.cuda.set_sync_debug_mode("error")
            logits, penalties = pack(x)
            (logits.sum() + penalties.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
