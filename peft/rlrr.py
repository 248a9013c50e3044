"""RLRR: Low-Rank Rescaled Vision Transformer Fine-Tuning. Dong et al., CVPR 2024, arXiv:2403.19067.

    W' = W + s_right * W * s_left,   b' = b + f                                           (eq. 16)

In torch's layout W is (out, in): s_right, here `row`, scales the outputs, and s_left, here `col`,
the inputs, so W'[o, i] = (1 + row[o] col[i]) W[o, i]. The paper adapts q, k and v as separate
layers; in a fused qkv layer `parts=3` gives each its own input vector (the released Swin keeps
one, `parts=1`). The norms and the patch embedding get SSF's scale and shift.

    rank r (section F)      W' = W + (row col) * W,  row (out, r), col (r, in)
    without W (Table 11)    W' = W + row col, to be started with init="zero", as LoRA is
    a convolution (Fig. 3)  its kernels side by side are a matrix of (out kh) x (in kw);
                            it is shifted only where it has a bias
    Table 6                 `sides` left or right drops the other vector, `residual=False` the W
    section H               `derive.combine`: several trained RLRRs as one

Initialisation as released ("rlrr"): row and col Kaiming-uniform on their matrix shapes,
U(+-sqrt(6 / r)) and U(+-sqrt(6 / in)), f zero. The network does not start at the pre-trained
function: a weight moves by 2 / sqrt(in) of its size, 7.2 % at width 768. Table 10 names others
without their numbers. Here "normal" is N(0, std), "uniform" U(+-std), "constant" std, and "zero"
puts one of the two factors at zero: with both there, neither would ever get a gradient. "one" is
N(1, std), commented out in the released code; a design without residual needs it, since any other
start would erase the pre-trained weights.
"""

import torch
from torch import Tensor, nn

from peft.core import WeightTuner
from peft.layers import add


class RLRR(WeightTuner):
    exact_at_init = False

    def __init__(
        self,
        base: nn.Module,
        rank: int = 1,
        parts: int = 1,
        sides: str = "both",
        residual: bool = True,
        times_weight: bool = True,
        init: str = "rlrr",
        std: float = 0.02,
    ):
        super().__init__(base)
        out, into, kh, kw = (*base.weight.shape, 1, 1)[:4]
        rows, columns = out * kh, into * kw
        if out % parts:
            raise ValueError(f"{out} rows do not divide into {parts} parts")
        most = min(rows // parts, columns)
        if not 1 <= rank <= most:
            shape = f"{rows // parts} x {columns}"
            raise ValueError(f"rank={rank} must be 1 to {most}, the smaller side of {shape}")
        if sides not in {"both", "left", "right"}:
            raise ValueError(f"sides={sides!r}: there is both, left, right")
        if sides != "both" and (rank > 1 or not times_weight):
            raise ValueError(f"{sides=} rescales W at rank 1, not with {rank=}, {times_weight=}")
        if not (residual or times_weight):
            raise ValueError("residual and times_weight are both false: nothing is left of W")
        self.residual, self.times_weight = residual, times_weight
        self.exact_at_init = residual and init == "zero"
        self.row = None if sides == "left" else nn.Parameter(torch.empty(rows, rank))
        self.col = None if sides == "right" else nn.Parameter(torch.empty(parts, rank, columns))
        shifted = base.weight.dim() == 2 or base.bias is not None
        self.shift = nn.Parameter(torch.zeros(out)) if shifted else None
        if self.row is not None:
            fill(self.row, rank, init, std)
        if self.col is not None:
            fill(self.col, columns, "rlrr" if init == "zero" and sides == "both" else init, std)

    def scale(self, weight: Tensor) -> Tensor:
        """`row col` in the shape of `weight`."""
        out, into, kh, kw = (*weight.shape, 1, 1)[:4]
        parts = 1 if self.col is None else len(self.col)
        row, col = self.row, self.col  # -> (parts, out kh / parts, r), (parts, r, in kw)
        if row is not None:
            row = row.view(parts, -1, row.shape[1])
        if row is None or col is None:
            scale = (col if row is None else row).expand(parts, out * kh // parts, into * kw)
        else:
            scale = row * col if row.shape[2] == 1 else row @ col
        return scale.reshape(out, kh, into, kw).transpose(1, 2).reshape(weight.shape)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.scale(weight) * weight if self.times_weight else self.scale(weight)
        bias = bias if self.shift is None else add(bias, self.shift)
        return weight + delta if self.residual else delta, bias


@torch.no_grad()
def fill(factor: Tensor, fan: int, init: str, std: float) -> None:
    """One of the initialisations of Table 10, in place; `fan` is the fan-in of a Kaiming draw."""
    draw = {
        "rlrr": lambda: factor.uniform_(-((6 / fan) ** 0.5), (6 / fan) ** 0.5),
        "normal": lambda: factor.normal_(0, std),
        "uniform": lambda: factor.uniform_(-std, std),
        "constant": lambda: factor.fill_(std),
        "zero": factor.zero_,
        "one": lambda: factor.normal_(1, std),
    }
    if init not in draw:
        raise ValueError(f"init={init!r}: there is {', '.join(draw)}")
    draw[init]()
