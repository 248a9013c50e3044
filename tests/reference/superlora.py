"""SuperLoRA written out from its supplement.

Whole groups as dense tensors, explicit mode products, dense Walsh-Hadamard matrices. Nothing here
knows how the suite stores its tensors.
"""

import math

import torch
from torch import Tensor


def tucker(core: Tensor, factors: list[Tensor]) -> Tensor:
    """Eq. 2: C x_1 A_1 x_2 A_2 ... x_M A_M, one mode product after another.

    core (r, ..., r), factors (d_m, r).
    """
    out = core
    for mode, factor in enumerate(factors):
        out = torch.tensordot(factor, out, dims=([1], [mode])).movedim(0, mode)
    return out


def cp(factors: list[Tensor]) -> Tensor:
    """Eq. 2 with an identity core: summed outer products of the columns r of all factors."""
    total = 0
    for r in range(factors[0].shape[1]):
        term = factors[0][:, r]
        for factor in factors[1:]:
            term = term.unsqueeze(-1) * factor[:, r]
        total = total + term
    return total


def kronecker(left: list[Tensor], up: Tensor, down: Tensor) -> Tensor:
    """LoNkr (Fig. 7c): K splits joined by Kronecker products, the last low-rank.

    up (m, r) down (r, m).
    """
    out = torch.ones(1, 1, dtype=up.dtype)
    for split in [*left, up @ down]:
        out = torch.kron(out, split)
    return out


def hadamard(exponent: int) -> Tensor:
    """H_2 to the Kronecker power N, with H_2 = [[1, 1], [1, -1]] / sqrt 2 (A.10)."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double) / math.sqrt(2)
    out = torch.ones(1, 1, dtype=torch.double)
    for _ in range(exponent):
        out = torch.kron(out, two)
    return out


def project(
    x: Tensor,
    n_out: int,
    variant: str,
    gauss: Tensor | None,
    permutation: Tensor,
    last: Tensor | None,
) -> Tensor:
    """Eq. 3 and the six functions of A.10 as dense matrices; x (N_in), the result (N_out).

    `gauss` is G, `last` the diagonal B or G', and `permutation` says which entry comes to each
    place under Pi.
    """
    if variant == "identity":
        return x
    shuffle = torch.zeros(len(permutation), len(permutation), dtype=x.dtype)
    for place, origin in enumerate(permutation.tolist()):
        shuffle[origin, place] = 1
    if variant == "shuffle":
        return x @ shuffle
    exponent = math.ceil(math.log2(max(len(x), n_out)))
    full = hadamard(exponent)
    y = x @ full[: len(x)] @ torch.diag(gauss) @ shuffle @ full[:, :n_out] @ torch.diag(last)
    return y - torch.tanh(y) if variant.startswith("nonlinear") else y


def scatter(groups: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
    """All groups' numbers end to end, dealt out to the weights in order, row by row.

    The excess is cut off.
    """
    numbers, out = torch.cat([g.reshape(-1) for g in groups]), []
    for rows, columns in shapes:
        out.append(numbers[: rows * columns].reshape(rows, columns))
        numbers = numbers[rows * columns :]
    return out


def stacked(up: Tensor, down: Tensor, widths: list[int]) -> list[Tensor]:
    """Without reshaping: the weights side by side as one low-rank matrix, cut apart again.

    up (d_1, r), down (r, sum of d_2).
    """
    return list((up @ down).split(widths, dim=1))
