"""The method contract: every method yaml on every tiny backbone. A method is under test as soon as
its yaml exists."""

import contextlib
import copy
import functools
import re

import pytest
import timm
import torch
from conftest import CLASSES, TINY, applies, home, jitter, node, shallow, tiny

import peft
from peft.config import catalogue, plain
from peft.core import Tuner, WeightTuner
from peft.layers import Still
from peft.rlrr import RLRR
from peft.state import check_reached

METHODS = catalogue("method")
CELLS = [(backbone, method) for backbone in TINY for method in METHODS if applies(backbone, method)]
REFUSED = [
    (backbone, method) for backbone in TINY for method in METHODS if not applies(backbone, method)
]
SMALL_BEIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
cells = pytest.mark.parametrize(("backbone", "method"), CELLS)


@functools.cache
def _prototype(backbone: str, method: str) -> torch.nn.Module:
    return tiny(backbone, method)


def fresh(backbone: str, method: str) -> torch.nn.Module:
    return copy.deepcopy(_prototype(backbone, method))


@cells
def test_start_is_as_declared(backbone, method, images):
    model, bare = fresh(backbone, method).eval(), fresh(backbone, "linear").eval()
    declared = all(tuner.exact_at_init for tuner in peft.tuners(model).values())
    head = {name for name in bare.state_dict() if name in model.state_dict()}
    assert len(head) > 1 or peft.tuners(model), (
        "the two models share no tensor: nothing is compared"
    )
    if [m for m in model.state_dict() if m.startswith("head")] != [
        m for m in bare.state_dict() if m.startswith("head")
    ]:
        return  # a method that brings its own head starts elsewhere by definition
    gap = (model(images) - bare(images)).abs().max().item()
    assert (gap < 1e-5) == declared, (
        f"exact_at_init is {declared}, but the outputs differ by {gap:.1e}"
    )


