"""RLRR against a literal implementation of its paper, in float64 to 1e-9, which stands beside a
case worked by hand.
"""

import pytest
import torch
from reference import rlrr as rlrr_paper
from reference.cases import EXACT, linear, randomised, rows, tokens, vit
from torch import nn
from torch.testing import assert_close

import peft
from peft.derive import combine
from peft.rlrr import RLRR


def test_rlrr_reference_by_hand():
    x, w, b, f = rows([1, 2]), rows([1, 2], [3, 4]), rows(10, 20), rows(0.5, -0.5)
    left, right = rows(1, 2), rows(3, 5)
    # (1 + left_i right_j) w_ij = [[4, 12], [21, 44]]; x times that = [46, 100]; plus b and f
    assert_close(rlrr_paper.linear(x, w, b, left, right, f), rows([56.5, 119.5]))
    # without the residual [[3, 10], [18, 40]]: [39, 90]; left alone scales the inputs, the rows of
    # W: [[1, 2], [6, 8]]: [13, 18]
    assert_close(rlrr_paper.linear(x, w, b, left, right, f, residual=False), rows([49.5, 109.5]))
    assert_close(rlrr_paper.linear(x, w, b, left, None, f, residual=False), rows([23.5, 37.5]))
    # rank 2, S_left S_right = [[1, 0], [0, 2]]: W becomes [[2, 2], [3, 12]], without W in the
    # product [[2, 2], [3, 6]]
    s_left, s_right = rows([1, 0], [0, 1]), rows([1, 0], [0, 2])
    assert_close(rlrr_paper.ranked(x, w, b, s_left, s_right, f), rows([18.5, 45.5]))
    assert_close(rlrr_paper.ranked(x, w, b, s_left, s_right, f, times_w=False), rows([18.5, 33.5]))
    # two 2 x 1 kernels side by side: [[1, 3], [2, 4]], times 1 + [[10, 20], [20, 40]]
    kernel = torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]]], dtype=torch.double)
    adapted = rlrr_paper.convolution(kernel, rows([1], [2]), rows([10, 20]))
    assert_close(adapted, torch.tensor([[[[11.0], [42.0]], [[63.0], [164.0]]]], dtype=torch.double))
    # two RLRRs with weights 1/4 and 3/4: vectors (1, 3) and (5/2, 2) averaged, or products 2 and 12
    two = ([rows(1), rows(5)], [rows(2), rows(2)], [rows(4), rows(0)], [0.25, 0.75])
    assert_close(rlrr_paper.combined(*two, "vectors"), (rows([8.0]), rows(1.0)))
    assert_close(rlrr_paper.combined(*two, "products"), (rows([8.0]), rows(1.0)))
    other = ([rows(1), rows(5)], [rows(2), rows(4)], [rows(4), rows(0)], [0.5, 0.5])
    assert_close(rlrr_paper.combined(*other, "vectors")[0], rows([9.0]))
    assert_close(rlrr_paper.combined(*other, "products")[0], rows([11.0]))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_rlrr_rescales_as_the_paper(sides, residual):
    base, x = linear(5, 7), tokens(3, 5)
    tuner = randomised(RLRR(base, sides=sides, residual=residual))
    left = None if sides == "right" else tuner.col[0, 0]
    right = None if sides == "left" else tuner.row[:, 0]
    expected = rlrr_paper.linear(x, base.weight.T, base.bias, left, right, tuner.shift, residual)
    assert_close(tuner(x), expected, **EXACT)


