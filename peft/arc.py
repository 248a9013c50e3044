"""ARC: Adapter Re-Composing. Dong et al., NeurIPS 2023, arXiv:2310.06234, section 3.

    f(x) = x + ((x U) * c) U^T + beta,   U in R^{d x r}, c in R^r, beta in R^d

U is shared by all layers, c and beta belong to each; the up-projection is the transpose of the
down-projection. Before a linear layer x W^T + w it folds
in:

    W' = W + (W U * c) U^T,   w' = w + W beta.

There is one U for the attention sites and one for the MLP sites: each placement has its own, one
per width (in Swin: per stage). U Xavier-uniform, beta zero; c zero at the attention sites,
Xavier-uniform over (1, r) at the MLP sites, which moves the start by about a tenth
(`coefficients`). Dropout between the two projections. In Swin the second adapter works on the
residual stream before norm2 and replaces it, so it cannot be folded: `ARCStream`.
"""

import torch
from torch import Tensor, nn

from peft.backbone import attend, check_opens, feed
from peft.core import Tuner, WeightTuner
from peft.layers import add, innermost, width

Shared = dict[int, nn.Parameter]


class Recomposed(nn.Module):
    """((x U) * c) U^T + beta, with U passed in."""

    def __init__(self, channels: int, rank: int, coefficients: str, dropout: float):
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(1, rank))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.dropout = nn.Dropout(dropout)
        if coefficients == "xavier":
            nn.init.xavier_uniform_(self.coefficients)
        elif coefficients != "zero":
            raise ValueError(f"coefficients={coefficients!r} is not known; there is zero, xavier")

    def forward(self, x: Tensor, project: Tensor) -> Tensor:
        return self.dropout((x @ project) * self.coefficients) @ project.T + self.shift


def project_of(shared: Shared, channels: int, rank: int) -> nn.Parameter:
    """The U of a width: the first to ask for it draws it."""
    if not 1 <= rank <= channels:
        raise ValueError(f"rank={rank} must lie between 1 and {channels}, the width of the layer")
    if channels not in shared:
        shared[channels] = nn.Parameter(nn.init.xavier_uniform_(torch.empty(channels, rank)))
    return shared[channels]


class ARC(WeightTuner):
    def __init__(
        self,
        base: nn.Module,
        shared: Shared,
        rank: int = 50,
        coefficients: str = "zero",
        dropout: float = 0.1,
    ):
        super().__init__(base)
        if not isinstance(innermost(base), nn.Linear):
            raise ValueError(
                f"stands before a linear layer, not before {type(innermost(base)).__name__}"
            )
        channels = base.weight.shape[1]
        self.project = project_of(shared, channels, rank)
        self.arc = Recomposed(channels, rank, coefficients, dropout)
        self.exact_at_init = coefficients == "zero"

    @classmethod
    def over(cls, bases, **hparams) -> dict[str, Tuner]:
        return super().over(bases, shared={}, **hparams)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = (weight @ self.project * self.arc.coefficients) @ self.project.T
        return weight + delta, add(bias, weight @ self.arc.shift)

    def forward(self, x: Tensor) -> Tensor:
        """On the input: two products of width r instead of one with a new W'."""
        return self.base(x + self.arc(x, self.project))


class ARCStream(Tuner):
    """Swin's second site: around a block, between its halves."""

    def __init__(
        self,
        base: nn.Module,
        shared: Shared,
        rank: int = 50,
        coefficients: str = "xavier",
        dropout: float = 0.1,
    ):
        check_opens(base)
        super().__init__(base)
        self.project = project_of(shared, width(base), rank)
        self.arc = Recomposed(width(base), rank, coefficients, dropout)
        self.exact_at_init = coefficients == "zero"

    @classmethod
    def over(cls, bases, **hparams) -> dict[str, Tuner]:
        return super().over(bases, shared={}, **hparams)

    def forward(self, x: Tensor) -> Tensor:
        x = x + attend(self.base, x)
        x = x + self.arc(x, self.project)
        return x + feed(self.base, x)
