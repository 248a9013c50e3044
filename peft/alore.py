"""ALoRE: Efficient Visual Adaptation via Aggregating Low Rank Experts. No public code.

    y = x + drop(x K),   K = sum_i S_i (x) (D_i U_i),   i = 1 .. n                      (eqs. 6, 7)

x (.., d) tokens as rows, S_i (n, n) `scale`, D_i (d/n, r) `down`, U_i (r, d/n) `up`, (x) Kronecker.
No bias, no activation. K is never formed in training: with x as n chunks x_p of d/n numbers,

    y_q = x_q + sum_i (sum_p S_i[p, q] x_p D_i) U_i.

Sequential, before the layer (qkv for MHA, fc1 for FFN) or after it (proj, fc2). With M = I + K and
W (out, in) in torch's layout it folds into the layer (eq. 8):

    before   W' = W M^T,  b' = b          after   W' = M^T W,  b' = M^T b

One set {S_i} of n^3 numbers serves all layers and sites: only that makes the counts of Table 6b
(0.18 M with 32 experts). The paper states no initialisation. Here U_i = 0, so the network starts
unchanged, D_i is Xavier-uniform, and S_i is "glorot" (uniform), "orthogonal" or "normal",
N(0, 0.01^2), the default of Compacter's code. Dropout acts on the sum, before the residual (B.2).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft.core import Tuner, WeightTuner
from peft.layers import channel_dim


class ALoRE(WeightTuner):
    def __init__(
        self,
        base: nn.Module,
        scale: nn.Parameter,
        rank: int = 4,
        position: str = "sequential_before",
        dropout: float = 0.0,
    ):
        super().__init__(base)
        if position not in {"sequential_before", "sequential_after"}:
            raise ValueError(f"{position=}: there is sequential_before, sequential_after")
        self.before, self.groups = position == "sequential_before", getattr(base, "groups", 1)
        width = base.weight.shape[1] * self.groups if self.before else base.weight.shape[0]
        n, chunk = len(scale), width // len(scale)
        if width % n:
            raise ValueError(f"experts={n} do not divide the width {width}")
        if not 1 <= rank <= chunk:
            raise ValueError(f"{rank=} must be 1 to {chunk}: width {width} over {n} experts")
        self.scale = scale
        self.down = nn.Parameter(torch.empty(n, chunk, rank))
        self.up = nn.Parameter(torch.zeros(n, rank, chunk))
        for down in self.down:
            nn.init.xavier_uniform_(down)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def over(
        cls,
        bases: Mapping[str, nn.Module],
        experts: int = 4,
        scale_init: str = "glorot",
        **hparams,
    ) -> dict[str, Tuner]:
        draw = {
            "glorot": nn.init.xavier_uniform_,
            "orthogonal": nn.init.orthogonal_,
            "normal": lambda s: nn.init.normal_(s, 0, 0.01),
        }
        if experts < 1:
            raise ValueError(f"{experts=} must be at least 1")
        if scale_init not in draw:
            raise ValueError(f"scale_init={scale_init!r}: there is {', '.join(draw)}")
        scale = nn.Parameter(torch.empty(experts, experts, experts))
        for one in scale:
            draw[scale_init](one)
        return super().over(bases, scale=scale, **hparams)

    def update(self, x: Tensor) -> Tensor:
        """x K for x (.., d)."""
        n, chunk, rank = self.down.shape
        h = x.unflatten(-1, (n, chunk)) @ self.down.transpose(0, 1).flatten(1)  # (.., p, i r)
        h = torch.einsum("ipq,...pir->...qir", self.scale, h.unflatten(-1, (n, rank)))
        return (h.flatten(-2) @ self.up.flatten(0, 1)).flatten(-2)

    def matrix(self) -> Tensor:
        """M = I + K, (d, d): for merging and tests."""
        kron = torch.einsum("ipq,iar,irb->paqb", self.scale, self.down, self.up)
        width = kron.shape[0] * kron.shape[1]
        return torch.eye(width, dtype=kron.dtype, device=kron.device) + kron.reshape(width, width)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.groups > 1:
            raise TypeError(f"a mixing of all channels does not fold into {self.groups} groups")
        m = self.matrix()
        if self.before:
            return torch.einsum("oi...,ji->oj...", weight, m), bias
        return torch.einsum("oi...,oj->ji...", weight, m), None if bias is None else bias @ m

    def forward(self, x: Tensor) -> Tensor:
        z, nchw = x if self.before else self.base(x), channel_dim(self.base) == 1
        update = self.update(z.movedim(1, -1)).movedim(-1, 1) if nchw else self.update(z)
        y = z + self.dropout(update)
        return self.base(y) if self.before else y
