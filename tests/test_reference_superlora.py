"""SuperLoRA against a literal implementation of its supplement, in float64 to 1e-9, which stands
beside a case worked by hand.
"""

import math

import pytest
import torch
from conftest import tiny
from reference import superlora as superlora_paper
from reference.cases import EXACT, Shapes, randomised, rows, tokens, vit
from torch import nn
from torch.testing import assert_close

import peft
from peft.folded import Folded
from peft.hadamard import VARIANTS as PROJECTIONS
from peft.hadamard import Projection, fwht
from peft.superlora import Projected, SuperLoRA


def test_superlora_reference_by_hand():
    a, b, c = rows([1, 0], [2, 1]), rows([3, 1], [0, 2]), rows([1, 1])
    # (1, 2)^T (3, 0) + (0, 1)^T (1, 2); with a third factor (1, 1) the same numbers
    assert_close(superlora_paper.cp([a, b]), rows([3, 0], [7, 2]))
    assert_close(superlora_paper.cp([a, b, c])[..., 0], rows([3, 0], [7, 2]))
    # A [[0, 1], [0, 0]] B^T = (1, 2)^T (1, 2)
    assert_close(superlora_paper.tucker(rows([0, 1], [0, 0]), [a, b]), rows([1, 2], [2, 4]))
    # [[1, 2], [0, 1]] (x) ((1, 3)^T (2))
    kron = superlora_paper.kronecker([rows([1, 2], [0, 1])], rows([1], [3]), rows([2]))
    assert_close(kron, rows([2, 4], [6, 12], [0, 2], [0, 6]))
    half = torch.tensor(0.5, dtype=torch.double)
    assert_close(superlora_paper.hadamard(2)[3], half * rows(1, -1, -1, 1))
    # 1 number to 2: (x, 0) H = (x, x) / sqrt 2; times G = (2, 4); swapped; H; times (1, -1)
    gauss, last, order = rows(2, 4), rows(1, -1), torch.tensor([1, 0])
    x = rows(3.0)
    expected = rows(9, -3)  # (12, 6) / sqrt 2 H = (18, 6) / 2, the second turned
    assert_close(superlora_paper.project(x, 2, "linear", gauss, order, last), expected)
    bent = superlora_paper.project(x, 2, "nonlinear_v2", gauss, order, last)
    assert_close(bent, expected - torch.tanh(expected))
    shuffled = superlora_paper.project(
        rows(5, 6, 7), 3, "shuffle", None, torch.tensor([2, 0, 1]), None
    )
    assert_close(shuffled, rows(7, 5, 6))
    weights = superlora_paper.scatter(
        [rows([1, 2], [3, 4]), rows([5, 6], [7, 8])], [(1, 3), (2, 2)]
    )
    assert [w.tolist() for w in weights] == [[[1, 2, 3]], [[4, 5], [6, 7]]]
    side_by_side = superlora_paper.stacked(rows([1], [2]), rows([1, 2, 3]), [1, 2])
    assert [w.tolist() for w in side_by_side] == [[[1], [2]], [[2, 3], [4, 6]]]


FORMS = [
    {"form": "cp", "order": 2},
    {"form": "cp", "order": 3, "rank": 6},
    {"form": "cp", "order": 4},
    {"form": "cp", "order": 5},
    {"form": "tucker", "order": 2},
    {"form": "tucker", "order": 3, "rank": 3},
    {"form": "tucker", "order": 4},
    {"form": "tucker", "order": 5},
    {"form": "kron", "splits": 2, "factor": 3},
    {"form": "kron", "splits": 3, "factor": 2},
    {"form": "kron", "splits": 4, "factor": 2, "rank": 1},
    {"form": "dense"},
]


def name(form: dict) -> str:
    return "-".join(map(str, form.values()))


