"""What a GPU would refuse or wait for, found without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, TINY, applies, home, stackable, tiny
from test_train import config, done, ending_before, folder
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from peft.config import catalogue
from peft.pack import Pack
from peft.state import adapter_state

# Once at the start or end of a run or a checkpoint, and not for every step.
RARE = {"_prepare", "save_state", "resume", "evaluate"}


def test_runs_on_a_device_of_its_own_are_those_on_the_cpu(tmp_path):
    """Interrupted and taken up again; no step in them keeps the host waiting, only the end of each
    of the two epochs does."""
    script = Path(__file__).parent / "pretend.py"
    child = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=True
    )
    told = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 7
    for trial in told:
        for ours, theirs in zip(trial["pretend"], trial["cpu"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), trial["trial"]
        often = [stack[-3:] for stack in trial["waits"] if not RARE & set(stack)]
        assert often == [["fit", "tolist", "waited"]] * 2, trial["trial"]
        assert any("resume" in stack for stack in trial["waits"]), "copies would not have been seen"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["rlrr", "lava", "superlora_projected"])
def test_mixed_precision_trains_to_the_loss_of_fp32(tmp_path, monkeypatch, method, precision):
    """On the CPU, which trains in fp32 unless it is told to take autocast, and with fp16 the scaled
    loss, as a GPU does; interrupted once."""
    choice = [f"method={method}", "optim.clip_norm=1", "checkpoint_seconds=0"]
    train.run(config(tmp_path / "fp32", *choice))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    monkeypatch.setattr(train, "autocast_of", lambda *_: torch.autocast("cpu", kind, enabled=True))
    with ending_before(7), pytest.raises(MemoryError):
        train.run(config(tmp_path / "half", *choice, f"precision={precision}"))
    state = torch.load(folder(tmp_path / "half") / "state.pt", weights_only=True)
    assert bool(state["scaler"]) == (precision == "fp16")
    train.run(config(tmp_path / "half", *choice, f"precision={precision}"))
    ours, theirs = done(tmp_path / "half"), done(tmp_path / "fp32")
    assert ours["provenance"]["precision"] == precision
    loss = theirs["metrics"]["loss_last"]
    assert ours["metrics"]["loss_last"] != loss
    assert ours["metrics"]["loss_last"] == pytest.approx(loss, rel=0.02)


@pytest.fixture
def half(monkeypatch):
    """bf16 autocast for a GPU that is not there."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    return torch.autocast("cuda", torch.bfloat16)


def hollow(model: nn.Module) -> nn.Module:
    """The model with tensors on "cuda" that have no content."""
    made = {t: torch.empty_like(t, device="cuda") for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(made[p], p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made[buffer]
    return model


CELLS = [(b, m) for b in TINY for m in catalogue("method") if applies(b, m)]


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        pytest.param(b, m, marks=[] if b == home(m) else pytest.mark.full)
        for b, m in CELLS
        if m != "noah_supernet"  # reads numbers that were drawn
    ],
)
def test_a_pack_in_half_precision_keeps_it(backbone, method, half):
    """In every module as its solo run does, on tensors that refuse another device and another
    type."""
    found, inside, now = [], [], {}
    model = tiny(backbone, method)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stackable(hollow(model))
        images, start = torch.empty(2, 3, 64, 64, device="cuda"), adapter_state(model)
        for name, module in model.named_modules():

            def note(_, __, out, name=name) -> None:
                now[name] = getattr(out, "dtype", None)

            module.register_forward_hook(note)
        for members in (1, 3):
            pack = Pack(model, model, [start] * members, lambda name, p: p.dim() < 2)
            with half:
                logits, penalties = pack(images)
            assert logits.shape == (members, 2, CLASSES) and penalties.shape == (members,)
            found.append((logits.dtype, penalties.dtype))
            inside.append(dict(now))
    assert set(found) == {(torch.bfloat16, torch.float32)}
    assert len(inside[0]) > 2 and inside[0] == inside[1]


def test_fake_tensors_refuse_another_device():
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"two (different )?devices"):
        torch.zeros(2, device="cuda") + torch.zeros(2)
