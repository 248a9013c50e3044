"""RepAdapter: linear adapters that fold away. Luo et al., 2023, arXiv:2302.08106, section 3.

    f(x) = x + s (B (A x + a) + c),   A in R^{b x d}, B in R^{d x b}

B is block-diagonal with G groups. Before a linear layer W z + w, without an activation, hence

    W' = W + s (W B) A,   w' = w + s W (B a + c).

Sites: the layer that reads norm1 (attention) and the one that reads norm2 (MLP). A Xavier-uniform,
B, a and c zero; dropout between A and B. The papers' 0.22 M counts A and B only, the released code
trains the biases too (0.24 M): `bias` chooses. For one group the released merge raises an error;
this is the formula. In Swin a padded window token sees f's bias here, while the released code pads
after f: equal wherever windows divide the map, as at 224 pixels. Before a padded, grouped
convolution (ConvNeXt's depthwise one) the map cannot be folded in: `RepAdapter2d` refuses to merge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import Tuner, WeightTuner
from peft.layers import add, innermost


def check(channels: int, hidden: int, groups: int) -> None:
    if not 1 <= hidden <= channels:
        raise ValueError(
            f"hidden={hidden} must lie between 1 and {channels}, the width of the layer"
        )
    if groups < 1 or hidden % groups or channels % groups:
        raise ValueError(f"groups={groups} must divide hidden={hidden} and the width {channels}")


class RepAdapter(WeightTuner):
    def __init__(
        self,
        base: nn.Module,
        hidden: int = 8,
        groups: int = 2,
        scale: float = 1.0,
        dropout: float = 0.1,
        bias: bool = True,
    ):
        super().__init__(base)
        if not isinstance(innermost(base), nn.Linear):
            raise ValueError(
                f"stands before a linear layer, not before {type(innermost(base)).__name__}"
            )
        channels = base.weight.shape[1]
        check(channels, hidden, groups)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Parameter(torch.empty(hidden, channels))
        self.up = nn.Parameter(torch.zeros(groups, channels // groups, hidden // groups))
        self.down_bias = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.xavier_uniform_(self.down)

    def expand(self, code: Tensor) -> Tensor:
        """B code + c for codes (..., b): each group of codes reaches its own group of channels
        only."""
        code = code.unflatten(-1, (len(self.up), -1))
        out = torch.einsum("...gh,gch->...gc", code, self.up).flatten(-2)
        return out if self.up_bias is None else out + self.up_bias

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        groups = weight.unflatten(1, (len(self.up), -1))  # (out, G, d / G)
        reduced = torch.einsum("ogc,gch->ogh", groups, self.up).flatten(1)  # W B
        if self.down_bias is not None:
            bias = add(bias, self.scale * (weight @ self.expand(self.down_bias)))
        return weight + self.scale * (reduced @ self.down), bias

    def forward(self, x: Tensor) -> Tensor:
        """On the input: never forms W', and is where dropout lives."""
        return self.base(
            x + self.scale * self.expand(self.dropout(F.linear(x, self.down, self.down_bias)))
        )


class RepAdapter2d(Tuner):
    """f before a convolution, as 1 x 1 convolutions."""

    def __init__(
        self,
        base: nn.Module,
        hidden: int = 8,
        groups: int = 2,
        scale: float = 1.0,
        dropout: float = 0.1,
        bias: bool = True,
    ):
        super().__init__(base)
        channels = innermost(base).in_channels
        check(channels, hidden, groups)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.up = nn.Conv2d(hidden, channels, 1, groups=groups, bias=bias)
        nn.init.xavier_uniform_(self.down.weight)
        for tensor in [self.up.weight] + ([self.down.bias, self.up.bias] if bias else []):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x + self.scale * self.up(self.dropout(self.down(x))))
