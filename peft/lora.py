"""LoRA: Low-Rank Adaptation. Hu et al., ICLR 2022, arXiv:2106.09685.

    W' = W + (alpha / r) B A,   A in R^{r x in}, B in R^{out x r}                    (section 4.1)

A is `down`, B is `up`; up starts at zero, so the network starts unchanged. In a fused qkv layer the
paper adapts q and v: `parts` names the row blocks that get factors of their own (`[0, 2]` of 3),
and the product is scattered to those rows. Without `parts` one pair of factors spans the whole
layer (in fused qkv: NOAH's LoRA, which shares A among q, k and v and has the same count at the same
rank; its code starts both factors from a truncated normal of 0.02, init="normal_002"). A
convolution is adapted as the matrix (out, in * kh * kw) of its kernel: A is then a convolution to r
channels, B one of 1 x 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import WeightTuner
from peft.layers import innermost


class LoRA(WeightTuner):
    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 8,
        dropout: float = 0.0,
        parts: tuple[int, ...] | None = None,
        of: int = 3,
        init: str = "lora",
    ):
        super().__init__(base)
        if init not in {"lora", "normal_002"}:
            raise ValueError(f"{init=}: there is lora, normal_002")
        out, into = base.weight.flatten(1).shape
        parts, of = ((0,), 1) if parts is None else (tuple(parts), of)
        if out % of:
            raise ValueError(f"{out} rows do not divide into {of} parts")
        most = min(out // of, into)
        if not 1 <= rank <= most:
            raise ValueError(
                f"rank={rank} must lie in 1..{most}, the smaller of {out // of} x {into}"
            )
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Parameter(torch.empty(len(parts), rank, into))
        self.up = nn.Parameter(torch.zeros(len(parts), out // of, rank))
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=5**0.5)
        if init == "normal_002":
            nn.init.trunc_normal_(self.down, std=0.02)
            nn.init.trunc_normal_(self.up, std=0.02)
        self.exact_at_init = init == "lora"
        rows = F.one_hot(torch.tensor(parts), of).float()  # (parts, of)
        self.register_buffer("rows", rows, persistent=False)
        if dropout and not self.cheap():
            raise ValueError(
                f"dropout={dropout} acts on the input of A, which is never formed in a "
                f"{type(innermost(base)).__name__} with groups: W' = W + B A is computed instead"
            )

    def cheap(self) -> bool:
        """Whether the base's two factors can run one after the other."""
        base = innermost(self.base)
        plain = isinstance(base, nn.Conv2d) and type(base).forward is nn.Conv2d.forward
        return isinstance(base, nn.Linear) or (plain and base.groups == 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, parts * r), block-structured, and A (parts * r, in)."""
        up = torch.einsum("pn,por->nopr", self.rows, self.up)
        return up.flatten(2).flatten(0, 1), self.down.flatten(0, 1)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        up, down = self.factors()
        return weight + self.scale * (up @ down).view_as(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        """The low-rank path: never forms B A, and scales what is narrow; dropout on the input of A
        lives here."""
        if not self.cheap():
            return super().forward(x)
        up, down = self.factors()
        x, y, base = self.dropout(x), self.base(x), innermost(self.base)
        if isinstance(base, nn.Linear):
            return y + F.linear(self.scale * F.linear(x, down), up)
        narrow = base._conv_forward(x, down.view(-1, *base.weight.shape[1:]), None)
        return y + F.conv2d(self.scale * narrow, up[:, :, None, None])
