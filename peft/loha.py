"""LoHa: an increment as the Hadamard product of two low-rank matrices. Hyeon-Woo et al. (FedPara),
ICLR 2022, arXiv:2108.06098; as an adapter: Yeh et al. (LyCORIS), ICLR 2024, arXiv:2309.14859.

    W' = W + (alpha / r) (B_1 A_1) * (B_2 A_2)

Its rank reaches r^2 for the parameters of a LoRA of rank 2 r. A convolution is adapted as the
matrix (out, in * kh * kw) of its kernel. Initialisation as in LyCORIS's code: A_1, A_2 ~ N(0, 1),
B_1 ~ N(0, 0.1), B_2 zero, so the network starts unchanged. (Hugging Face draws three
Kaiming-uniform factors and leaves A_2 zero; its first steps are much smaller.) There is no cheaper
exact forward: the product of entries needs both matrices.
"""

import torch
from torch import Tensor, nn

from peft.core import WeightTuner


class LoHa(WeightTuner):
    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 8):
        super().__init__(base)
        out, into = base.weight.flatten(1).shape
        most = min(out, into)
        if not 1 <= rank <= most:
            raise ValueError(f"rank={rank} must lie in 1..{most}, the smaller of {out} x {into}")
        self.scale = alpha / rank
        self.up1 = nn.Parameter(torch.empty(out, rank).normal_(0, 0.1))
        self.down1 = nn.Parameter(torch.empty(rank, into).normal_(0, 1))
        self.up2 = nn.Parameter(torch.zeros(out, rank))
        self.down2 = nn.Parameter(torch.empty(rank, into).normal_(0, 1))

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.scale * (self.up1 @ self.down1) * (self.up2 @ self.down2)
        return weight + delta.view_as(weight), bias
