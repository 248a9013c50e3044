"""Whole adapters side by side, without sharing: the comparison of ALoRE's Table 4.

    y = x + sum_i act(x D_i + a_i) U_i + c_i,   i = 1 .. n                     (eq. 5, n times)

x (.., d) tokens as rows, D_i (d, r) `down`, a_i (r) `down_bias`, U_i (r, d) `up`, c_i (d)
`up_bias`; the residual is added once. "gelu" is the non-linear form (the paper only writes sigma),
None the linear one, which folds into its layer: with M = I + sum_i D_i U_i and
m = sum_i a_i U_i + c_i, before a layer W' = W M^T, b' = b + W m; after it W' = M^T W,
b' = M^T b + m. U_i starts at zero, D_i Xavier-uniform, biases at zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import Tuner
from peft.layers import add, with_weights


class Stacked(Tuner):
    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        adapters: int = 4,
        activation: str | None = None,
        position: str = "sequential_before",
        dropout: float = 0.0,
    ):
        super().__init__(base)
        if activation not in {None, "gelu"}:
            raise ValueError(f"{activation=}: there is gelu or null")
        if position not in {"sequential_before", "sequential_after"}:
            raise ValueError(f"{position=}: there is sequential_before, sequential_after")
        self.before, self.activation = position == "sequential_before", activation
        width = base.weight.shape[1 if self.before else 0]
        if not 1 <= rank <= width:
            raise ValueError(f"{rank=} must be 1 to {width}, the width")
        self.down = nn.Parameter(torch.empty(adapters, width, rank))
        self.down_bias = nn.Parameter(torch.zeros(adapters, rank))
        self.up = nn.Parameter(torch.zeros(adapters, rank, width))
        self.up_bias = nn.Parameter(torch.zeros(adapters, width))
        for down in self.down:
            nn.init.xavier_uniform_(down)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.before else self.base(x)
        h = z @ self.down.transpose(0, 1).flatten(1) + self.down_bias.flatten()  # (.., n r)
        h = F.gelu(h) if self.activation else h
        y = z + self.dropout(h @ self.up.flatten(0, 1) + self.up_bias.sum(0))
        return self.base(y) if self.before else y

    def merge(self) -> nn.Module:
        if self.activation:
            raise TypeError(f"Stacked with {self.activation} is not linear and cannot be merged")
        weight, bias = self.base.weight, self.base.bias
        k = torch.einsum("iar,irb->ab", self.down, self.up)
        m = torch.einsum("ir,irb->b", self.down_bias, self.up) + self.up_bias.sum(0)
        if self.before:
            return with_weights(self.base, weight + weight @ k.T, add(bias, weight @ m))
        shift = m if bias is None else bias + bias @ k + m
        return with_weights(self.base, weight + k.T @ weight, shift)
