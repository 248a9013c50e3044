"""LAVA: A Unified Framework for Finetuning Language and Vision Models. Its code is an anonymous
link, not read for this file.

    matrix        Delta = sum_r U[:, r] o V[:, r] = U V^T                                 (eq. 4)
    convolution   Delta[o, i, h, w] = sum_r U[o, r] V[i, r] X[h, r] Y[w, r]               (eq. 3)
    loss          L + lambda sum_layers ||A^T A - I||_F^2, A one of the factors   (section 4.2)

W' = W + (alpha / R) Delta with `u` (out, R), `v` (in, R), `x` (kh, R), `y` (kw, R), R the rank;
alpha = R unless given, as the equations have no such scale (settings do: 8 / 8 for GLUE, 32 / 3 for
segmentation). `reshaped` is the paper's comparison, LoRA on the flattened kernel: `v` is
(in kh kw, R). In a fused qkv layer `parts` names the row blocks adapted, [0, 2] being query and
value.

`ortho` is the factor A under the penalty: u, v, x, y or both (u and v). By default it is V in a
matrix, which section 4.2 calls the basis and through which B's gradient passes (eq. 5 and
Proposition 1, where A is the down-projection and the Gram matrix fits its transpose only), and U in
a convolution (Fig. 11). No initialisation is stated. The penalty pulls its factor towards
orthonormal columns, so that factor starts orthonormal and its partner at zero: the size of Delta
lies in the partner, and the network starts unchanged. With "both" the orthonormal one is U. X and Y
are N(0, 1 / k), columns of length about 1.

The forward pass runs the factors one after another (1 x 1, kh x 1, 1 x kw, 1 x 1 convolutions).
In a grouped convolution the paper's counts take all input channels: there Delta is dense and does
not fold into the kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import WeightTuner
from peft.layers import innermost


class LAVA(WeightTuner):
    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        strength: float = 0.1,
        ortho: str | None = None,
        reshaped: bool = False,
        dropout: float = 0.0,
        parts: tuple[int, ...] | None = None,
        of: int = 3,
    ):
        super().__init__(base)
        self.groups = getattr(base, "groups", 1)
        out, into, *kernel = base.weight.shape
        self.parts, self.of = ((0,), 1) if parts is None else (tuple(parts), of)
        if kernel and parts is not None:
            raise ValueError(
                f"parts={parts} are row blocks of a linear layer, not of a convolution"
            )
        if out % self.of:
            raise ValueError(f"{out} rows do not divide into {self.of} parts")
        rows, into = out // self.of, into * self.groups
        whole = bool(kernel) and not reshaped
        columns = into if whole else into * math.prod(kernel)
        most = rows if whole else min(rows, columns)
        if not 1 <= rank <= most:
            raise ValueError(f"{rank=} must be 1 to {most} for a weight of {rows} x {columns}")
        self.scale = 1.0 if alpha is None else alpha / rank
        self.strength, self.ortho = strength, ortho or ("u" if whole else "v")
        self.u = nn.Parameter(torch.zeros(len(self.parts), rows, rank))
        self.v = nn.Parameter(torch.zeros(len(self.parts), columns, rank))
        self.x = nn.Parameter(torch.randn(kernel[0], rank) / kernel[0] ** 0.5) if whole else None
        self.y = nn.Parameter(torch.randn(kernel[1], rank) / kernel[1] ** 0.5) if whole else None
        if self.regularised() is None:
            raise ValueError(f"{ortho=} names no factor of a {type(base).__name__}: u, v or both")
        for start in self.v if self.ortho == "v" else self.u:
            nn.init.orthogonal_(start)
        self.dropout = nn.Dropout(dropout)

    def regularised(self) -> list[Tensor] | None:
        """The factors under the penalty, each (.., n, R)."""
        known = {"u": [self.u], "v": [self.v], "both": [self.u, self.v]}
        known |= {"x": [self.x], "y": [self.y]} if self.x is not None else {}
        return known.get(self.ortho)

    def penalty(self) -> Tensor:
        gap = [f.mT @ f - torch.eye(f.shape[-1], device=f.device) for f in self.regularised()]
        return self.strength * sum(g.square().sum() for g in gap)

    def down(self) -> Tensor:
        """The update's first step as rows (parts R, ..): (parts R, in), or a whole kernel."""
        down = self.v.mT.flatten(0, 1)
        if self.x is not None:
            return torch.einsum("ri,hr,wr->rihw", down, self.x, self.y)
        return down.unflatten(1, (-1, *self.base.weight.shape[2:]))

    def up(self) -> Tensor:
        """U in its row blocks: (out, parts R)."""
        blocks = [torch.zeros_like(self.u[0])] * self.of
        columns = []
        for u, part in zip(self.u, self.parts):
            columns.append(torch.cat([*blocks[:part], u, *blocks[part + 1 :]]))
        return self.scale * torch.cat(columns, dim=1)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.groups > 1:
            raise TypeError(f"an update of all channels does not fold into {self.groups} groups")
        return weight + torch.einsum("or,r...->o...", self.up(), self.down()), bias

    def forward(self, x: Tensor) -> Tensor:
        z, conv = self.dropout(x), innermost(self.base)
        if isinstance(conv, nn.Linear):
            return self.base(x) + F.linear(F.linear(z, self.down()), self.up())
        if type(conv).forward is not nn.Conv2d.forward or conv.padding_mode != "zeros":
            return super().forward(x)  # other paddings are known to the whole kernel only
        stride, padding, dilation = conv.stride, conv.padding, conv.dilation
        if self.x is None:
            z = F.conv2d(z, self.down(), None, stride, padding, dilation)
        else:
            (sh, sw), (ph, pw), (dh, dw), rank = stride, padding, dilation, len(self.x.T)
            z = F.conv2d(z, self.v[0].T[:, :, None, None])
            x_, y_ = self.x.T[:, None, :, None], self.y.T[:, None, None, :]
            z = F.conv2d(z, x_, None, (sh, 1), (ph, 0), (dh, 1), groups=rank)
            z = F.conv2d(z, y_, None, (1, sw), (0, pw), (1, dw), groups=rank)
        return self.base(x) + F.conv2d(z, self.up()[:, :, None, None])
