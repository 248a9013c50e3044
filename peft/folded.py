"""Many numbers as one tensor of few parameters: the forms of SuperLoRA's groups (supplement, A.2).

    cp      sum_r A_1[:, r] o .. o A_M[:, r], A_m (d_m, r): LoRTA with an identity core, and with
            M = 2 the product of LoRA's factors
    tucker  C x_1 A_1 .. x_M A_M, C (r, .., r): LoRTA                                      (eq. 2)
    kron    K_1 (x) .. (x) K_{K-1} (x) (A B), K_k (f, f), A (m, r), B (r, m'): LoNkr, with K = 2
            LoKr. f is 6, 8 or 10; the last split, not stated, is the smallest that covers the rest
    dense   every number itself

The numbers are the tensor's entries in row-major order. Any run of them is computed alone, from
rows of the tensor unfolded as a matrix with its last floor(M / 2) modes as columns.

No initialisation is stated. One tensor (A_1, C or A; dense: all) starts at zero, so the numbers do.
The others are N(0, s^2) such that a step on it moves a number as far as in a LoRA of that side,
whose down matrix has variance 1 / (3 side). With `exact=False` none is zero and the numbers have
standard deviation 0.1: behind a function that is flat at zero, nothing would ever train.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Folded(nn.Module):
    def __init__(
        self,
        shape: Sequence[int],
        form: str = "cp",
        rank: int = 8,
        splits: int = 2,
        factor: int = 8,
        exact: bool = True,
    ):
        """`shape`: the sides (d_1, .., d_M); for "dense" only their product counts."""
        super().__init__()
        self.shape, self.form, order = tuple(shape), form, len(shape)
        most = -(-min(shape) // factor ** (splits - 1)) if form == "kron" else min(shape)
        if form != "dense" and not 1 <= rank <= most and not (form == "cp" and order > 2):
            what = f"{splits=} with {factor=} leave of" if form == "kron" else "is the smallest of"
            raise ValueError(f"{rank=} must be 1 to {most}, which {what} {self.shape}")
        self.leading = order - order // 2
        self.width = 1 if form == "dense" else math.prod(shape[self.leading :])
        if form == "cp":
            new, terms = [(side, rank) for side in shape], rank
        elif form == "tucker":
            new, terms = [(rank,) * order, *((side, rank) for side in shape)], rank**order
        elif form == "kron" and order == 2:
            if splits < 2:
                raise ValueError(f"{splits=}: a Kronecker product has at least 2")
            block = factor ** (splits - 1)
            rows, columns = (-(-side // block) for side in shape)
            new, terms = [(rows, rank), (rank, columns), *[(factor, factor)] * (splits - 1)], rank
        elif form == "dense":
            new, terms = [(math.prod(shape),)], 1
        else:
            raise ValueError(
                f"{form=} of order {order}: there is cp, tucker, kron (order 2), dense"
            )
        self.tensors = nn.ParameterList(torch.zeros(size) for size in new)
        std = (3 * shape[-1]) ** (-0.5 / max(1, len(new) - 1))
        if not exact:
            std = (0.1 / terms**0.5) ** (1 / len(new))
        for tensor in self.tensors[1 if exact else 0 :]:
            nn.init.normal_(tensor, 0, std)

    def span(self, start: int, stop: int) -> Tensor:
        """The numbers from `start` up to `stop`, (stop - start)."""
        if self.form == "dense":
            return self.tensors[0][start:stop]
        first = start // self.width
        rows = self.rows(first, -(-stop // self.width))
        return rows.flatten()[start - first * self.width : stop - first * self.width]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows of the unfolded tensor, (last - first, width)."""
        index = torch.arange(first, last, device=self.tensors[0].device)
        if self.form == "kron":
            a, b, *splits = self.tensors
            left = torch.ones_like(splits[0][:1, :1])
            for split in splits:
                left = torch.kron(left, split)
            low = a[index % len(a)] @ b  # (rows, m'), beside it the entries of the left splits
            return (left[index // len(a)].unsqueeze(-1) * low.unsqueeze(-2)).flatten(1)[
                :, : self.width
            ]
        factors = list(self.tensors)[-len(self.shape) :]
        columns = torch.arange(self.width, device=index.device)
        left = self.entries(factors[: self.leading], index)
        right = self.entries(factors[self.leading :], columns)
        if self.form == "cp":
            return left @ right.T
        return left @ self.tensors[0].reshape(left.shape[1], -1) @ right.T

    def entries(self, factors: list[Tensor], index: Tensor) -> Tensor:
        """The factors' entries at places of their modes: (places, r), tucker (places, r^modes)."""
        out, stride = None, math.prod([len(f) for f in factors])
        for f in factors:
            stride //= len(f)
            row = f[index // stride % len(f)]
            if out is None:
                out = row
            elif self.form == "cp":
                out = out * row
            else:
                out = (out.unsqueeze(-1) * row.unsqueeze(-2)).flatten(1)
        return out
