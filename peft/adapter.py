"""Bottleneck adapters: Houlsby et al., ICML 2019, arXiv:1902.00751, and what vision made of them.

    Adapter(h) = U act(D h + b_D) + b_U,   D in R^{b x d}, U in R^{d x b}   (section 2.1)

* `Adapter`: h + Adapter(h), h the output of a sub-layer before the residual sum. On attention and
  MLP it is Houlsby's, on the MLP alone Pfeiffer's (arXiv:2005.00247), which is what visual tables
  call Adapter. Stochastic depth drops it with the sub-layer (VPT); in NOAH's code the adapter reads
  the sub-layer's output after the drop and is itself never dropped.
* `AdaptFormer` (Chen et al., NeurIPS 2022, arXiv:2205.13535, section 3.2): x + MLP(LN(x)) + s
  Adapter(x), beside the MLP. Its branch reads the residual stream x before the norm: so the
  released code, while a figure of the paper shows it behind the norm.
* `Parallel`: the same beside a module that sits in no residual stream of its own, fed by the
  module's input.
* `AdapterPlus` (Steitz & Roth, CVPR 2024, arXiv:2406.06820): x + s * Adapter(x), x the residual
  stream after the whole block (the Post-Adapter position, after both residual sums), s one learned
  number per channel, with stochastic depth on the branch.

Initialisations: `zero_up` (only U and the biases are zero) starts at the identity and trains;
`all_zero` is the one behind the row of VPT's tables: act(0) = 0 gives D, b_D and U gradients that
are identically zero, so only b_U ever moves. `normal_002` is NOAH's (truncated normal, 0.02) and
`normal_001` Houlsby's (0.01, cut at two deviations; the paper's number, the released code has
0.001).
"""

import torch
from timm.layers import DropPath, create_act_layer
from torch import Tensor, nn

from peft.backbone import attend, check_opens, feed
from peft.core import Tuner
from peft.layers import width


class Bottleneck(nn.Module):
    def __init__(
        self, channels: int, hidden: int, activation: str, init: str, dropout: float = 0.0
    ):
        super().__init__()
        if not 1 <= hidden <= channels:
            raise ValueError(
                f"hidden={hidden} must lie between 1 and {channels}, the width of the layer"
            )
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.act, self.dropout = create_act_layer(activation), nn.Dropout(dropout)
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
        if init == "zero_up":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        elif init == "all_zero":
            nn.init.zeros_(self.down.weight), nn.init.zeros_(self.up.weight)
        elif init == "normal_001":
            for layer in (self.down, self.up):
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        elif init == "normal_002":
            for layer in (self.down, self.up):
                nn.init.trunc_normal_(layer.weight, std=0.02)
        else:
            raise ValueError(
                f"init={init!r} is not known; there is zero_up, all_zero, normal_001, normal_002"
            )
        self.exact_at_init = init in ("zero_up", "all_zero")

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.dropout(self.act(self.down(h))))


class Adapter(Tuner):
    def __init__(
        self,
        base: nn.Module,
        hidden: int = 12,
        activation: str = "gelu",
        init: str = "zero_up",
        dropout: float = 0.0,
    ):
        super().__init__(base)
        self.adapter = Bottleneck(width(base), hidden, activation, init, dropout)
        self.exact_at_init = self.adapter.exact_at_init

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        h = self.base(x, **kwargs)
        return h + self.adapter(h)


class Parallel(Tuner):
    def __init__(self, base: nn.Module, hidden: int = 8, scale: float = 0.1, dropout: float = 0.1):
        super().__init__(base)
        self.scale = scale
        self.adapter = Bottleneck(width(base), hidden, "relu", "zero_up", dropout)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.base(x, **kwargs) + self.scale * self.adapter(x)


class AdaptFormer(Parallel):
    """Around a whole block, of which it runs the two halves: what it reads exists only between
    them."""

    def __init__(self, base: nn.Module, hidden: int = 8, scale: float = 0.1, dropout: float = 0.1):
        check_opens(base)
        super().__init__(base, hidden, scale, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + attend(self.base, x)
        return x + feed(self.base, x) + self.scale * self.adapter(x)


class AdapterPlus(Tuner):
    exact_at_init = False

    def __init__(self, base: nn.Module, hidden: int = 8, drop_path: float = 0.1):
        super().__init__(base)
        if not 0 <= drop_path < 1:
            raise ValueError(f"{drop_path=} must be from 0 to below 1")
        self.adapter = Bottleneck(width(base), hidden, "gelu", "normal_001")
        self.scale = nn.Parameter(torch.ones(width(base)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        x = self.base(x, **kwargs)
        return x + self.drop_path(self.scale * self.adapter(x))
