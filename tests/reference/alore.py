"""ALoRE written out from the paper (Aggregating Low Rank Experts), as it writes: X W.

Tokens are rows. Dense Kronecker products, block by block as in eq. 1. Nothing here knows how the
suite stores its tensors.
"""

import torch
from torch import Tensor


def kronecker(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 1: the blocks a_ij B."""
    return torch.cat(
        [torch.cat([a[i, j] * b for j in range(a.shape[1])], dim=1) for i in range(a.shape[0])],
        dim=0,
    )


def experts(scales: list[Tensor], downs: list[Tensor], ups: list[Tensor]) -> list[Tensor]:
    """The summands of eq. 6, W_i^s (x) (W_i^d W_i^u), each (d, d).

    W_i^s (n, n), W_i^d (d/n, r), W_i^u (r, d/n).
    """
    return [kronecker(s, d @ u) for s, d, u in zip(scales, downs, ups, strict=True)]


def alore(x: Tensor, terms: list[Tensor]) -> Tensor:
    """Eq. 7: X sum_i W_i^s (x) (W_i^d W_i^u) + X, as d x d matrices."""
    return x @ sum(terms) + x


def kept(name: str, terms: list[Tensor]) -> list[Tensor]:
    """Table 22, from 1: Increment-i keeps experts 1 to i, Single-i only i, Sliced-i all but i."""
    kind, i = name.split("_")
    numbers = range(1, len(terms) + 1)
    chosen = {
        "increment": [k for k in numbers if k <= int(i)],
        "single": [int(i)],
        "sliced": [k for k in numbers if k != int(i)],
    }[kind]
    return [terms[k - 1] for k in chosen]


def stacked(x: Tensor, adapters: list[tuple[Tensor, Tensor, Tensor, Tensor]], activation) -> Tensor:
    """Table 4: whole adapters as in eq. 5 side by side, the residual added once.

    Each is W^d (d, r), b^d, W^u (r, d), b^u.
    """
    return x + sum(activation(x @ w_d + b_d) @ w_u + b_u for w_d, b_d, w_u, b_u in adapters)