@cells
def test_what_trains_gets_a_gradient_and_nothing_else_does(backbone, method, images):
    model = jitter(fresh(backbone, method)).train()
    torch.manual_seed(0)  # dropout and stochastic depth: the same whatever ran before
    before = {name: b.clone() for name, b in model.named_buffers()}
    (
        torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1])) + peft.penalty(model)
    ).backward()
    exempt = plain(node("method", method).get("no_gradient")) or {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, f"{name} is frozen"
        elif not any(re.fullmatch(pattern, name) for pattern in exempt):
            assert parameter.grad is not None and parameter.grad.any(), (
                f"{name} trains but gets no gradient"
            )
    changed = {name for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    kept = set(peft.adapter_state(model))
    assert {name.replace(".base", "") for name in changed} <= kept, (
        "a buffer that training changed is not in the adapter"
    )


@cells
def test_adapter_round_trip(backbone, method, images):
    source = jitter(fresh(backbone, method)).eval()
    state = {name: tensor.clone() for name, tensor in peft.adapter_state(source).items()}
    target = fresh(backbone, method).eval()
    if method != "full":
        assert not any(".base." in name for name in state)
    peft.load_adapter_state(target, state)
    assert torch.equal(source(images), target(images))
    assert not torch.equal(fresh(backbone, method).eval()(images), target(images)), (
        "jittering trainable tensors changed nothing"
    )


@pytest.mark.parametrize("method", METHODS)
def test_count_is_the_papers_formula(method):
    if not applies("tiny_vit", method):
        assert ("tiny_vit", method) in REFUSED
        return
    model, yaml = fresh("tiny_vit", method), node("method", method)
    counts = peft.count(model)
    numbers = {key: value for key, value in plain(yaml).items() if isinstance(value, (int, float))}
    expected = eval(
        str(yaml.formula),
        {"max": max, "min": min},
        {"d": 64, "L": 6, "backbone": counts["backbone"], **numbers},
    )
    assert counts["tuned"] == expected, f"{counts['tuned']} tuned, but {yaml.formula} = {expected}"


def test_dropout_that_would_have_no_effect_is_refused():
    """An owner that reads the weight, as timm's BEiT does, never calls what drops."""
    (tuner, *_) = peft.tuners(tiny("tiny_vit", "lora", dropout=0.5).train()).values()
    with pytest.raises(RuntimeError, match=r"reads its weight .* give method.dropout=0"):
        _ = tuner.weight
    assert tuner.eval().weight.shape == tuner.base.weight.shape


@cells
def test_merge(backbone, method, images):
    model = jitter(fresh(backbone, method)).eval()
    refusing = [
        path for path, tuner in peft.tuners(model).items() if type(tuner).merge is Tuner.merge
    ]
    merged = None
    try:
        merged = peft.merge(model)
    except TypeError as error:
        said = str(error)
    if merged is None:
        declared = node("method", method).get("no_merge") or {}
        assert refusing or node("backbone", backbone).family in declared, said
        assert any(path in said for path in peft.tuners(model)), f"it names no tuner: {said}"
        return
    assert not refusing
    assert (merged(images) - model(images)).abs().max() < 1e-5 * max(1, model(images).abs().max())
    double = copy.deepcopy(model).double()
    assert (peft.merge(double)(images.double()) - double(images.double())).abs().max() < 1e-9
    assert not any(isinstance(m, (Tuner, Still)) for m in merged.modules())
    if node("method", method).trainable == ["head"]:
        plain_keys = set(peft.merge(fresh(backbone, "linear")).state_dict())
        gained = set(merged.state_dict()) - plain_keys
        assert not plain_keys - set(merged.state_dict()) and all(
            name.endswith(".bias") for name in gained
        )
        assert not (gained and backbone == "tiny_vit"), f"a plain ViT gains nothing, yet {gained}"


@cells
def test_cheap_forward_equals_the_adapted_weight(backbone, method):
    model = jitter(fresh(backbone, method)).eval().double()
    seen = {}
    for path, tuner in peft.tuners(model).items():
        if isinstance(tuner, WeightTuner) and type(tuner).forward is not WeightTuner.forward:
            seen.setdefault((type(tuner), tuple(tuner.base.weight.shape)), (path, tuner))
    for path, tuner in seen.values():
        shape = tuner.base.weight.shape
        if isinstance(tuner.base, torch.nn.Conv2d):
            x = torch.randn(2, tuner.base.in_channels, 16, 16, dtype=torch.double)
        elif (
            isinstance(tuner.base, (torch.nn.BatchNorm2d, torch.nn.GroupNorm))
            or type(tuner.base).__name__ == "LayerNorm2d"
        ):
            x = torch.randn(2, shape[0], 8, 8, dtype=torch.double)
        else:
            x = torch.randn(2, 7, shape[-1], dtype=torch.double)
        grouped = getattr(tuner.base, "groups", 1) > 1  # where mixing all channels has no W'
        with contextlib.suppress(*[TypeError] * grouped):
            expected = WeightTuner.forward(tuner, x)
            torch.testing.assert_close(tuner(x), expected, atol=1e-9, rtol=1e-9, msg=path)


@cells
def test_a_copy_is_independent(backbone, method, images):
    model = fresh(backbone, method).eval()
    expected = model(images)
    jitter(copy.deepcopy(model))
    assert torch.equal(model(images), expected)


@cells
def test_autocast_is_close(backbone, method, images):
    model = jitter(fresh(backbone, method), 0.01).eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    full = model(images)
    assert (half.float() - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize(("backbone", "method"), REFUSED)
def test_what_does_not_apply_says_why(backbone, method):
    with pytest.raises(
        ValueError, match=f"{method} does not apply to .* backbones: .{{10,}}"
    ) as told:
        peft.create(backbone, method, num_classes=CLASSES)
    assert "its yaml places tuners on" not in str(told.value), "a reason, not only the fact"


@cells
def test_the_check_for_gradients_passes_and_changes_nothing(backbone, method):
    model, exempt = fresh(backbone, method).train(), node("method", method).get("no_gradient")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    dice = torch.get_rng_state()
    check_reached(model, 64, exempt or ())
    assert torch.equal(torch.get_rng_state(), dice) and model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_tensor_without_gradient_is_named():
    """BEiT keeps the biases of q and v apart and never reads qkv's, so a shift there is dead."""
    model = timm.create_model("beit_base_patch16_224", **SMALL_BEIT)
    model.sites = {"qkv": r"blocks\.\d+\.attn\.qkv", "head": "head", "block": r"blocks\.\d+"}
    peft.attach(model, [{"sites": ["qkv"], "tuner": RLRR.over}])
    with pytest.raises(
        ValueError,
        match=r"reaches 2 of 8 trainable .* blocks.0.attn.qkv.shift, blocks.1.attn.qkv.shift",
    ):
        check_reached(model, 32)
    check_reached(model, 32, [r".*\.shift"])


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("lora", {"rank": 65}, r"LoRA at blocks.0.attn.qkv: rank=65 must lie in 1..64, .* 64 x 64"),
        ("lora_all", {"sites": ["norm"]}, r"norm1: a LayerNorm has no matrix or kernel to adapt"),
        ("lora_all", {"sites": ["conv9"]}, r"no site 'conv9'; did you mean conv\?"),
        ("lora_all", {"sites": []}, r"sites=\[\] names no site; there is: attn, block"),
        ("lora", {"of": 5}, r"no key 'of'"),
        ("rlrr", {"rank": 65}, r"RLRR at blocks.0.attn.proj: rank=65 must be 1 to 64"),
        ("rlrr", {"sides": "up"}, r"sides='up': there is both, left, right"),
        ("rlrr", {"sides": "left", "rank": 2}, r"rescales W at rank 1"),
        ("rlrr", {"residual": False, "times_weight": False}, r"nothing is left of W"),
        ("rlrr", {"init": "ones"}, r"init='ones': there is rlrr, normal, uniform, constant, zero"),
        ("rlrr", {"layers": 7}, r"layers=7 does not fit 6 blocks"),
        ("rlrr", {"mha": False, "ffn": False, "norm": False}, r"every placement of method rlrr is"),
        ("alore", {"experts": 5}, r"experts=5 do not divide the width 64"),
        ("alore", {"experts": 0}, r"experts=0 must be at least 1"),
        ("alore", {"rank": 17}, r"rank=17 must be 1 to 16: width 64 over 4 experts"),
        ("lava", {"ortho": "x"}, r"ortho='x' names no factor of a Linear: u, v or both"),
        ("superlora", {"groups": 10**9}, r"groups=1000000000 leaves a group .* of 49152 numbers"),
        ("superlora", {"rank": 223}, r"rank=223 must be 1 to 222"),
        ("superlora", {"order": 1}, r"order=1 must be at least 2"),
        ("superlora_projected", {"ratio": 0.0}, r"ratio=0.0 must lie above 0"),
        (
            "adapter",
            {"hidden": 65},
            r"Adapter at blocks.0.mlp: hidden=65 must lie between 1 and 64",
        ),
        ("adapter_plus", {"method.drop_path": 1.0}, r"drop_path=1.0 must be from 0 to below 1"),
        ("repadapter", {"groups": 3}, r"groups=3 must divide hidden=8 and the width 64"),
        ("compacter", {"n": 5}, r"n=5 divides not both sides of a 64 x 24"),
        ("partial", {"layers": -9}, r"layers=-9 does not fit 6 blocks"),
        ("linear", {"trainable": []}, r"nothing would train"),
    ],
)
def test_a_bad_value_is_named_with_what_there_is(method, values, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        peft.create("tiny_vit", method, num_classes=CLASSES, **values)


def test_vera_takes_any_rank_and_one_of_many_dimensions_too():
    """VeRA's projections are noise, not factors that train; CP factors cover small kernels."""
    with torch.device("meta"):
        assert peft.count(peft.create("tiny_vit", "vera", rank=500))["tuned"] == 6 * 2 * (500 + 64)
        cubic = peft.create("tiny_vit", "superlora", order=3, rank=60)  # sides of 37
    assert peft.count(cubic)["tuned"] == 60 * 3 * 37


@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_a_graph_break(method, images):
    torch._dynamo.reset()
    model = jitter(tiny(home(method), method, **shallow(home(method)))).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)
