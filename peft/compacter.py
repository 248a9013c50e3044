"""Compacter: adapters of Kronecker products. Karimi Mahabadi et al., NeurIPS 2021,
arXiv:2106.04647, section 4.

    y = h + LPHM_up(gelu(LPHM_down(h))),   LPHM(x) = x W + bias,
    W = sum_i A_i (x) (s_i t_i),   A_i in R^{n x n}, s_i in R^{in/n x k}, t_i in R^{k x out/n}

The rule tensor A (n, n, n) is one for the whole network; s and t belong to each layer. A ~ N(0,
1e-4^2), as its released configuration has it, s and t Glorot-uniform per slice with gain sqrt 2,
biases zero: all but the identity at the start. (That configuration trains the norms of its
language model as well; visual tables count the adapters alone.) No visual recipe is published; the
paper's own n = 4, k = 1 and a reduction of 32 are the defaults, and 0.057 M on ViT-B/16 follows
from them.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from peft.core import Tuner
from peft.layers import width


class PHM(nn.Module):
    """x W + bias with W as above. The rule is passed in: it belongs to the network, not to the
    layer."""

    def __init__(self, into: int, out: int, n: int, rank: int):
        super().__init__()
        if into % n or out % n:
            raise ValueError(f"n={n} divides not both sides of a {into} x {out} projection")
        self.left = nn.Parameter(torch.empty(n, into // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, out // n))
        self.bias = nn.Parameter(torch.zeros(out))
        for factor in (*self.left, *self.right):
            nn.init.xavier_uniform_(factor, gain=2**0.5)

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        weight = torch.einsum(
            "ipq,iuk,ikv->puqv", rule, self.left, self.right
        )  # small: in * hidden numbers
        return x @ weight.flatten(2).flatten(0, 1) + self.bias


class Compacter(Tuner):
    exact_at_init = True  # to 1e-5: the rule, 1e-4, enters twice

    def __init__(
        self,
        base: nn.Module,
        shared: dict[int, nn.Parameter],
        hidden: int = 24,
        n: int = 4,
        rank: int = 1,
    ):
        super().__init__(base)
        channels = width(base)
        if not 1 <= hidden <= channels:
            raise ValueError(
                f"hidden={hidden} must lie between 1 and {channels}, the width of the layer"
            )
        self.down, self.up = PHM(channels, hidden, n, rank), PHM(hidden, channels, n, rank)
        if n not in shared:
            shared[n] = nn.Parameter(torch.empty(n, n, n).normal_(0.0, 1e-4))
        self.rule = shared[n]

    @classmethod
    def over(cls, bases, **hparams) -> dict[str, Tuner]:
        return super().over(bases, shared={}, **hparams)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        h = self.base(x, **kwargs)
        return h + self.up(gelu(self.down(h, self.rule)), self.rule)
