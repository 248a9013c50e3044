"""Adapters against literal implementations of their equations, in float64 to
1e-9, with one case per method small enough to compute by hand: the same misreading must not sit on
both sides."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import jitter, node, tiny
from reference import bottleneck, compacter, convpass
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn

import peft
from peft.adapter import Adapter, AdapterPlus, AdaptFormer, Parallel
from peft.arc import ARC
from peft.compacter import Compacter
from peft.config import plain
from peft.conv_adapter import ConvAdapter
from peft.convpass import Bypass, Convpass
from peft.mlp_head import MLPHead
from peft.prompt import Prompts, SwinPrompts
from peft.repadapter import RepAdapter, RepAdapter2d
from peft.res_tuning import ResAdapter

D = 8


def moved(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with every tensor away from its start, norms and statistics
    included."""
    generator = torch.Generator().manual_seed(5)
    module = module.double().eval()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.double))
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6), dtype=torch.double)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def arrays(module: nn.Module, *names: str) -> list[np.ndarray]:
    return [array(module.get_parameter(name)) for name in names]


def bottleneck_of(adapter: nn.Module) -> list[np.ndarray]:
    return arrays(adapter, "down.weight", "down.bias", "up.weight", "up.bias")


def on_arrays(function):
    """A function of tensors as a function of arrays."""
    return lambda x: array(function(torch.from_numpy(np.ascontiguousarray(x))))


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(array(ours), theirs, rtol=1e-9, atol=1e-9)


def set_to(module: nn.Module, **tensors) -> None:
    with torch.no_grad():
        for name, value in tensors.items():
            parameter = module.get_parameter(name.replace("__", "."))
            parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype).reshape(parameter.shape))


def identity(width: int) -> nn.Linear:
    """A base whose output is its input."""
    layer = nn.Linear(width, width).double()
    set_to(layer, weight=torch.eye(width), bias=torch.zeros(width))
    return layer


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


def vit_block(**kwargs) -> Block:
    return moved(Block(D, num_heads=2, qkv_bias=True, **kwargs))


# --- bottlenecks ----------------------------------------------------------------------------------


def test_bottleneck_by_hand():
    # h = (1, 2): D h + b_D = 1 + 2 - 1 = 2, ReLU 2; U 2 + b_U = (6, -2) + (0.5, 0); h + that =
    # (7.5, 0). Beside the base at s = 0.1: (1.65, 1.8)
    weights = {
        "adapter__down__weight": [1, 1],
        "adapter__down__bias": -1,
        "adapter__up__weight": [3, -1],
        "adapter__up__bias": [0.5, 0],
    }
    h = torch.tensor([[1.0, 2.0]], dtype=torch.double)
    for tuner, expected in (
        (Adapter(identity(2), 1, "relu"), [7.5, 0]),
        (Parallel(identity(2), 1, 0.1), [1.65, 1.8]),
    ):
        tuner = tuner.double().eval()
        set_to(tuner, **weights)
        close(tuner(h), np.array([expected]))
    assert bottleneck.adapter(array(h), bottleneck_of(tuner.adapter), "relu").tolist() == [
        [7.5, 0.0]
    ]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu"])
def test_adapter(activation):
    tuner, x = moved(Adapter(mlp(), 3, activation, dropout=0.1)), values(2, 5, D)
    close(
        tuner(x), bottleneck.adapter(array(tuner.base(x)), bottleneck_of(tuner.adapter), activation)
    )


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_adaptformer_reads_the_stream_before_the_norm(layer_scale):
    block = vit_block(init_values=layer_scale)
    tuner, x = moved(AdaptFormer(block, 3, scale=0.1)), values(2, 5, D)
    attention = on_arrays(lambda x: block.ls1(block.attn(block.norm1(x))))
    feed = on_arrays(lambda x: block.ls2(block.mlp(x)))
    close(
        tuner(x),
        bottleneck.adaptformer(
            array(x), attention, on_arrays(block.norm2), feed, bottleneck_of(tuner.adapter), 0.1
        ),
    )


def test_adapter_plus():
    tuner, x = moved(AdapterPlus(vit_block(), 3)), values(2, 5, D)
    close(
        tuner(x),
        bottleneck.adapter_plus(
            array(tuner.base(x)), bottleneck_of(tuner.adapter), array(tuner.scale)
        ),
    )
    # by hand: a GELU at 40 is 40 to the last bit, so h = (1, 2) becomes h + s * (3 * 40, 0) with s
    # = (2, 1)
    tuner = AdapterPlus(identity(2), 1).double().eval()
    set_to(tuner, adapter__down__weight=[40, 0], adapter__up__weight=[3, 0], scale=[2, 1])
    close(tuner(torch.tensor([[1.0, 2.0]], dtype=torch.double)), np.array([[241.0, 2.0]]))


