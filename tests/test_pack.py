"""Several runs at once: each member's numbers are those of its solo run."""

import json
from functools import partial

import pytest
import torch
from conftest import TINY, applies, home, jitter, shallow, stackable, tiny
from safetensors.torch import load_file, save_file
from test_train import config as config_of
from test_train import ending_before, folder
from torch._C._functorch import is_batchedtensor as is_batched
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import peft
import train
from peft import record as records
from peft.batching import Batching
from peft.config import catalogue, plain
from peft.pack import Pack, Unstackable, why_not

CLOSE = {"atol": 2e-4, "rtol": 2e-3}  # of weights after training; a step alone agrees to 1e-5


def config(path, *overrides: str):
    return config_of(path, "pack=all", *overrides)


def starts_of(model: torch.nn.Module, count: int) -> list[dict]:
    own, trains = peft.adapter_state(model), {p.data_ptr() for p in model.parameters()}
    return [
        {name: t * (1 + 0.02 * k * (t.data_ptr() in trains)) for name, t in own.items()}
        for k in range(count)
    ]


FAST = ("lora", "ssf", "bitfit", "vpt_shallow", "vpt_deep")
CELLS = [
    pytest.param(b, m, marks=[] if b == home(m) or m in FAST else pytest.mark.full)
    for b in TINY
    for m in catalogue("method")
    if applies(b, m)
]


@pytest.mark.parametrize(("backbone", "method"), CELLS)
def test_a_step_of_a_pack_is_the_steps_of_its_members(backbone, method, images):
    """An operator without a batching rule would warn here, and a warning is an error."""
    shallow = {"backbone.model.depth": 2} if backbone == "tiny_vit" else {}
    model = jitter(tiny(backbone, method, **shallow)).eval()
    starts, labels = starts_of(model, 3), torch.tensor([0, 1])
    pack = Pack(model, model, starts, train.spared("one_dim"))
    logits, penalties = pack(images)
    (sum(cross_entropy(each, labels) for each in logits) + penalties.sum()).backward()
    for k, start in enumerate(starts):
        peft.load_adapter_state(model, start)
        model.zero_grad()
        alone, penalty = model(images), torch.zeros(()) + peft.penalty(model)
        (cross_entropy(alone, labels) + penalty).backward()
        close = 1e-5 * max(1.0, alone.abs().max().item())
        torch.testing.assert_close(logits[k], alone, atol=close, rtol=1e-5)
        torch.testing.assert_close(penalties[k], penalty, atol=1e-5, rtol=1e-5)
        for group, leaves in zip(pack.groups, pack.leaves[k], strict=True):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group.values()]
            if grads:
                expected = torch.cat([g.flatten() for g in grads])
                torch.testing.assert_close(leaves[0].grad, expected, atol=1e-4, rtol=1e-4)


QUICK = ("lora", "alore")  # the second unflattens, see peft/batching.py
COMPILED = [
    pytest.param(b, m, marks=[] if b == "tiny_vit" and m in QUICK else pytest.mark.full)
    for b in TINY
    for m in catalogue("method")
    # NOAH's supernet draws its sizes anew
    if applies(b, m) and (b == home(m) or m in FAST) and m != "noah_supernet"
]


@pytest.mark.parametrize(("backbone", "method"), COMPILED)
def test_a_pack_compiles_as_one_graph(backbone, method, images):
    """With dropout, and forth and back as without compiling."""
    torch.compiler.reset()
    model = stackable(jitter(tiny(backbone, method)))
    pack = Pack(model, model, starts_of(model, 3), train.spared("one_dim"))
    leaves = [leaf for k in pack.members for leaf in pack.trained(k)]

    def step() -> list[torch.Tensor]:
        torch.manual_seed(0)
        logits, penalties = pack(images)
        loss = logits.square().mean() + penalties.sum()
        return [logits, *torch.autograd.grad(loss, leaves)]

    plain = step()
    pack.forward = torch.compile(pack.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(), plain, atol=1e-4, rtol=1e-4)


