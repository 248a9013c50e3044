"""ALoRE against a literal implementation of its paper, in float64 to 1e-9, which stands beside a
case worked by hand.
"""

import pytest
import torch
from conftest import jitter
from reference import alore as alore_paper
from reference.cases import EXACT, Shapes, linear, randomised, rows, tokens, vit
from torch import nn
from torch.testing import assert_close

import peft
from peft.alore import ALoRE
from peft.core import WeightTuner
from peft.derive import keep_experts
from peft.stacked import Stacked


def test_alore_reference_by_hand():
    # one expert, n = 2, d = 4, r = 1: D U = [[1, 0], [2, 0]]
    scale, down, up = rows([1, 2], [0, 1]), rows([1], [2]), rows([1, 0])
    (term,) = alore_paper.experts([scale], [down], [up])
    assert_close(term, rows([1, 0, 2, 0], [2, 0, 4, 0], [0, 0, 1, 0], [0, 0, 2, 0]))
    # x K = [1 + 4, 0, 2 + 8 + 3 + 8, 0] with x = (1, 2, 3, 4), plus x
    assert_close(alore_paper.alore(rows([1, 2, 3, 4]), [term]), rows([6, 2, 24, 4]))
    terms = [rows([float(i)]) for i in range(1, 5)]
    for name, expected in {
        "increment_3": [1, 2, 3],
        "single_2": [2],
        "sliced_4": [1, 2, 3],
    }.items():
        assert [int(t.item()) for t in alore_paper.kept(name, terms)] == expected
    # two adapters d = 1: relu(2 x + 1) * 3 + 1 and relu(-x) * 5 + 2, at x = 2: 16 + 2, plus x
    adapters = [(rows([2]), rows(1), rows([3]), rows(1)), (rows([-1]), rows(0), rows([5]), rows(2))]
    assert_close(alore_paper.stacked(rows([2]), adapters, torch.relu), rows([20]))


def terms_of(tuner: ALoRE) -> list[torch.Tensor]:
    return alore_paper.experts(list(tuner.scale), list(tuner.down), list(tuner.up))


def alore(base: nn.Module, **options) -> ALoRE:
    return randomised(ALoRE.over({"site": base}, **options)["site"])


@pytest.mark.parametrize(("experts", "rank"), [(1, 4), (2, 3), (4, 1), (4, 2)])
@pytest.mark.parametrize("position", ["sequential_before", "sequential_after"])
@pytest.mark.parametrize("bias", [True, False])
def test_alore_is_the_sum_of_kronecker_products(experts, rank, position, bias):
    base, x = linear(8, 8, bias), tokens(2, 3, 8)
    tuner = alore(base, experts=experts, rank=rank, position=position)
    b = 0 if base.bias is None else base.bias
    if position == "sequential_before":
        expected = alore_paper.alore(x, terms_of(tuner)) @ base.weight.T + b
    else:
        expected = alore_paper.alore(x @ base.weight.T + b, terms_of(tuner))
    assert_close(tuner(x), expected, **EXACT)
    assert_close(WeightTuner.forward(tuner, x), expected, **EXACT)
    assert_close(tuner.merge()(x), expected, **EXACT)


@pytest.mark.parametrize("position", ["sequential_before", "sequential_after"])
def test_alore_around_convolutions_mixes_channels(position):
    torch.manual_seed(0)
    base = nn.Conv2d(8, 4, 3, stride=2, padding=1).double()
    tuner, x = alore(base, experts=2, rank=2, position=position), tokens(2, 8, 5, 5)

    def mixed(z: torch.Tensor) -> torch.Tensor:
        return alore_paper.alore(z.movedim(1, -1), terms_of(tuner)).movedim(-1, 1)

    expected = base(mixed(x)) if position == "sequential_before" else mixed(base(x))
    assert_close(tuner(x), expected, **EXACT)
    assert_close(tuner.merge()(x), expected, **EXACT)
    depthwise = alore(nn.Conv2d(8, 8, 3, groups=8).double(), experts=2, rank=2)
    expected = depthwise.base(
        alore_paper.alore(x.movedim(1, -1), terms_of(depthwise)).movedim(-1, 1)
    )
    assert_close(depthwise(x), expected, **EXACT)
    with pytest.raises(TypeError, match="does not fold into 8 groups"):
        depthwise.merge()


