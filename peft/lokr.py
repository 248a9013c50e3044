"""LoKr: an increment as a Kronecker product. Edalati et al. (KronA), 2022, arXiv:2212.10650; Yeh et
al. (LyCORIS), ICLR 2024, arXiv:2309.14859.

    W' = W + (alpha / r) C (x) (B A),   C in R^{a x c}, B in R^{b x r}, A in R^{r x d}

for out = a b and in = c d. C is `left`, B is `up`, A is `down`. Each side of W splits into
(`factor`, n / factor) where that divides, else into the most square pair whose smaller number does
not exceed `factor` (-1: no limit). B A becomes one dense matrix `right` (scale 1) where a low rank
saves nothing: r >= max(b, d) / 2, as released, or r above the smaller side. In a convolution the
kernel belongs to the right factor. Initialisation as in LyCORIS's code: zero in A (or `right`), the
rest Kaiming-uniform, so the network starts unchanged.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import WeightTuner
from peft.layers import innermost


def split(number: int, factor: int) -> tuple[int, int]:
    """The factor pair of one side of a weight."""
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    most = math.isqrt(number) if factor < 0 else min(factor, math.isqrt(number))
    small = max(k for k in range(1, most + 1) if number % k == 0)
    return small, number // small


class LoKr(WeightTuner):
    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 8, factor: int = -1):
        super().__init__(base)
        out, into, *kernel = base.weight.shape
        most = min(out, into * math.prod(kernel))
        if not 1 <= rank <= most or (factor < 1 and factor != -1):
            raise ValueError(
                f"rank={rank} must lie in 1..{most}, the smaller side of "
                f"{tuple(base.weight.shape)}; factor={factor} must be at least 1, or -1 (most "
                "square)"
            )
        (a, b), (c, d) = split(out, factor), split(into, factor)
        width = d * math.prod(kernel)
        low = rank < max(b, d) / 2 and rank <= min(b, width)
        self.shape = (b, d, *kernel)
        self.scale = alpha / rank if low else 1.0
        self.left = nn.Parameter(torch.empty(a, c))
        self.up = nn.Parameter(torch.empty(b, rank)) if low else None
        self.down = nn.Parameter(torch.zeros(rank, width)) if low else None
        self.right = None if low else nn.Parameter(torch.zeros(b, width))
        for factors in (self.left, self.up) if low else (self.left,):
            nn.init.kaiming_uniform_(factors, a=5**0.5)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        right = self.up @ self.down if self.right is None else self.right
        left = self.left.view(*self.left.shape, *[1] * (len(self.shape) - 2))
        return weight + self.scale * torch.kron(left, right.view(self.shape)), bias

    def forward(self, x: Tensor) -> Tensor:
        """On a linear layer's input a Kronecker product is two small ones: over d, then over c."""
        if not isinstance(innermost(self.base), nn.Linear):
            return super().forward(x)
        blocks = x.unflatten(-1, (self.left.shape[1], self.shape[1]))  # (..., c, d)
        if self.right is None:
            blocks = F.linear(F.linear(blocks, self.down), self.up)
        else:
            blocks = F.linear(blocks, self.right)
        delta = torch.einsum("ac,...cb->...ab", self.left, blocks).flatten(-2)
        return self.base(x) + self.scale * delta
