"""How many runs train at once and whether their step is compiled: measured, and told."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import home, jitter, shallow, tiny
from test_pack import config, starts_of
from test_train import done

import peft
import train
from peft import record as records
from peft import speed
from peft.config import catalogue
from peft.memory import out_of_memory
from peft.pack import Pack
from peft.speed import compiled, fastest_pack, largest

OFF = torch.autocast("cpu", enabled=False)


def test_the_size_of_a_pack_is_measured():
    """Doubled while it pays and fits, then evened out."""

    def costs(*seconds: float):
        def of(size: int) -> float:
            tried.append(size)
            if len(tried) > len(seconds):
                raise torch.OutOfMemoryError("full")
            return seconds[len(tried) - 1]

        return of

    for seconds, most, sizes, chosen in [
        ((1, 1.1, 1), 35, [1, 2, 4], 1),
        ((1, 1.1, 0.7, 0.4, 0.5, 0.39), 35, [1, 2, 4, 8, 16, 32], 7),
        ((1, 0.6, 0.4, 0.3, 0.28), 35, [1, 2, 4, 8, 16, 32], 12),
        ((1, 0.6, 0.59, 0.58), 7, [1, 2, 4, 7], 2),
        ((1, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05), 35, [1, 2, 4, 8, 16, 32, 35], 35),
        ((1,), 9, [1, 2], 1),
    ]:
        tried: list[int] = []
        assert largest(costs(*seconds), most) == chosen and tried == sizes
    cfgs = [config(Path("x"), "pack=auto", f"optim.lr={lr}") for lr in (1, 2)]
    runs, cpu = [train.Run(cfg) for cfg in cfgs], torch.device("cpu")
    assert train.pack_size(runs, cpu) == 1
    for run, asked in ((runs[0], "all"), (runs[0], "7"), (runs[0], 1)):
        run.cfg.pack = asked
        assert train.pack_size(runs, cpu) == {"all": 2, "7": 7, 1: 1}[asked]
    runs[0].cfg.pack, runs[0].cfg.grad_checkpointing = "all", True
    assert train.pack_size(runs, cpu) == 1, "recomputation does not stack"


@pytest.mark.parametrize(
    ("words", "full"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_memory_that_ends_is_told_by_its_words(words, full):
    assert out_of_memory(RuntimeError(words)) is full


def test_a_pack_is_tried_on_blank_images():
    model = tiny("tiny_vit", "lora")
    before = {name: t.clone() for name, t in peft.adapter_state(model).items()}
    assert fastest_pack(model, torch.Size([2, 3, 32, 32]), OFF, 3) in (1, 2, 3)
    after = peft.adapter_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_does_not_stack_is_tried_and_told(capsys):
    model = tiny("tiny_vit", "mlp4")
    assert fastest_pack(model, torch.Size([2, 3, 32, 32]), OFF, 3) == 1
    said = capsys.readouterr().out
    assert "a pack of 2 does not work (the running statistics of head" in said


@pytest.fixture
def graphs(monkeypatch) -> list[tuple]:
    """Stands in for code generation, which takes a minute: what came through which graph."""
    seen, real = [], torch.compile

    def compile(function, mode, **said):
        inner = real(function, backend="aot_eager", **said)

        def graph(*given):
            seen.append((mode, len(given[-1])))
            return inner(*given)

        return graph

    monkeypatch.setattr(torch, "compile", compile)
    return seen


def test_a_compiled_pack_takes_the_smaller_last_batch(tmp_path, capsys, graphs):
    """80 images in batches of 24: a graph of their own would cost the last 8 more than it saves."""
    rates = ("optim.lr=1e-3", "optim.lr=2e-3")
    both = ["method=vpt_deep", "optim.batch_size=24", "pack=all"]
    plain = train.run_pack([config(tmp_path / "plain", *both, r) for r in rates])
    chosen = [config(tmp_path / "graphs", *both, "compile=true", r) for r in rates]
    assert train.run_pack(chosen) == plain
    assert "does not work" not in capsys.readouterr().out
    assert set(graphs) == {(None, 24)}
    of = [records.read(path) for path in (tmp_path / "graphs").rglob("record.json")]
    assert [record["provenance"]["compiled"] for record in of] == [True, True]


class Batches:
    """What `compiled` asks of a loader: here one that says that it is on a GPU."""

    device = torch.device("cuda")

    def epoch(self):
        yield torch.zeros(4, 3, 32, 32), torch.zeros(4)


def chosen(
    monkeypatch, seconds: list[float], *overrides: str, members: int = 1, method: str = "lora"
) -> bool | str:
    """What `compile=auto` makes of a pack whose 3,200 steps take so long, before and after."""
    monkeypatch.setattr(speed, "step_seconds", lambda *_: seconds.pop(0))
    model = tiny("tiny_vit", method).train()
    pack = Pack(model, model, starts_of(model, members), train.spared("one_dim"))
    compiled(pack, config(Path("x"), *overrides), Batches(), OFF, 3200)
    assert (pack.forward is pack.plain) == (not pack.mode) and not seconds
    return pack.mode


def test_auto_compiles_what_takes_long(monkeypatch, capsys, graphs):
    auto = partial(chosen, monkeypatch)
    assert auto([0.01]) is False and not graphs, "half a minute in all"
    assert auto([0.03, 0.01]) == "reduce-overhead"
    assert "compiled: 10 ms a step instead of 30" in capsys.readouterr().out
    assert auto([0.01, 0.005], "optim.accumulate=2") is True, "the parts of a batch share gradients"
    assert auto([0.1, 0.06], members=2) is True
    assert auto([0.1, 0.097], members=2) is False, "no faster"
    assert graphs
    assert auto([], method="noah_supernet") is False, "it draws a network for every step"


def test_auto_leaves_a_cpu_alone(tmp_path, graphs, monkeypatch):
    monkeypatch.setattr(speed, "LONG", 0)
    train.run(config(tmp_path, "method=lora", "compile=auto"))
    assert not graphs and done(tmp_path)["provenance"]["compiled"] is False


def test_auto_goes_on_plainly_where_compiling_fails(monkeypatch, capsys):
    def broken(*given):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **said: broken)
    assert chosen(monkeypatch, [0.1]) is False
    assert "compile=reduce-overhead does not work here (RuntimeError: no" in capsys.readouterr().out


def test_parts_of_a_batch_share_a_graph(graphs):
    """21, 21 and 22 of 64 images; 8 of 1,000 are left at the end."""
    model = tiny("tiny_vit", "lora").train()
    pack = Pack(model, model, starts_of(model, 2), train.spared("one_dim"))
    assert pack.compile(True, torch.zeros(4, 3, 32, 32), OFF) is None
    graphs.clear()
    for size in (3, 4, 5, 6):
        pack(torch.zeros(size, 3, 32, 32))
    assert graphs == [(None, 4), (None, 5)]


def test_a_pack_that_loses_a_member_is_compiled_again(tmp_path, graphs):
    rates = [f"optim.lr={rate}" for rate in ("1e-3", "1e12", "3e-3")]
    both = ["method=full", "optim.epochs=3", "pack=all"]
    plain = train.run_pack([config(tmp_path / "plain", *both, r) for r in rates])
    ours = train.run_pack([config(tmp_path / "graphs", *both, "compile=true", r) for r in rates])
    assert [ours[0], ours[2]] == [plain[0], plain[2]]
    assert isinstance(ours[1], FloatingPointError)
    of = [records.read(path) for path in (tmp_path / "graphs").rglob("record.json")]
    assert [record["provenance"]["compiled"] for record in of] == [True, True]


def test_a_run_that_graphs_leave_no_memory_for_goes_on_without(tmp_path, monkeypatch, capsys):
    def short(runs, device):
        if runs[0].cfg.compile:
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise ValueError("it came to plain steps")

    monkeypatch.setattr(train, "train", short)
    run = train.Run(config(tmp_path, "method=lora", "compile=auto"))
    run.prepare()
    outcome = train.attempt([run], torch.device("cuda"))[run.folder]
    assert str(outcome) == "it came to plain steps"
    assert "(CUDA out of memory): going on without compiling" in capsys.readouterr().out


def test_a_trial_leaves_no_trace():
    model = tiny("tiny_resnet", "full").train()  # its statistics train along
    pack = Pack(model, model, starts_of(model, 1), train.spared("one_dim"))
    before = {name: t.clone() for name, t in peft.adapter_state(model).items()}
    images, stream = torch.randn(4, 3, 32, 32), torch.get_rng_state()
    with pack.trial(images, OFF) as step:
        step()
        torch.rand(1)  # as dropout would
        assert any(not torch.equal(t, before[n]) for n, t in peft.adapter_state(model).items())
    assert all(torch.equal(t, before[n]) for n, t in peft.adapter_state(model).items())
    assert all(leaf.grad is None for leaf in pack.trained(0))
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.full  # half a minute each
@pytest.mark.parametrize("method", catalogue("method"))
def test_generated_code_computes_what_a_pack_does(method, images):
    """A GPU's default for long runs: inductor's own code, here for the CPU."""
    model = jitter(tiny(home(method), method, **shallow(home(method)))).eval()
    pack = Pack(model, model, starts_of(model, 2), train.spared("one_dim"))

    def numbers() -> list[torch.Tensor]:
        logits, penalties = pack(images)
        leaves = [leaf for k in pack.members for leaf in pack.trained(k)]
        loss = logits.logsumexp(2).sum() + penalties.sum()
        return [logits.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]

    plain = numbers()
    assert pack.compile(True, images, OFF) is None
    for ours, theirs in zip(numbers(), plain, strict=True):
        if theirs is not None:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.full
@pytest.mark.parametrize("members", [1, 2])
def test_generated_code_draws_dropout_as_plain_steps_do(members):
    """Else a measured time would decide about a number."""
    model = tiny("tiny_vit", "lora", **shallow("tiny_vit"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = jitter(model).train()
    pack = Pack(model, model, starts_of(model, members), train.spared("one_dim"))
    images, seen = torch.randn(4, 3, 32, 32), []
    for compiling in (False, True):
        if compiling:
            assert pack.compile(True, images, OFF) is None
        torch.manual_seed(1)
        seen.append([pack(images)[0].detach() for _ in range(2)])
    (first, second), ours = seen
    assert (first - second).abs().max() > 1e-3, "dropout is drawn anew"
    torch.testing.assert_close(ours, [first, second], atol=1e-5, rtol=1e-4)