@pytest.mark.parametrize("kept", ["increment_1", "increment_3", "single_2", "sliced_1", "sliced_4"])
def test_alore_with_some_experts_only(kept):
    model = randomised_model("alore")
    thinned = peft.create("tiny_vit", "alore", num_classes=5, model=vit(64, 1)).double()
    peft.load_adapter_state(thinned, keep_experts(peft.adapter_state(model), kept))
    for path, tuner in peft.tuners(thinned).items():
        x = tokens(3, 64)
        terms = alore_paper.kept(kept, terms_of(peft.tuners(model)[path]))
        assert_close(tuner.update(x), x @ sum(terms), **EXACT)


def test_increments_and_slices_agree():
    """Increment-1 is Single-1 and Increment-3 is Sliced-4, as in Table 22."""
    state = peft.adapter_state(randomised_model("alore"))
    for one, other in [("increment_1", "single_1"), ("increment_3", "sliced_4")]:
        assert_close(keep_experts(state, one), keep_experts(state, other), atol=0, rtol=0)
    assert_close(keep_experts(state, "increment_4"), dict(state), atol=0, rtol=0)
    for bad in ["single_5", "increment_0", "all"]:
        with pytest.raises(ValueError, match=f"kept='{bad}'"):
            keep_experts(state, bad)
    with pytest.raises(ValueError, match="no experts"):
        keep_experts({"head.weight": torch.zeros(2)}, "single_1")


def randomised_model(method: str, **options) -> nn.Module:
    model = peft.create("tiny_vit", method, num_classes=5, model=vit(64, 1), **options).double()
    return jitter(model, 1.0)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("position", ["sequential_before", "sequential_after"])
def test_stacked_adapters(activation, position):
    base, x = linear(6, 6), tokens(3, 6)
    tuner = randomised(Stacked(base, rank=2, adapters=3, activation=activation, position=position))
    adapters = list(zip(tuner.down, tuner.down_bias, tuner.up, tuner.up_bias, strict=True))
    act = nn.functional.gelu if activation else nn.Identity()
    before = position == "sequential_before"
    z = alore_paper.stacked(x if before else base(x), adapters, act)
    assert_close(tuner(x), base(z) if before else z, **EXACT)
    if not activation:
        assert_close(tuner.merge()(x), tuner(x), **EXACT)


def test_alore_shares_its_scales_and_starts_unchanged():
    model = peft.create("tiny_vit", "alore", num_classes=5, scale_init="orthogonal")
    found = {id(tuner.scale) for tuner in peft.tuners(model).values()}
    assert len(found) == 1
    assert len(peft.tuners(model)) == 12
    for one in next(iter(peft.tuners(model).values())).scale:
        assert_close(one @ one.T, torch.eye(4), atol=1e-5, rtol=0)
    assert all(not tuner.up.any() for tuner in peft.tuners(model).values())


def test_alore_drops_the_update_only_in_training():
    tuner = alore(linear(8, 8), experts=2, rank=2, dropout=1.0)
    x = tokens(3, 8)
    assert_close(tuner.train()(x), tuner.base(x), **EXACT)
    assert not torch.allclose(tuner.eval()(x), tuner.base(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 3}, "experts=3 do not divide the width 8"),
        ({"experts": 4, "rank": 3}, "rank=3 must be 1 to 2: width 8 over 4 experts"),
        ({"position": "parallel"}, "there is sequential_before"),
        ({"scale_init": "ones"}, "there is glorot"),
    ],
)
def test_alore_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        alore(linear(8, 8), **{"rank": 1, **options})


def test_training_never_forms_the_whole_matrix():
    """No operation of a training step, forward or backward, has a result of d x d = 24 x 24."""
    base = linear(24, 40)
    tuner = ALoRE.over({"site": base}, experts=4, rank=2)["site"].double().train()
    with Shapes() as seen:
        tuner(tokens(3, 5, 24).requires_grad_()).sum().backward()
        assert (24, 24) not in seen.shapes
        tuner.matrix()
    assert (24, 24) in seen.shapes