def solo_and_packed(tmp_path, choices: list[list[str]]) -> list[tuple]:
    """(record, adapter) of every choice, alone and as a member."""
    for choice in choices:
        train.run(config(tmp_path / "solo", *choice))
    outcomes = train.run_pack([config(tmp_path / "pack", *choice) for choice in choices])
    pairs = []
    for choice, outcome in zip(choices, outcomes, strict=True):
        run = train.Run(config(tmp_path / "pack", *choice))
        assert outcome == records.read(run.folder / "record.json")["metrics"]["top1_last"]
        both = [run.folder, tmp_path / "solo" / run.folder.relative_to(tmp_path / "pack")]
        pairs.append(
            [
                (records.read(path / "record.json"), load_file(path / "adapter.safetensors"))
                for path in both
            ]
        )
    return pairs


@pytest.mark.parametrize(
    "common",
    [
        ["method=lora", "method.dropout=0.2", "optim.clip_norm=1"],
        ["method=rlrr", "optim.drop_path=0.1", "optim.no_decay=names"],
        ["method=linear"],
        ["method=full", "optim=sgd_cosine", "optim.layer_dropout=0.1"],
    ],
    ids=lambda common: common[0].removeprefix("method="),
)
def test_members_leave_the_records_of_their_solo_runs(tmp_path, common):
    rates = ("1e-3", "3e-3", "1e-2") if "full" not in common[0] else ("1e-3", "3e-3", "5e-3")
    choices = [
        [*common, f"optim.lr={lr}", f"optim.weight_decay={wd}"]
        for lr, wd in zip(rates, ("0", "1e-2", "1e-3"), strict=True)
    ]
    moved = []
    for (packed, adapter), (alone, expected) in solo_and_packed(tmp_path, choices):
        assert packed["provenance"]["pack"] == 3 and alone["provenance"]["pack"] == 1
        assert packed["key"] == alone["key"] and packed["config"] == alone["config"]
        torch.testing.assert_close(adapter, expected, **CLOSE)
        assert packed["metrics"] == pytest.approx(alone["metrics"], rel=1e-3, abs=3.2), (
            "more than one image of 32 apart"
        )
        moved.append(adapter)
    assert any((moved[0][name] - moved[2][name]).abs().max() > 1e-3 for name in moved[0])


def test_seeds_stack_over_a_backbone_with_weights_of_its_own(tmp_path):
    bare = peft.merge(peft.create("tiny_vit", num_classes=4))
    save_file(dict(bare.state_dict()), tmp_path / "w.safetensors")
    common = ["backbone.pretrained=true", f"weights={tmp_path}/w.safetensors", "method=lora"]
    pairs = solo_and_packed(tmp_path, [[*common, f"seed={seed}"] for seed in (1, 2)])
    for (packed, adapter), (alone, expected) in pairs:
        assert packed["seed"] == alone["seed"]
        torch.testing.assert_close(adapter, expected, **CLOSE)
    a, b = (member[0][1] for member in pairs)
    assert not torch.equal(a["blocks.0.attn.qkv.down"], b["blocks.0.attn.qkv.down"])


@pytest.mark.parametrize(
    ("common", "values"),
    [
        (["method=repadapter"], ["method.scale=0.1", "method.scale=1", "method.scale=5"]),
        (["method=lava", "optim.ema=0.8"], ["method.strength=0", "method.strength=0.5"]),
        (["method=lora", "method.dropout=0.1"], ["method.alpha=2", "method.alpha=16"]),
    ],
    ids=["scale", "strength", "alpha"],
)
def test_numbers_of_tuners_stack(tmp_path, common, values):
    """Learning rates may differ at the same time."""
    common = [*common, "optim=sgd_cosine", "optim.epochs=2", "optim.warmup_epochs=1"]
    choices = [[*common, v, f"optim.lr={lr}"] for v, lr in zip(values, (0.01, 0.02, 0.01))]
    states = []
    for (packed, adapter), (alone, expected) in solo_and_packed(tmp_path, choices):
        assert packed["provenance"]["pack"] == len(values) and packed["key"] == alone["key"]
        assert packed["variant"] == alone["variant"]
        torch.testing.assert_close(adapter, expected, atol=1e-5, rtol=1e-4)
        assert packed["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        states.append(adapter)
    assert any((states[0][name] - states[1][name]).abs().max() > 1e-3 for name in states[0])


def test_what_comes_before_the_first_tuner_runs_once_and_without_a_graph(images):
    model = tiny("tiny_vit", "lora")
    for block in (0, 1):  # as with layers=[2, 3, ...]
        attn = model.blocks[block].attn
        attn.qkv = attn.qkv.base
    seen = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, x, y, i=i: seen.append((i, is_batched(y), y.grad_fn)))
    starts = starts_of(model, 3)
    for members in (3, 1):
        pack = Pack(model, model, starts[:members], train.spared("one_dim"))
        seen.clear()
        logits, _ = pack(images)
        assert [i for i, *_ in seen] == list(range(6))
        for i, batched, graph in seen:
            assert batched == (members == 3 and i > 1)
            assert i > 1 or graph is None
        assert logits.requires_grad


