"""Adapters that fold away (RepAdapter, ARC), Conv-Adapter and heads beside their references."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny
from reference import arc as arc_reference
from reference import conv_adapter, mlp_head, repadapter
from test_reference_adapters import (
    D,
    array,
    close,
    identity,
    moved,
    on_arrays,
    set_to,
    values,
)
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

import peft
from peft.arc import ARC, ARCStream
from peft.conv_adapter import ConvAdapter
from peft.layers import run
from peft.mlp_head import MLPHead
from peft.repadapter import RepAdapter, RepAdapter2d

# --- linear adapters that fold away ---------------------------------------------------------------


def folded(tuner: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return run(tuner.base, x, *tuner.adapted(tuner.base.weight, tuner.base.bias))


@pytest.mark.parametrize(
    ("groups", "bias", "host_bias"),
    [(1, True, True), (2, True, False), (2, False, False), (4, False, True)],
)
def test_repadapter(groups, bias, host_bias):
    tuner, x = (
        moved(RepAdapter(nn.Linear(D, 5, bias=host_bias), 4, groups, scale=0.7, bias=bias)),
        values(6, D),
    )
    biases = (array(tuner.down_bias), array(tuner.up_bias)) if bias else (np.zeros(4), np.zeros(D))
    y = repadapter.repadapter(
        array(x),
        array(tuner.down),
        biases[0],
        array(tuner.up.flatten(0, 1)),
        biases[1],
        groups,
        0.7,
    )
    expected = y @ array(tuner.base.weight).T + (array(tuner.base.bias) if host_bias else 0.0)
    close(tuner(x), expected)
    close(folded(tuner, x), expected)
    assert (tuner.bias is None) == (not bias and not host_bias), (
        "a shift appears exactly where there is one"
    )


def test_repadapter_before_a_convolution():
    tuner, x = (
        moved(RepAdapter2d(nn.Conv2d(D, D, 3, padding=1, groups=D), 4, 2, scale=0.7)),
        values(1, D, 3, 3),
    )
    weights = (
        array(tuner.down.weight.flatten(1)),
        array(tuner.down.bias),
        array(tuner.up.weight.flatten(1)),
        array(tuner.up.bias),
    )
    y = repadapter.repadapter(array(x[0].flatten(1).T), *weights, 2, 0.7)
    close(tuner(x), array(tuner.base(torch.from_numpy(y.T.reshape(1, D, 3, 3)))))
    with pytest.raises(TypeError, match="RepAdapter2d cannot be folded into Conv2d"):
        tuner.merge()


def test_repadapter_by_hand():
    # A = I, B = diag(3, 5) in two groups of one, a = (0, 1), c = (1, 0), s = 2, x = (1, 1): x + 2
    # (B (1, 2) + c) = (1 + 8, 1 + 20)
    tuner = RepAdapter(identity(2), 2, 2, scale=2.0).double().eval()
    set_to(tuner, down=torch.eye(2), up=[3, 5], down_bias=[0, 1], up_bias=[1, 0])
    x = torch.ones(1, 2, dtype=torch.double)
    close(tuner(x), np.array([[9.0, 21.0]]))
    close(folded(tuner, x), np.array([[9.0, 21.0]]))
    up = array(tuner.up.flatten(0, 1))
    assert repadapter.repadapter(
        array(x), np.eye(2), np.array([0, 1]), up, np.array([1, 0]), 2, 2.0
    ).tolist() == [[9.0, 21.0]]


def arc_of(tuner: nn.Module) -> tuple[np.ndarray, ...]:
    return array(tuner.project), array(tuner.arc.coefficients[0]), array(tuner.arc.shift)


@pytest.mark.parametrize("host_bias", [True, False])
def test_arc(host_bias):
    tuner, x = (
        moved(ARC(nn.Linear(D, 5, bias=host_bias), {}, rank=3, coefficients="xavier")),
        values(6, D),
    )
    expected = arc_reference.arc(array(x), *arc_of(tuner)) @ array(tuner.base.weight).T + (
        array(tuner.base.bias) if host_bias else 0.0
    )
    close(tuner(x), expected)
    close(folded(tuner, x), expected)


def test_arc_by_hand():
    # U = (1, 2)^T, c = 0.5, beta = (1, 0), x = (1, 1): x U = 3, times c 1.5, times U^T (1.5, 3); x
    # + that + beta = (3.5, 4)
    tuner = ARC(identity(2), {}, rank=1).double().eval()
    set_to(tuner, project=[1, 2], arc__coefficients=0.5, arc__shift=[1, 0])
    x = torch.ones(1, 2, dtype=torch.double)
    close(tuner(x), np.array([[3.5, 4.0]]))
    close(folded(tuner, x), np.array([[3.5, 4.0]]))
    assert arc_reference.arc(array(x), *arc_of(tuner)).tolist() == [[3.5, 4.0]]


def test_arc_in_swin_replaces_the_stream():
    block = moved(SwinTransformerBlock(D, (4, 4), num_heads=2, window_size=2, shift_size=1))
    tuner, x = moved(ARCStream(block, {}, rank=3)), values(2, 4, 4, D)
    attention, feed = (
        on_arrays(lambda x: block._attn(block.norm1(x))),
        on_arrays(lambda x: block.mlp(block.norm2(x))),
    )
    weights = arc_of(tuner)

    def flat(function):
        return lambda x: function(x.reshape(2, 4, 4, D)).reshape(-1, D)

    close(
        tuner(x),
        arc_reference.swin_block(
            array(x).reshape(-1, D), flat(attention), flat(feed), *weights
        ).reshape(2, 4, 4, D),
    )


def test_arc_shares_one_projection_per_site_and_width():
    model = tiny("tiny_vit", "arc")
    owners = {path: id(tuner.project) for path, tuner in peft.tuners(model).items()}
    attention, feed = (
        {i for path, i in owners.items() if path.endswith(site)} for site in ("qkv", "fc1")
    )
    assert len(attention) == len(feed) == 1
    assert attention != feed
    tuners = ARC.over({"a": nn.Linear(8, 3), "b": nn.Linear(16, 3), "c": nn.Linear(8, 4)}, rank=5)
    assert tuners["a"].project is tuners["c"].project
    assert tuners["b"].project.shape == (16, 5)


# --- Conv-Adapter and heads -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 5, padding=2, groups=4),
        nn.Conv2d(4, 6, 2, stride=2),
    ],
)
def test_conv_adapter(host):
    tuner, x = moved(ConvAdapter(copy.deepcopy(host), reduction=2)), values(1, 4, 6, 6)
    weights = (
        array(tuner.down.weight),
        array(tuner.down.bias),
        array(tuner.up.weight.flatten(1)),
        array(tuner.up.bias),
        array(tuner.scale).ravel(),
    )
    geometry = host.stride[0], host.padding[0], host.dilation[0]
    close(
        tuner(x)[0],
        conv_adapter.conv_adapter(array(x[0]), array(tuner.base(x)[0]), *weights, *geometry),
    )


def test_conv_adapter_counts():
    """A bottleneck of ResNet-50 has one host; its norms train. Per host, w = c_in / 8:
    9 c_in + w + w c_out + 2 c_out."""
    with torch.device("meta"):
        model = peft.create("resnet50_in1k", "conv_adapter", num_classes=3)
    hosts = sorted(path for path in peft.tuners(model))
    assert len(hosts) == 16 and all(path.endswith(".conv2") for path in hosts)
    widths = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    expected = sum(9 * c + c // 8 + c // 8 * c + 2 * c for c in widths)
    norms = sum(p.numel() for n, p in model.named_parameters() if ".bn" in n or n[:3] == "bn1")
    norms += sum(p.numel() for n, p in model.named_parameters() if "downsample.1" in n)
    assert norms == 53_120 and peft.count(model)["tuned"] == expected + norms


def test_conv_adapter_by_hand():
    # One pixel 2, host weight 1: 2. Branch: centre tap 3, bias -1: 5, ReLU 5, pointwise 2 and bias
    # 1: 11, times e = 4: 44
    host = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    set_to(host, weight=[0, 0, 0, 0, 1, 0, 0, 0, 0])
    tuner = ConvAdapter(host, reduction=1).double()
    set_to(
        tuner,
        down__weight=[9, 9, 9, 9, 3, 9, 9, 9, 9],
        down__bias=-1,
        up__weight=2,
        up__bias=1,
        scale=4,
    )
    close(tuner(torch.full((1, 1, 1, 1), 2.0, dtype=torch.double)), np.full((1, 1, 1, 1), 46.0))


def test_mlp_head():
    tuner, x = moved(MLPHead(nn.Linear(D, 5), layers=2)), values(3, D)
    hidden = []
    for i in (0, 4):
        linear, norm = tuner.hidden[i], tuner.hidden[i + 2]
        tensors = (
            linear.weight,
            linear.bias,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
        )
        hidden.append((*map(array, tensors), norm.eps))
    classifier = array(tuner.base.weight), array(tuner.base.bias)
    close(tuner(x), np.stack([mlp_head.mlp_head(row, hidden, classifier) for row in array(x)]))
    # by hand: W = 2, b = -1, x = 3: 5, ReLU 5; mean 1, variance 4 (and eps 0): 2; classifier 10 x +
    # 1: 21
    assert mlp_head.mlp_head(
        np.array([3.0]), [([[2.0]], -1.0, 1.0, 4.0, 1.0, 0.0, 0.0)], (np.array([[10.0]]), 1.0)
    ) == [21.0]
