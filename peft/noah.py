"""NOAH: Neural Prompt Search. Zhang et al., 2022, arXiv:2206.04673, section 3.

A block may hold prompts, a LoRA on its fused qkv layer and an adapter after its MLP, each of its
own size, zero being none:

    [x, E] = L([x, drop(P)])[..-p],   qkv(x) + B A drop(x),   h + U drop(act(D h))

P (p, d), A (r, d) and B (3 d, r) for q, k and v together, D (b, d), U (d, b) with biases, act the
QuickGELU. The sizes are searched (`supernet`): p, r and b of a part may be lowered to its first
rows while it stands, and the best network is trained afresh. A block's prompts are cut off behind
it where the next block has its own; the last ones stay among the tokens to the end.

The released code overwrites its initialisations with a truncated normal of 0.02 and zero biases
(init="normal_002"): B and U do not start at zero. "zero_up" is what the parts' own papers have.
Three things of it are not here: the input prompt with a position embedding, which its first block
cuts off before anything reads it; unused rows (100 are allocated, which also makes the prompts'
uniform start narrower); and stochastic depth before the adapter instead of after it.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import quick_gelu
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from peft.core import Tuner, WeightTuner
from peft.layers import innermost, width

KINDS = ("prompts", "rank", "hidden")


class Prompts(Tuner):
    """Around a block; its prompts go last among the tokens."""

    kind, exact_at_init = "prompts", False

    def __init__(self, base: nn.Module, size: int, patch: int, dropout: float, init: str):
        super().__init__(base)
        self.size, self.most, channels = size, size, width(base)
        self.stay, self.dropout = False, nn.Dropout(dropout)
        # Xavier's for (1, p, d), a convolution's shape, as released; or as in VPT
        fans = (size + 1) * channels if init == "normal_002" else 3 * patch**2 + channels
        bound = (6 / fans) ** 0.5
        self.prompts = nn.Parameter(torch.empty(size, channels).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        prompts = self.dropout(self.prompts[: self.size].expand(len(x), -1, -1))
        out = self.base(torch.cat([x, prompts], 1))
        return out if self.stay else out[:, : x.shape[1]]


def stays(sizes: Sequence[int]) -> list[bool]:
    """Of which blocks the prompts go on to the next: where there are some, and it has none."""
    after = [*sizes[1:], 1]
    return [size > 0 and follows == 0 for size, follows in zip(sizes, after)]


class LoRA(WeightTuner):
    kind = "rank"

    def __init__(self, base: nn.Module, size: int, patch: int, dropout: float, init: str):
        super().__init__(base)
        out, into = base.weight.shape
        if size > min(out, into):
            raise ValueError(f"rank={size} must be at most {min(out, into)}")
        self.size, self.most, self.dropout = size, size, nn.Dropout(dropout)
        self.down = nn.Parameter(torch.empty(size, into))
        self.up = nn.Parameter(torch.empty(out, size))
        start(self.down, self.up, init)
        self.exact_at_init = init == "zero_up"

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.up[:, : self.size] @ self.down[: self.size], bias

    def forward(self, x: Tensor) -> Tensor:
        code = F.linear(self.dropout(x), self.down[: self.size])
        return self.base(x) + F.linear(code, self.up[:, : self.size])


class Adapter(Tuner):
    """After an MLP."""

    kind = "hidden"

    def __init__(self, base: nn.Module, size: int, patch: int, dropout: float, init: str):
        super().__init__(base)
        if size > width(base):
            raise ValueError(f"hidden={size} must be at most {width(base)}, the width")
        self.size, self.most, self.dropout = size, size, nn.Dropout(dropout)
        self.down = nn.Parameter(torch.empty(size, width(base)))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.empty(width(base), size))
        self.up_bias = nn.Parameter(torch.zeros(width(base)))
        start(self.down, self.up, init)
        self.exact_at_init = init == "zero_up"

    def forward(self, x: Tensor) -> Tensor:
        h, b = self.base(x), self.size
        code = quick_gelu(F.linear(h, self.down[:b], self.down_bias[:b]))
        bias = self.up_bias if b else None  # a size of zero is no adapter at all
        return h + F.linear(self.dropout(code), self.up[:, :b], bias)


def start(down: Tensor, up: Tensor, init: str) -> None:
    """Fills the two factors of a LoRA or adapter."""
    if init not in {"normal_002", "zero_up"}:
        raise ValueError(f"{init=}: there is normal_002, zero_up")
    nn.init.trunc_normal_(down, std=0.02)
    nn.init.trunc_normal_(up, std=0.02) if init == "normal_002" else nn.init.zeros_(up)


def over(
    bases: Mapping[str, nn.Module],
    prompts: int | Sequence[int] = 10,
    rank: int | Sequence[int] = 10,
    hidden: int | Sequence[int] = 10,
    **kwargs,
) -> dict[str, Tuner]:
    """The parts of every block. `bases` are the sites block, qkv and mlp; each size is one number,
    or one for each block."""
    depth = sum(isinstance(innermost(base), Block) for base in bases.values())
    sizes = {}
    for kind, size in zip(KINDS, (prompts, rank, hidden)):
        sizes[kind] = [size] * depth if isinstance(size, int) else list(size)
        if len(sizes[kind]) != depth or min(sizes[kind]) < 0:
            raise ValueError(f"{kind}={size} must be a number, or one for each of {depth} blocks")
    tuners, at = {}, -1
    for path, base in bases.items():
        block, linear = (isinstance(innermost(base), kind) for kind in (Block, nn.Linear))
        at += block  # a block comes before what is in it
        part = Prompts if block else LoRA if linear else Adapter
        if sizes[part.kind][at]:
            try:
                tuners[path] = part(base, sizes[part.kind][at], **kwargs)
            except ValueError as error:
                raise ValueError(f"{part.__name__} at {path}: {error}") from error
            if block:
                tuners[path].stay = stays(sizes["prompts"])[at]
    return tuners