def dense(folded: Folded, numbers: int) -> torch.Tensor:
    """A group's numbers by the reference, whole and then cut off."""
    tensors = list(folded.tensors)
    if folded.form == "dense":
        return tensors[0][:numbers]
    if folded.form == "kron":
        up, down, *splits = tensors
        whole = superlora_paper.kronecker(splits, up, down)
        whole = whole[: folded.shape[0], : folded.shape[1]]
    elif folded.form == "cp":
        whole = superlora_paper.cp(tensors)
    else:
        whole = superlora_paper.tucker(tensors[0], tensors[1:])
    return whole.flatten()[:numbers]


@pytest.fixture
def layers() -> dict[str, nn.Module]:
    """Three fused layers of q, k and v, 4 x 5 each: six adapted weights, 120 numbers."""
    torch.manual_seed(0)
    return {f"blocks.{i}": nn.Linear(5, 12).double() for i in range(3)}


def adapted(layers: dict, updates: list[torch.Tensor], alpha: float) -> list[torch.Tensor]:
    """The layers' weights with the reference's updates on query and value."""
    out = []
    for i, layer in enumerate(layers.values()):
        query, key, value = layer.weight.detach().split(4)
        updated = [query + alpha * updates[2 * i], key, value + alpha * updates[2 * i + 1]]
        out.append(torch.cat(updated))
    return out


@pytest.mark.parametrize("form", FORMS, ids=name)
@pytest.mark.parametrize("groups", [1, 4, 7, "layer", "weight"])
def test_superlora_spans_are_the_dense_group(layers, form, groups):
    """Boundaries of groups fall on weights (1), through them (7), and between query and value."""
    tuners = SuperLoRA.over(layers, groups=groups, alpha=1.5, **{"rank": 2, **form})
    first = randomised(next(iter(tuners.values()))).groups
    numbers = [dense(f, stop - start) for f, (start, stop) in zip(first.folded, first.runs)]
    expected = adapted(layers, superlora_paper.scatter(numbers, [(4, 5)] * 6), 1.5)
    for tuner, weight in zip(tuners.values(), expected):
        assert all(a is b for a, b in zip(tuner.groups.parameters(), first.parameters()))
        assert_close(tuner.weight, weight, **EXACT)
        assert_close(tuner.merge().weight, weight, **EXACT)


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_a_layer_never_computes_its_whole_group(form):
    """A layer of 24 in one group: beside its own 2 x 256 numbers at most two rows of the unfolded
    tensor, forward or backward; only the gradient of dense numbers is as long as they are."""
    torch.manual_seed(0)
    layers = {f"blocks.{i}": nn.Linear(16, 48) for i in range(24)}
    tuner = SuperLoRA.over(layers, **{"rank": 1, **form, "groups": 1})["blocks.11"]
    whole, own = 24 * 2 * 256, 2 * 256
    with Shapes() as seen:
        weight = tuner.weight
        if form["form"] != "dense":
            weight.sum().backward()
    largest = max(math.prod(shape) for shape in seen.shapes if shape != (48, 16))
    assert largest <= 2 * (own + 2 * tuner.groups.folded[0].width) < whole


