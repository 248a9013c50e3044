"""VPT: visual prompt tuning. Jia et al., ECCV 2022, arXiv:2203.12119.

    shallow:  [x_1, Z_1, E_1] = L_1([x_0, P, E_0]),  then the Z_i pass every block   (eqs. 4 and 5)
    deep:   [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])   (eq. 7)

x the class token, E the patches, P p prompts without a position embedding. Joining prompts, running
a module and cutting them off is both: around the chain of blocks it is shallow, around every block
deep. Prompts ~ U(-v, v) with v^2 = 6 / (3 patch^2 + d); dropout on them. The place among the tokens
is irrelevant to a plain transformer, and `prefix` only keeps to the paper's.

Swin (`SwinPrompts`): the prompts join the tokens of every window, have neither relative position
bias nor shift mask, and what the windows make of them is averaged over the windows of their own
image. (The released code orders windows by image but expands the prompts by window, so that prompts
of different images mix once they depend on the image.) At a patch merging, which four tokens enter,
a prompt is repeated four times. Deep prompts are fresh in every block, so nothing is averaged into
the next one. In every stage v is that of the first: patches of 4 pixels, d the embedding's width.
Dropout draws a mask for each image; the released deep Swin has one a batch after its first block.
"""

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from peft.backbone import feed
from peft.core import Tuner
from peft.layers import width


class Prompts(Tuner):
    exact_at_init = False

    def __init__(
        self,
        base: nn.Module,
        num_prompts: int = 10,
        patch: int = 16,
        dropout: float = 0.1,
        prefix: int = 1,
        embed: int | None = None,
    ):
        super().__init__(base)
        if num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts} must be at least 1")
        channels, self.prefix = self.channels(base), prefix
        bound = (6 / (3 * patch**2 + (embed or channels))) ** 0.5
        self.prompts = nn.Parameter(torch.empty(num_prompts, channels).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def channels(self, base: nn.Module) -> int:
        return width(base)

    def expanded(self, x: Tensor) -> Tensor:
        """The prompts of each image: (B, p, d)."""
        return self.dropout(self.prompts.expand(len(x), -1, -1))

    def forward(self, x: Tensor) -> Tensor:
        n, p = self.prefix, len(self.prompts)
        x = self.base(torch.cat([x[:, :n], self.expanded(x), x[:, n:]], 1))
        return torch.cat([x[:, :n], x[:, n + p :]], 1)


class SwinPrompts(Prompts):
    """Around a block (deep) or the chain of stages (shallow)."""

    def __init__(
        self,
        base: nn.Module,
        num_prompts: int = 10,
        patch: int = 4,
        dropout: float = 0.1,
        embed: int | None = None,
    ):
        if not isinstance(base, (SwinTransformerBlock, nn.Sequential)):
            kind = type(base).__name__
            raise ValueError(f"prompts run a Swin block or its stages, not {kind}: place first")
        super().__init__(base, num_prompts, patch, dropout, embed=embed)

    @classmethod
    def over(cls, bases, **hparams) -> dict[str, Tuner]:
        embed = first_width(next(iter(bases.values())))
        return super().over(bases, embed=embed, **hparams)

    def channels(self, base: nn.Module) -> int:
        return first_width(base)

    def forward(self, x: Tensor) -> Tensor:
        prompts = self.expanded(x)
        if isinstance(self.base, SwinTransformerBlock):
            return block(self.base, x, prompts)[0]
        for stage in self.base:
            if not isinstance(stage.downsample, nn.Identity):
                merge = stage.downsample
                x, prompts = merge(x), merge.reduction(merge.norm(prompts.repeat(1, 1, 4)))
            for each in stage.blocks:
                x, prompts = block(each, x, prompts)
        return x


def first_width(base: nn.Module) -> int:
    """The channels of the first block in a module; none where it holds no block."""
    return next((m.dim for m in base.modules() if isinstance(m, SwinTransformerBlock)), 0)


def block(base: nn.Module, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """One Swin block on (B, H, W, d) and (B, p, d)."""
    if isinstance(base, Tuner) or isinstance(base.attn, Tuner):
        raise TypeError("prompts run Swin's windows: no other tuner may stand around block or attn")
    (B, H, W, d), p, (high, wide) = x.shape, prompts.shape[1], base.window_size
    down, right = base.shift_size
    z = torch.roll(base.norm1(x), (-down, -right), (1, 2))
    z = F.pad(z, (0, 0, 0, -W % wide, 0, -H % high))
    mask = base.get_attn_mask(z) if base.dynamic_mask else base.attn_mask
    windows = window_partition(z, (high, wide)).view(B, -1, high * wide, d)  # image-major
    shared = base.norm1(prompts).unsqueeze(1).expand(-1, windows.shape[1], -1, -1)
    mixed = attention(base.attn, torch.cat([shared, windows], 2), mask, p)  # (B, windows, ., d)
    windows = mixed[:, :, p:].reshape(-1, high, wide, d)
    z = window_reverse(windows, (high, wide), *z.shape[1:3])[:, :H, :W]
    x = x + base.drop_path1(torch.roll(z, (down, right), (1, 2)))
    prompts = prompts + base.drop_path1(mixed[:, :, :p].mean(1))
    return feed(base, x) + x, feed(base, prompts) + prompts


def attention(base: nn.Module, x: Tensor, mask: Tensor | None, p: int) -> Tensor:
    """Window attention on (B, windows, p + tokens, d); bias and mask are zero for the p prompts."""
    heads = base.qkv(x).unflatten(-1, (3, base.num_heads, -1))
    q, k, v = heads.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, windows, heads, p + tokens, .)
    bias = base._get_rel_pos_bias()  # (1, heads, tokens, tokens)
    bias = bias if mask is None else bias + mask.unsqueeze(1)  # (windows, heads, tokens, tokens)
    bias = F.pad(bias, (p, 0, p, 0))
    rate = base.attn_drop.p if base.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
    return base.proj_drop(base.proj(x.transpose(2, 3).flatten(3)))
