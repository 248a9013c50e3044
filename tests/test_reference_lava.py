"""LAVA against a literal implementation of its paper, in float64 to 1e-9, which stands beside a
case worked by hand.
"""

import pytest
import torch
from reference import lava as lava_paper
from reference.cases import EXACT, linear, randomised, rows, tokens
from torch import nn
from torch.testing import assert_close

import peft
from peft.lava import LAVA


def test_lava_reference_by_hand():
    u, v = rows([1, 0], [2, 1]), rows([3, 1], [4, 0], [0, 5])
    # (1, 2)^T (3, 4, 0) + (0, 1)^T (1, 0, 5)
    assert_close(lava_paper.matrix(u, v), rows([3, 4, 0], [7, 8, 5]))
    kernel = lava_paper.kernel(rows([2, 1]), rows([3, 1]), rows([1, 0], [5, 1]), rows([1, 2]))
    # one channel each, 2 x 1: 2 * 3 * (1, 5) * 1 + 1 * 1 * (0, 1) * 2
    assert_close(kernel, rows([6], [32]).view(1, 1, 2, 1))
    assert_close(
        lava_paper.reshaped(rows([2]), rows([1, 3]), (1, 1, 2, 1)).flatten(), rows(2.0, 6.0)
    )
    # u^T u = [[5, 2], [2, 1]]: (5 - 1)^2 + 2 * 2^2 + 0; 4 u (u^T u - I) = 4 [[4, 2], [10, 4]]
    assert_close(lava_paper.penalty(u), torch.tensor(24.0, dtype=torch.double))
    assert_close(lava_paper.penalty_gradient(u), rows([16, 8], [40, 16]))


@pytest.mark.parametrize("alpha", [2, 7])
def test_lava_on_a_matrix(alpha):
    base, x = linear(5, 7), tokens(3, 5)
    tuner = randomised(LAVA(base, rank=3, alpha=alpha))
    delta = alpha / 3 * lava_paper.matrix(tuner.u[0], tuner.v[0])
    expected = x @ (base.weight + delta).T + base.bias
    assert_close(tuner(x), expected, **EXACT)
    assert_close(tuner.merge()(x), expected, **EXACT)


def test_lava_on_query_and_value_leaves_the_key():
    base, x = linear(6, 18), tokens(4, 6)
    tuner = randomised(LAVA(base, rank=2, alpha=2, parts=(0, 2)))
    query, value = (lava_paper.matrix(u, v) for u, v in zip(tuner.u, tuner.v, strict=True))
    delta = torch.cat([query, torch.zeros_like(query), value])
    expected = x @ (base.weight + delta).T + base.bias
    assert_close(tuner(x), expected, **EXACT)
    assert_close(tuner.merge()(x), expected, **EXACT)


CONVOLUTIONS = [{}, {"stride": 2, "padding": 1}, {"dilation": (2, 1), "padding": (3, 0)}]


@pytest.mark.parametrize("where", CONVOLUTIONS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("reshaped", [False, True])
def test_lava_on_a_convolution(where, groups, reshaped):
    torch.manual_seed(0)
    base, x = nn.Conv2d(4, 8, (3, 2), groups=groups, **where).double(), tokens(2, 4, 9, 8)
    tuner = randomised(LAVA(base, rank=3, alpha=3, reshaped=reshaped))
    shape = (8, 4, 3, 2)
    if reshaped:
        delta = lava_paper.reshaped(tuner.u[0], tuner.v[0].T, shape)
    else:
        delta = lava_paper.kernel(tuner.u[0], tuner.v[0], tuner.x, tuner.y)
    assert delta.shape == shape, "the update takes all input channels, whatever the groups"
    expected = base(x) + nn.functional.conv2d(x, delta, None, **where)
    assert_close(tuner(x), expected, **EXACT)
    if groups > 1:
        with pytest.raises(TypeError, match=f"does not fold into {groups} groups"):
            tuner.merge()
    else:
        assert_close(tuner.merge()(x), expected, **EXACT)


def test_lava_with_another_padding_uses_the_whole_kernel():
    torch.manual_seed(0)
    base, x = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular").double(), tokens(2, 4, 7, 7)
    tuner = randomised(LAVA(base, rank=2, alpha=2))
    assert_close(tuner(x), tuner.merge()(x), **EXACT)


@pytest.mark.parametrize("ortho", ["u", "v", "both", "x", "y"])
def test_lava_penalty_and_its_gradient(ortho):
    torch.manual_seed(0)
    tuner = randomised(LAVA(nn.Conv2d(4, 6, 3).double(), rank=3, strength=0.3, ortho=ortho))
    names = {"both": ["u", "v"]}.get(ortho, [ortho])
    factors = [getattr(tuner, name) for name in names]
    plain = [factor.view(-1, 3) for factor in factors]
    value = tuner.penalty()
    assert_close(value, 0.3 * sum(map(lava_paper.penalty, plain)), **EXACT)
    for gradient, factor in zip(torch.autograd.grad(value, factors), plain, strict=True):
        expected = 0.3 * lava_paper.penalty_gradient(factor)
        assert_close(gradient.view_as(factor), expected, **EXACT)


@pytest.mark.parametrize("ortho", ["u", "v", "both"])
def test_lava_starts_unchanged_with_an_orthonormal_factor(ortho):
    base = linear(12, 9)
    tuner = LAVA(base, rank=4, ortho=ortho).double()
    assert torch.equal(tuner.weight, base.weight)
    assert_close(tuner.penalty().item(), 0.4 if ortho == "both" else 0.0, atol=1e-6, rtol=0)
    assert LAVA(base, rank=4, strength=0.0).penalty() == 0.0


def test_lava_as_the_paper_has_it_unless_told():
    """V under the penalty in a matrix, U in a convolution, and no scale whatever the rank; so that
    the two sides of Tables 1 and 5 differ in their factors alone."""
    kernel, matrix = LAVA(nn.Conv2d(4, 6, 3), rank=3), LAVA(linear(12, 9), rank=3)
    assert (matrix.ortho, kernel.ortho) == ("v", "u")
    assert matrix.u.count_nonzero() == kernel.v.count_nonzero() == 0
    for method in ("lava", "lava_reshaped"):
        model = peft.create("tiny_resnet", method, num_classes=5, rank=2)
        assert {t.scale for t in model.modules() if isinstance(t, LAVA)} == {1.0}


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (linear(5, 7), {"rank": 6}, "rank=6 must be 1 to 5 for a weight of 7 x 5"),
        (linear(5, 7), {"parts": (0,)}, "7 rows do not divide into 3 parts"),
        (linear(5, 7), {"rank": 2, "ortho": "x"}, "ortho='x' names no factor of a Linear"),
        (nn.Conv2d(3, 4, 3), {"rank": 5}, "rank=5 must be 1 to 4"),
        (nn.Conv2d(3, 6, 3), {"rank": 2, "parts": (0, 2)}, "row blocks of a linear layer"),
    ],
)
def test_lava_refuses(base, options, message):
    with pytest.raises(ValueError, match=message):
        LAVA(base, **options)
