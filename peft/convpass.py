"""Convpass: convolutional bypasses. Jie & Deng, 2022, arXiv:2207.07039, section 3.

    x <- x + attention(LN(x)) + s CP(LN(x)),
    x <- x + MLP(LN(x)) + s CP'(LN(x)),
    CP(z) = up(act(conv(act(down(z)))))

with act the QuickGELU and conv a 3 x 3 convolution of b channels on the grid of patches.

Beside both halves of a block and fed by the same normalised input. The class token (any of `prefix`
tokens) is an image of one pixel for the same convolution, which therefore meets the centre tap
only. In Swin the grid is the whole map, not a window. down Xavier-uniform, up zero, biases zero;
the convolution starts as the identity or Xavier-uniform, chosen per task by the authors. Dropout
before up. Stochastic depth, where a run has it, drops a bypass apart from what it is beside.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import quick_gelu
from torch import Tensor, nn

from peft.backbone import attend, check_opens, feed
from peft.core import Tuner
from peft.layers import width


class Bypass(nn.Module):
    def __init__(self, channels: int, hidden: int, conv_init: str, dropout: float, prefix: int):
        super().__init__()
        if not 1 <= hidden <= channels:
            raise ValueError(
                f"hidden={hidden} must lie between 1 and {channels}, the width of the layer"
            )
        self.prefix = prefix
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.conv, self.up):
            nn.init.zeros_(layer.bias)
        if conv_init not in ("identity", "xavier"):
            raise ValueError(f"conv_init={conv_init!r} is not known; there is identity, xavier")
        (nn.init.dirac_ if conv_init == "identity" else nn.init.xavier_uniform_)(self.conv.weight)

    def grid(self, code: Tensor) -> Tensor:
        """The convolution of (B, H, W, b)."""
        return self.conv(code.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, N, d) with the patches in rows after the prefix, or (B, H, W, d)."""
        code = quick_gelu(self.down(z))
        if code.dim() == 4:
            mixed = self.grid(code)
        else:
            patches = code.shape[1] - self.prefix
            side = math.isqrt(patches)
            if side * side != patches:
                raise ValueError(f"{patches} tokens after prefix={self.prefix} are no square grid")
            alone = F.linear(code[:, : self.prefix], self.conv.weight[:, :, 1, 1], self.conv.bias)
            mixed = torch.cat(
                [alone, self.grid(code[:, self.prefix :].unflatten(1, (side, side))).flatten(1, 2)],
                1,
            )
        return self.up(self.dropout(quick_gelu(mixed)))


class Convpass(Tuner):
    """Around a block, of which it runs the two halves."""

    def __init__(
        self,
        base: nn.Module,
        hidden: int = 8,
        scale: float = 1.0,
        conv_init: str = "identity",
        dropout: float = 0.1,
        prefix: int = 1,
        mlp: bool = True,
    ):
        check_opens(base)
        super().__init__(base)
        self.scale = scale
        self.attn_bypass = Bypass(width(base), hidden, conv_init, dropout, prefix)
        self.mlp_bypass = Bypass(width(base), hidden, conv_init, dropout, prefix) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        block = self.base
        bypass = block.drop_path1(self.attn_bypass(block.norm1(x)))
        x = x + attend(block, x) + self.scale * bypass
        if self.mlp_bypass is None:
            return x + feed(block, x)
        bypass = block.drop_path2(self.mlp_bypass(block.norm2(x)))
        return x + feed(block, x) + self.scale * bypass