def test_a_pack_that_diverges_says_each_members_rate(tmp_path):
    cfgs = [config(tmp_path, "method=full", f"optim.lr={lr}") for lr in ("1e12", "1e13")]
    lost = train.run_pack(cfgs)
    assert "optim.lr=1e+12" in str(lost[0]) and "optim.lr=1e+13" in str(lost[1])
    assert len(list(tmp_path.rglob("failure.json"))) == 2 and not list(tmp_path.rglob("record.*"))


def test_a_compiled_pack_may_lose_many_members(images, monkeypatch):
    """Each loss makes another graph, of which Dynamo by itself allows eight."""
    eager = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda f, mode, **said: eager(f, **said))
    model = tiny("tiny_vit", "bitfit", **shallow("tiny_vit"))
    pack = Pack(model, model, starts_of(model, 12), train.spared("one_dim"))
    optimizer = torch.optim.SGD(
        {"params": pack.trained(k), "lr": 0.1, "member": k} for k in pack.members
    )
    for k in range(11):
        assert pack.compile(True, images, torch.autocast("cpu", enabled=False)) is None
        assert len(pack(images)[0]) == 12 - k
        pack.drop(k, optimizer)
        assert pack.mode is False and pack.forward is pack.plain


def test_a_member_that_diverges_leaves_its_neighbours_alone(tmp_path):
    rates = ("1e-3", "1e12", "3e-3")
    cfgs = [config(tmp_path, "method=full", "optim.epochs=4", f"optim.lr={lr}") for lr in rates]
    first, lost, third = train.run_pack(cfgs)
    assert isinstance(lost, FloatingPointError) and "optim.lr=1e+12" in str(lost)
    failure = json.loads((train.Run(cfgs[1]).folder / "failure.json").read_text())
    assert failure["status"] == "failed" and "smaller" in failure["reason"]
    pair = [c.copy() for c in (cfgs[0], cfgs[2])]
    for cfg in pair:
        cfg.runs_dir = f"{tmp_path}/pair"
    assert train.run_pack(pair) == [first, third]
    for ours, theirs in zip((cfgs[0], cfgs[2]), pair, strict=True):
        a, b = (load_file(train.Run(c).folder / "adapter.safetensors") for c in (ours, theirs))
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("diverging", [False, True])
def test_a_pack_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path, monkeypatch, diverging):
    rates = ("1e-3", "1e12" if diverging else "2e-3", "3e-3")
    common = ["method=lora", "method.dropout=0.1", "optim.epochs=3", "checkpoint_seconds=0"]
    common += ["method=full"] if diverging else []

    def cfgs(name: str) -> list:
        return [config(tmp_path / name, *common, f"optim.lr={lr}") for lr in rates]

    if diverging:
        common.remove("method=lora"), common.remove("method.dropout=0.1")
    whole = train.run_pack(cfgs("whole"))
    with ending_before(12):
        assert all(isinstance(outcome, MemoryError) for outcome in train.run_pack(cfgs("cut")))
    real, steps = train.learning_rate, []
    monkeypatch.setattr(
        train, "learning_rate", lambda step, *rest: (steps.append(step), real(step, *rest))[1]
    )
    cut = train.run_pack(cfgs("cut"))
    assert steps[0] == 12, "it began again instead of going on"
    for a, b, one, two in zip(whole, cut, cfgs("whole"), cfgs("cut"), strict=True):
        if isinstance(a, Exception):
            assert str(a) == str(b)
            continue
        assert a == b
        ours, theirs = (train.Run(c).folder / "adapter.safetensors" for c in (one, two))
        assert ours.read_bytes() == theirs.read_bytes()
        assert not (theirs.parent / "state.pt").exists()


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (["optim.epochs=3"], "optim.epochs differs"),
        (["data_seed=1"], "data_seed differs"),
        (["method.rank=4"], "method.rank differs"),
        (["method=ssf"], "method.name differs|method.rank differs"),
        (["phase=grid"], "phase differs"),
        (["method.dropout=0.1"], "method.dropout differs"),
        (["seed=1"], "seed differs, and draws the weights of a backbone"),
        (["optim.lr=1", "optim.weight_decay=1", "device=cuda", "workers=7"], None),
        (["method.alpha=1", "compile=true", "grad_checkpointing=true"], None),
    ],
)
def test_what_cannot_be_stacked_names_the_key(tmp_path, other, key):
    cfgs = [config(tmp_path, "method=lora"), config(tmp_path, "method=lora", *other)]
    for form in (plain, lambda cfg: records.portable(plain(cfg))):
        reason = why_not([form(cfg) for cfg in cfgs])
        assert reason is None if key is None else any(k in reason for k in key.split("|"))
    if key is not None:
        with pytest.raises(ValueError, match=rf"these 2 runs cannot be stacked: ({key})"):
            train.run_pack(cfgs)
    assert not (tmp_path / "runs").exists()


