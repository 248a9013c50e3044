"""Res-Tuning: a tuner of its own beside every frozen operation. Jiang et al., NeurIPS 2023,
arXiv:2310.19859.

    y = OP(x) + U GELU(D x + b_D) + b_U,   OP in {MHA, FFN, Block}   (section 3.2)

The Res-Adapter form, the only tuner of the released component for vision transformers; the paper's
Res-Prompt and Res-Prefix are not here. Weights Xavier-uniform, biases N(0, 1e-6): close to the
pre-trained function at no point of the start, since U is not zero. Three tuners per block without
biases at b = 10 give the 0.55 M of the comparison tables; whether that is the published setting is
not stated anywhere.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import Tuner
from peft.layers import width


class ResAdapter(Tuner):
    exact_at_init = False

    def __init__(self, base: nn.Module, hidden: int = 10, bias: bool = True):
        super().__init__(base)
        channels = width(base)
        if not 1 <= hidden <= channels:
            raise ValueError(
                f"hidden={hidden} must lie between 1 and {channels}, the width of the layer"
            )
        self.down, self.up = (
            nn.Linear(channels, hidden, bias=bias),
            nn.Linear(hidden, channels, bias=bias),
        )
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            if bias:
                nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.base(x, **kwargs) + self.up(F.gelu(self.down(x)))