@pytest.mark.parametrize("bias", [True, False])
def test_res_tuning(bias):
    tuner, x = moved(ResAdapter(mlp(), 3, bias)), values(2, 5, D)
    weights = (
        bottleneck_of(tuner)
        if bias
        else [array(tuner.down.weight), np.zeros(3), array(tuner.up.weight), np.zeros(D)]
    )
    close(tuner(x), bottleneck.res_tuning(array(x), on_arrays(tuner.base), weights))
    tuner = ResAdapter(identity(2), 1, bias=False).double()  # by hand: (1, 2) + (3, 0) GELU(40)
    set_to(tuner, down__weight=[40, 0], up__weight=[3, 0])
    close(tuner(torch.tensor([[1.0, 2.0]], dtype=torch.double)), np.array([[121.0, 2.0]]))


def test_what_is_declared_dead_is_dead_and_the_rest_is_not(images):
    model = tiny("tiny_vit", "adapter_vpt")
    model(images).sum().backward()
    (pattern,) = plain(node("method", "adapter_vpt").no_gradient)
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert dead == [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and re.fullmatch(pattern, name)
    ]
    assert len(dead) == 3 * 6


# --- compacter ------------------------------------------------------------------------------------


def phm(layer: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    return array(layer.left), array(layer.right)


@pytest.mark.parametrize("rank", [1, 2])
def test_compacter(rank):
    tuner, x = moved(Compacter(mlp(), {}, hidden=4, n=2, rank=rank)), values(2, 5, D)
    down, up = tuner.down, tuner.up
    expected = compacter.compacter(
        array(tuner.base(x)),
        array(tuner.rule),
        phm(down),
        array(down.bias),
        phm(up),
        array(up.bias),
    )
    close(tuner(x), expected)


def test_compacter_by_hand():
    # A_1 = [[1, 2], [0, 1]], s t = 3: W = [[3, 6], [0, 3]]; x = (10, 0): x W = (30, 60), unchanged
    # by a GELU there; times W: (90, 360)
    tuner = Compacter(identity(2), {}, hidden=2, n=2).double()
    set_to(tuner, rule=[1, 2, 0, 1, 0, 0, 0, 0])
    for layer in ("down", "up"):
        set_to(tuner, **{f"{layer}__left": [3, 7], f"{layer}__right": [1, 7]})
    close(tuner(torch.tensor([[10.0, 0.0]], dtype=torch.double)), np.array([[100.0, 360.0]]))
    assert compacter.phm(array(tuner.rule), *phm(tuner.up)).tolist() == [[3, 6], [0, 3]]


def test_compacter_has_one_rule_for_the_network():
    rules = {
        id(p)
        for name, p in tiny("tiny_vit", "compacter").named_parameters(remove_duplicate=False)
        if name.endswith("rule")
    }
    assert len(rules) == 1


# --- convpass -------------------------------------------------------------------------------------


def bypass_of(bypass: nn.Module) -> list[np.ndarray]:
    return arrays(
        bypass, "down.weight", "down.bias", "conv.weight", "conv.bias", "up.weight", "up.bias"
    )


@pytest.mark.parametrize(("prefix", "mlp"), [(0, True), (1, True), (5, False)])
def test_convpass(prefix, mlp):
    block = vit_block(init_values=0.5)
    tuner, x = (
        moved(Convpass(block, 3, scale=0.7, conv_init="xavier", prefix=prefix, mlp=mlp)),
        values(2, prefix + 9, D),
    )

    def bypass(which, x, norm):
        return np.stack(
            [convpass.convpass(z, prefix, *bypass_of(which)) for z in on_arrays(norm)(x)]
        )

    expected = array(x)
    expected = (
        expected
        + on_arrays(lambda x: block.ls1(block.attn(block.norm1(x))))(expected)
        + 0.7 * bypass(tuner.attn_bypass, expected, block.norm1)
    )
    own = 0.7 * bypass(tuner.mlp_bypass, expected, block.norm2) if mlp else 0.0
    close(
        tuner(x),
        expected + on_arrays(lambda x: block.ls2(block.mlp(block.norm2(x))))(expected) + own,
    )


def test_stochastic_depth_drops_a_bypass_apart():
    block, dropped = vit_block(), nn.Module()
    dropped.forward = torch.zeros_like
    tuner, x = moved(Convpass(block, 3, conv_init="xavier")), values(2, 10, D)
    seen = []
    for name in ("drop_path1", "drop_path2"):
        getattr(block, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    tuner(x)
    assert len(seen) == 4, "two for each half, the sub-layer's and the bypass's"
    block.drop_path1 = block.drop_path2 = dropped
    assert torch.equal(tuner(x), x)


def test_convpass_by_hand():
    # One channel, all weights one, all tokens 40, where the QuickGELU is the identity: each of 2 x
    # 2 patches sees itself and three neighbours, 160; the class token is a pixel alone, 40.
    bypass = Bypass(1, 1, "xavier", 0.0, prefix=1).double()
    set_to(bypass, down__weight=1, up__weight=1, conv__weight=np.ones(9))
    close(
        bypass(torch.full((1, 5, 1), 40.0, dtype=torch.double)),
        np.array([[[40.0], [160], [160], [160], [160]]]),
    )
    assert convpass.convpass(np.full((5, 1), 40.0), 1, *bypass_of(bypass)).ravel().tolist() == [
        40,
        160,
        160,
        160,
        160,
    ]


def test_convpass_in_swin_sees_the_whole_map():
    block = moved(SwinTransformerBlock(D, (4, 4), num_heads=2, window_size=2, shift_size=1))
    tuner, x = moved(Convpass(block, 3, conv_init="xavier")), values(2, 4, 4, D)

    def bypass(which, x, norm):
        return np.stack(
            [
                convpass.convpass(z.reshape(16, D), 0, *bypass_of(which)).reshape(4, 4, D)
                for z in on_arrays(norm)(x)
            ]
        )

    expected = array(x)
    expected = (
        expected
        + on_arrays(lambda x: block._attn(block.norm1(x)))(expected)
        + bypass(tuner.attn_bypass, expected, block.norm1)
    )
    close(
        tuner(x),
        expected
        + on_arrays(lambda x: block.mlp(block.norm2(x)))(expected)
        + bypass(tuner.mlp_bypass, expected, block.norm2),
    )


# --- together, and bad input ----------------------------------------------------------------------


def test_tuners_of_many_kinds_stack(images):
    """Weight tuners inside wrapped sub-layers inside wrapped blocks inside prompts: all of it
    trains and survives copy and compile."""
    model = tiny("tiny_vit", "linear", **{"backbone.model.depth": 2})
    placements = [
        {"sites": ["qkv"], "tuner": ARC.over},
        {"sites": ["fc1"], "tuner": RepAdapter.over},
        {"sites": ["attn", "mlp"], "tuner": Adapter.over},
        {"sites": ["block"], "tuner": AdaptFormer.over},
        {"sites": ["blocks"], "tuner": Prompts.over},
    ]
    model = jitter(peft.attach(model, placements)).eval()
    model(images).sum().backward()
    assert not [
        name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()
    ]
    assert torch.equal(copy.deepcopy(model)(images), model(images))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"two tuners on .* name their tensors alike"):
        peft.attach(tiny("tiny_vit"), [{"sites": ["mlp"], "tuner": Adapter.over}] * 2)


LINEAR, CONV = nn.Linear(8, 8), nn.Conv2d(8, 8, 3)
BAD = [
    (lambda: Adapter(LINEAR, hidden=9), "hidden=9 must lie between 1 and 8"),
    (lambda: Adapter(LINEAR, hidden=0), "hidden=0 must lie between 1 and 8"),
    (lambda: Adapter(LINEAR, hidden=2, init="best"), "init='best' is not known; there is zero_up"),
    (lambda: Adapter(nn.Conv2d(8, 8, 1), hidden=2), "Conv2d holds no linear layer"),
    (lambda: Adapter.over({"a.b": LINEAR}, hidden=9), "Adapter at a.b: hidden=9"),
    (lambda: AdaptFormer(LINEAR), "Linear cannot be opened"),
    (lambda: AdaptFormer(Prompts(vit_block(), 2)), "Prompts cannot be opened .* innermost"),
    (lambda: ResAdapter(LINEAR, hidden=9), "hidden=9 must lie between 1 and 8"),
    (lambda: Compacter(LINEAR, {}, hidden=6, n=4), "n=4 divides not both sides of a 8 x 6"),
    (lambda: Compacter(LINEAR, {}, hidden=9), "hidden=9 must lie between 1 and 8"),
    (lambda: Convpass(vit_block(), conv_init="zero"), "conv_init='zero' is not known"),
    (lambda: Convpass(vit_block(), hidden=9), "hidden=9 must lie between 1 and 8"),
    (
        lambda: Bypass(8, 2, "xavier", 0.0, prefix=0)(torch.zeros(1, 5, 8)),
        "5 tokens after prefix=0 are no square grid",
    ),
    (
        lambda: RepAdapter(LINEAR, hidden=3, groups=2),
        "groups=2 must divide hidden=3 and the width 8",
    ),
    (lambda: RepAdapter(LINEAR, hidden=9), "hidden=9 must lie between 1 and 8"),
    (lambda: RepAdapter(CONV), "stands before a linear layer, not before Conv2d"),
    (lambda: RepAdapter2d(CONV, hidden=3), "groups=2 must divide hidden=3"),
    (lambda: ARC(LINEAR, {}, rank=9), "rank=9 must lie between 1 and 8"),
    (lambda: ARC(LINEAR, {}, rank=2, coefficients="one"), "coefficients='one' is not known"),
    (lambda: ARC(CONV, {}), "stands before a linear layer, not before Conv2d"),
    (lambda: ConvAdapter(CONV, reduction=3), "reduction=3 does not divide the 8 input channels"),
    (
        lambda: ConvAdapter.over({"a": nn.Conv2d(8, 8, 1)}),
        "no convolution with a kernel above 1 x 1 among a",
    ),
    (lambda: MLPHead(LINEAR, layers=0), "layers=0 must be at least 1"),
    (lambda: Prompts(vit_block(), num_prompts=0), "num_prompts=0 must be at least 1"),
    (lambda: SwinPrompts(vit_block(), num_prompts=2), "not Block: place first"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_input_is_named_with_its_numbers(build, message):
    with pytest.raises(ValueError, match=message):
        build()