@pytest.mark.parametrize("groups", [1, 2, 3, "layer", "weight"])
@pytest.mark.parametrize("form", ["cp", "tucker", "kron"])
def test_superlora_without_reshaping_stacks_weights(layers, form, groups):
    options = {"form": form, "rank": 2, "factor": 2}
    tuners = SuperLoRA.over(layers, groups=groups, alpha=1.0, reshape=False, **options)
    first, updates = randomised(next(iter(tuners.values()))).groups, []
    for folded, (start, stop) in zip(first.folded, first.runs):
        whole = dense(folded, stop - start).view(-1, 4).T  # d_1 x sum d_2
        updates += whole.split(5, dim=1)
        if form == "cp":
            up, down = folded.tensors[1], folded.tensors[0].T
            assert_close(
                list(whole.split(5, dim=1)),
                superlora_paper.stacked(up, down, [5] * (whole.shape[1] // 5)),
            )
    for tuner, weight in zip(tuners.values(), adapted(layers, updates, 1.0)):
        assert_close(tuner.weight, weight, **EXACT)


def test_the_fast_transform_is_the_dense_one():
    x = tokens(3, 32)
    assert_close(fwht(x), x @ superlora_paper.hadamard(5), **EXACT)
    assert_close(fwht(fwht(x)), x, **EXACT)


@pytest.mark.parametrize(("n_in", "n_out"), [(20, 20), (10, 20), (3, 17), (1, 2)])
@pytest.mark.parametrize("variant", PROJECTIONS)
def test_projections_are_the_dense_products(variant, n_in, n_out):
    n_in = n_out if variant in {"identity", "shuffle"} else n_in
    fixed, z = Projection(variant, n_in, n_out, seed=3).double(), tokens(n_in)
    draws = dict(fixed.named_buffers())
    gauss, last = draws.get("gauss"), draws.get("last")
    expected = superlora_paper.project(z, n_out, variant, gauss, draws.get("permutation"), last)
    assert_close(fixed(z, n_out), expected, **EXACT)
    if last is not None and not variant.endswith("v2"):
        assert set(last.tolist()) <= {-1.0, 1.0}
    again, other = (Projection(variant, n_in, n_out, seed).double() for seed in (3, 4))
    assert torch.equal(again(z, n_out), fixed(z, n_out))
    if variant != "identity" and n_out > 2:
        assert not torch.equal(other(z, n_out), fixed(z, n_out))
    assert not list(fixed.parameters())
    assert not fixed.state_dict()


def test_a_projection_shrinks_as_stated():
    """The variance falls to about N_in / 2^n: 1,000 numbers to 2,000 within 2,048."""
    z = tokens(1000)
    out = Projection("linear", 1000, 2000).double()(z, 2000)
    assert_close((out.var() / z.var()).item(), 1000 / 2048, rtol=0.1, atol=0)


@pytest.mark.parametrize("variant", PROJECTIONS)
@pytest.mark.parametrize("groups", [1, 4, "layer"])
def test_projected_weights_are_the_projected_groups(layers, variant, groups):
    ratio = 1.0 if variant in {"identity", "shuffle"} else 0.3
    base = nn.Sequential(
        *[nn.Sequential(layer, nn.Linear(12, 5).double()) for layer in layers.values()]
    )
    options = {"groups": groups, "alpha": 1.5, "ratio": ratio, "projection": variant, "rank": 2}
    tuner = Projected.over({"blocks": base}, inside=r"blocks\.\d\.0", **options)["blocks"]
    tuner, draws = randomised(tuner), dict(tuner.projection.named_buffers())
    numbers = []
    for folded, (start, stop) in zip(tuner.groups.folded, tuner.groups.runs):
        z = dense(folded, -int(-ratio * (stop - start) // 1))
        fixed = (draws.get("gauss"), draws.get("permutation"), draws.get("last"))
        numbers.append(superlora_paper.project(z, stop - start, variant, *fixed))
    expected = adapted(layers, superlora_paper.scatter(numbers, [(4, 5)] * 6), 1.5)
    assert_close(list(tuner.weights().values()), expected, **EXACT)
    x, y = tokens(2, 3, 5), tokens(2, 3, 5)
    for block, weight in zip(base, expected):
        y = block[1](nn.functional.linear(x, weight, block[0].bias))
        x = y
    x = tokens(2, 3, 5)
    assert_close(tuner(x), y, **EXACT)
    assert_close(tuner.merge()(x), y, **EXACT)
    assert all(w.grad is None for w in base.parameters())


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_both_ways_of_computing_updates_agree(images, form):
    """Each layer its own run, or all at once around the blocks: the same outputs and gradients."""
    options = {"groups": 3, "rank": 2, **form}
    torch.manual_seed(0)
    each = tiny("tiny_vit", "superlora", model=vit(64, 2), **options)
    once = tiny(
        "tiny_vit",
        "superlora_projected",
        projection="identity",
        ratio=1.0,
        model=vit(64, 2),
        **options,
    )
    each, once, images = randomised_groups(each), randomised_groups(once), images.double()
    assert_close(each(images), once(images), **EXACT)
    gradients = []
    for model in (each, once):
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1])).backward()
        gradients.append([p.grad for p in groups_of(model).parameters()])
    assert_close(*gradients, **EXACT)


def groups_of(model: nn.Module) -> nn.Module:
    return next(iter(peft.tuners(model).values())).groups


def randomised_groups(model: nn.Module) -> nn.Module:
    randomised(groups_of(model.double()))
    return model.eval()


def test_equal_runs_of_unequal_weights(layers):
    """Weights of two sizes in one vector, as in Swin: groups follow neither's boundaries."""
    layers["last"] = nn.Linear(6, 9).double()
    tuners = SuperLoRA.over(layers, groups=5, rank=2, alpha=1.0)
    groups = randomised(tuners["last"]).groups
    numbers = [dense(f, stop - start) for f, (start, stop) in zip(groups.folded, groups.runs)]
    updates = superlora_paper.scatter(numbers, [(4, 5)] * 6 + [(3, 6)] * 2)
    base, w = layers["last"].weight, tuners["last"].weight
    assert_close(
        w - base, torch.cat([updates[6], torch.zeros_like(updates[6]), updates[7]]), **EXACT
    )


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_superlora_starts_unchanged_and_moves_like_lora(form):
    """Filling the zero tensor with N(0, 1) gives each number the variance terms / (3 side), as
    LoRA's B does; without a zero tensor the numbers start at 0.1. Over seeds: factors are few."""
    options = {key: value for key, value in form.items() if key not in {"order", "rank"}}
    order, numbers = form.get("order", 2), 4096
    sides = (
        (numbers,) if form["form"] == "dense" else (-int(-(numbers ** (1 / order)) // 1),) * order
    )
    terms = {"dense": 1, "tucker": 2**order}.get(form["form"], 2)
    moved, bent = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        folded = Folded(sides, rank=2, **options)
        assert not folded.span(0, numbers).any()
        with torch.no_grad():
            folded.tensors[0].normal_()
            moved.append(folded.span(0, numbers).square().mean())
            bent.append(
                Folded(sides, rank=2, exact=False, **options).span(0, numbers).square().mean()
            )
    expected = 1.0 if form["form"] == "dense" else terms / (3 * sides[-1])
    assert 0.5 < (sum(moved) / 60 / expected) ** 0.5 < 2
    assert 0.05 < (sum(bent) / 60) ** 0.5 < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 200}, "groups=200 leaves a group without any of 120 numbers"),
        ({"groups": 50}, "groups=50 leaves a group without any of 120 numbers"),
        ({"groups": "block"}, "groups='block' leaves"),
        ({"rank": 12}, r"rank=12 must be 1 to 11, which is the smallest of \(11, 11\)"),
        ({"form": "tucker", "order": 3, "rank": 6}, "rank=6 must be 1 to 5"),
        (
            {"form": "kron", "splits": 3, "rank": 2},
            "rank=2 must be 1 to 1, which splits=3 with factor",
        ),
        ({"form": "kron", "order": 3}, "form='kron' of order 3"),
        ({"form": "kron", "splits": 1}, "splits=1: a Kronecker product has at least 2"),
        ({"reshape": False, "groups": 4}, "reshape=false takes .* a group from number 0 to 30"),
        ({"reshape": False, "order": 3}, "reshape=false takes"),
        ({"of": 5}, "12 rows do not divide into 5 parts"),
    ],
)
def test_superlora_refuses(layers, options, message):
    with pytest.raises(ValueError, match=message):
        SuperLoRA.over(layers, **{"rank": 1, **options})


def test_projections_refuse():
    with pytest.raises(ValueError, match="shuffle makes 5 numbers of 5, not 9: take ratio=1"):
        Projection("shuffle", 5, 9)
    with pytest.raises(ValueError, match="projection='fastfood': there is identity"):
        Projection("fastfood", 5, 9)
    with pytest.raises(ValueError, match="nothing in blocks matches head"):
        Projected.over({"blocks": nn.Sequential(nn.Linear(3, 3))}, inside="head")
