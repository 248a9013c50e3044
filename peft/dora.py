"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., ICML 2024, arXiv:2402.09353.

    W' = m (W + (alpha / r) B A) / ||W + (alpha / r) B A||                                 (eq. 5)

A is `down`, B is `up` and m is `magnitude`. The norm is taken over the inputs of each output row
(over a whole kernel in a convolution): the paper writes a norm "per column" of a d x k matrix, its
code and Hugging Face's take torch's rows. It counts as a constant for the gradient (section 4.3),
so it is detached. m starts as the row norms of W and up at zero: the network starts unchanged. Rows
do not mix, so on a fused qkv layer this is three DoRAs that share A.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import WeightTuner
from peft.layers import innermost


class DoRA(WeightTuner):
    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 8, dropout: float = 0.0):
        super().__init__(base)
        out, into = base.weight.flatten(1).shape
        most = min(out, into)
        if not 1 <= rank <= most:
            raise ValueError(f"rank={rank} must lie in 1..{most}, the smaller of {out} x {into}")
        if dropout and not isinstance(innermost(base), nn.Linear):
            raise ValueError(
                f"dropout={dropout} acts on the input of A, which is formed in a Linear only, not "
                f"in a {type(innermost(base)).__name__}: there W' is computed instead"
            )
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Parameter(torch.empty(rank, into))
        self.up = nn.Parameter(torch.zeros(out, rank))
        self.magnitude = nn.Parameter(base.weight.detach().flatten(1).norm(dim=1))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def ratio(self, moved: Tensor) -> Tensor:
        """m / ||W + s B A|| (out,), from W + s B A (out, in). A dead row has norm 0 and stays 0."""
        norm = moved.detach().norm(dim=1)
        return self.magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        moved = weight.flatten(1) + self.scale * self.up @ self.down
        return (self.ratio(moved)[:, None] * moved).view_as(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        """Scales outputs instead of weights: W + s B A is formed for its norm alone, outside the
        gradient. With dropout the plain W x keeps its whole input, and the correction
        (m / n - 1) W x + (m / n) s B A x gets the dropped one."""
        if not isinstance(innermost(self.base), nn.Linear):
            return super().forward(x)
        weight, bias = self.base.weight, self.base.bias
        with torch.no_grad():
            moved = weight + self.scale * self.up @ self.down
        ratio, kept = self.ratio(moved), F.linear(x, weight)
        dropped = self.dropout(x)
        low = F.linear(self.scale * F.linear(dropped, self.down), self.up)
        if self.training and self.dropout.p:
            y = kept + (ratio - 1) * F.linear(dropped, weight) + ratio * low
        else:
            y = ratio * (kept + low)  # the same, and keeps one activation less for the gradient
        return y if bias is None else y + bias