@pytest.mark.parametrize("times_weight", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_rlrr_of_a_rank_and_without_the_weight(rank, times_weight):
    base, x = linear(5, 7, bias=False), tokens(3, 5)
    tuner = randomised(RLRR(base, rank=rank, times_weight=times_weight))
    zero = torch.zeros(7, dtype=torch.double)
    expected = rlrr_paper.ranked(
        x, base.weight.T, zero, tuner.col[0].T, tuner.row.T, tuner.shift, times_weight
    )
    assert_close(tuner(x), expected, **EXACT)


@pytest.mark.parametrize("rank", [1, 2])
def test_rlrr_on_fused_qkv_is_three_separate_layers(rank):
    base, x = linear(6, 18), tokens(4, 6)
    tuner = randomised(RLRR(base, rank=rank, parts=3))
    separate = []
    for part, (w, b) in enumerate(zip(base.weight.split(6), base.bias.split(6), strict=True)):
        rows_of, shift = tuner.row.split(6)[part], tuner.shift.split(6)[part]
        separate.append(rlrr_paper.ranked(x, w.T, b, tuner.col[part].T, rows_of.T, shift))
    assert_close(tuner(x), torch.cat(separate, dim=1), **EXACT)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_rlrr_on_a_convolution(rank, bias):
    torch.manual_seed(0)
    base = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, bias=bias).double()
    tuner, x = randomised(RLRR(base, rank=rank)), tokens(2, 4, 9, 8)
    kernel = rlrr_paper.convolution(base.weight, tuner.row, tuner.col[0])
    shift = base.bias + tuner.shift if bias else None
    assert (tuner.shift is None) == (not bias), "a convolution is shifted only where it has a bias"
    assert_close(tuner(x), nn.functional.conv2d(x, kernel, shift, stride=2, padding=1), **EXACT)


@pytest.mark.parametrize(
    ("init", "start"),
    [("rlrr", 2 / 24**0.5), ("normal", 0.02**2), ("zero", 0.0), ("constant", 0.02**2)],
)
def test_rlrr_starts_as_table_10(init, start):
    torch.manual_seed(0)
    base = nn.Linear(24, 4000)
    tuner = RLRR(base, init=init)
    moved = (
        (tuner.weight / base.weight - 1).std()
        if init != "constant"
        else (tuner.weight / base.weight - 1).mean()
    )
    assert_close(moved.item(), start, rtol=0.1, atol=1e-6)
    assert tuner.exact_at_init == (init == "zero")


@pytest.mark.parametrize("form", ["vectors", "products"])
def test_rlrr_combined(form):
    weights, states, models = [0.3, 0.2, 0.5], [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = peft.create("tiny_vit", "rlrr", num_classes=5, model=vit(64, 1)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter))
        models.append(peft.tuners(model)["blocks.0.mlp.fc1"])
        states.append(peft.adapter_state(model))
    rank = 3 if form == "products" else 1
    together = peft.create("tiny_vit", "rlrr", num_classes=5, rank=rank, model=vit(64, 1)).double()
    peft.load_adapter_state(together, combine(states, weights, form))
    tuner = peft.tuners(together)["blocks.0.mlp.fc1"]
    vectors = (
        [m.col[0, 0] for m in models],
        [m.row[:, 0] for m in models],
        [m.shift for m in models],
    )
    scale, shift = rlrr_paper.combined(*vectors, weights, form)
    assert_close(tuner.scale(tuner.base.weight), scale.T, **EXACT)
    assert_close(tuner.shift, shift, **EXACT)
    gamma = sum(w * state["norm.gamma"] for w, state in zip(weights, states, strict=True))
    assert_close(peft.adapter_state(together)["norm.gamma"], gamma, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6}, "rank=6 must be 1 to 5, the smaller side of 7 x 5"),
        ({"parts": 2}, "7 rows do not divide into 2 parts"),
        ({"sides": "left", "rank": 2}, "rescales W at rank 1, not with rank=2"),
        ({"residual": False, "times_weight": False}, "nothing is left of W"),
        ({"init": "ones"}, "init='ones': there is rlrr"),
    ],
)
def test_rlrr_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        RLRR(linear(5, 7), **options)


def test_combining_unlike_adapters_is_refused():
    states = [{"a.row": torch.zeros(3, 1)}, {"a.row": torch.zeros(4, 1)}]
    with pytest.raises(ValueError, match=r"differ in 1 tensors, among them a\.row"):
        combine(states, [0.5, 0.5])
    with pytest.raises(ValueError, match="2 states, 1 weights"):
        combine(states, [1.0])