def test_fp16_is_trained_alone(tmp_path):
    cfgs = [config(tmp_path, "precision=fp16", f"optim.lr={lr}") for lr in (1, 2)]
    assert "loss scale" in why_not([plain(cfg) for cfg in cfgs])


@pytest.mark.parametrize(
    ("error", "sizes"),
    [
        (torch.OutOfMemoryError("no memory"), [4, 2, 2]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), [4, 2, 2]),
        (Unstackable("x"), [4, 1, 1, 1, 1]),
    ],
)
def test_a_pack_that_does_not_work_is_trained_in_parts(tmp_path, monkeypatch, error, sizes):
    seen, real = [], train.Pack

    def small(model, net, starts, *args, **kwargs) -> Pack:
        seen.append(len(starts))
        if len(starts) == 4:
            raise error
        return real(model, net, starts, *args, **kwargs)

    monkeypatch.setattr(train, "Pack", small)
    cfgs = [config(tmp_path, "optim.epochs=1", f"optim.lr=1e-{k}") for k in range(2, 6)]
    assert all(isinstance(top1, float) for top1 in train.run_pack(cfgs)) and seen == sizes


def test_running_statistics_that_train_are_not_stacked():
    model = tiny("tiny_resnet", "full").train()
    with pytest.raises(Unstackable, match="running statistics of"):
        Pack(model, model, starts_of(model, 2), train.spared("one_dim"))
    Pack(model, model, starts_of(model, 1), train.spared("one_dim"))


def test_what_is_done_or_failed_does_not_hold_up_the_rest(tmp_path):
    cfgs = [config(tmp_path, "optim.epochs=1", f"optim.lr={lr}") for lr in (1e-2, 1e-3, 1e-3)]
    first = train.run(cfgs[0])
    stamp = (folder(tmp_path) / "record.json").stat().st_mtime_ns
    again, second, third = train.run_pack(cfgs)
    assert again == first and second == third, "the third is the second"
    assert (train.Run(cfgs[0]).folder / "record.json").stat().st_mtime_ns == stamp
    assert len(list(tmp_path.glob("runs/fake/fake/*"))) == 2


def test_a_masked_attention_is_folded_too():
    """As in shifted windows: one mask for all members, and one of each member's own."""
    q, k, v = torch.randn(3, 3, 4, 2, 5, 8, requires_grad=True)  # 3 members, 4 windows, 2 heads
    for mask, dim in ((torch.randn(1, 2, 5, 5), None), (torch.randn(3, 4, 1, 5, 5), 0)):

        def attend(q, k, v, mask):
            with Batching():
                return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        together = torch.func.vmap(attend, (0, 0, 0, dim))(q, k, v, mask)
        for i in range(3):
            own = mask if dim is None else mask[i]
            alone = scaled_dot_product_attention(q[i], k[i], v[i], attn_mask=own)
            torch.testing.assert_close(together[i], alone)
    assert torch.autograd.grad(together.sum(), q)[0].any()
