"""The fixed projections of SuperLoRA (supplement, eq. 3 and section A.10), by fast Walsh-Hadamard.

    identity   F(z) = z                     shuffle   F(z) = z Pi
    linear     F(z) = z H' diag(G) Pi H diag(B)          B Rademacher of size N_out
    linear_v2  as linear with G' ~ N(0, 1) of size N_out for B
    nonlinear, nonlinear_v2   tanhshrink of the two, t - tanh t

H is the orthonormal Walsh-Hadamard matrix of size 2^n, n = ceil(log2 max(N_in, N_out)), H' its
first N_in rows (z padded with zeros), the last H its first N_out columns; G ~ N(0, 1) and the
permutation Pi have size 2^n. All of it follows from the seed, is drawn on the CPU so that every
device has the same, never trains and is in no checkpoint. The output has about N_in / 2^n of the
input's variance, so it depends on how far N_out lies below a power of two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANTS = ("identity", "shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2")


def fwht(x: Tensor) -> Tensor:
    """x H for x (.., 2^n), H = H_2 (x) .. (x) H_2.

    Five factors at a time, as a 32 x 32 product on the leading digits of the index, which then go
    last: n 2^n 32 / 5 products instead of 4^n, and far fewer passes over the vector than additions
    in pairs. Never in half precision, where sums over 2^n numbers would drown.
    """
    bit, left = torch.arange(2, device=x.device), (x.shape[-1] - 1).bit_length()
    two = (1 - 2 * torch.outer(bit, bit)).to(x.dtype) / 2**0.5
    with torch.autocast(x.device.type, enabled=False):
        while left:
            digits = min(5, left)
            h = two
            for _ in range(digits - 1):
                h = torch.kron(h, two)
            x = (x.unflatten(-1, (2**digits, -1)).mT @ h).flatten(-2)
            left -= digits
    return x


class Projection(nn.Module):
    """F for up to `n_in` numbers to up to `n_out`; smaller ones use the same draws, cut short."""

    def __init__(self, variant: str, n_in: int, n_out: int, seed: int = 0):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"projection={variant!r}: there is {', '.join(VARIANTS)}")
        if variant in {"identity", "shuffle"} and n_in != n_out:
            raise ValueError(f"{variant} makes {n_in} numbers of {n_in}, not {n_out}: take ratio=1")
        self.variant, self.flat = variant, variant.startswith("nonlinear")  # flat at zero
        size = n_out if variant == "shuffle" else 1 << (max(n_in, n_out) - 1).bit_length()
        draws, cpu = torch.Generator().manual_seed(seed), torch.device("cpu")
        if variant != "identity":
            order = torch.randperm(size, generator=draws, device=cpu)
            self.register_buffer("permutation", order, persistent=False)
        if variant not in {"identity", "shuffle"}:
            gauss = torch.randn(size, generator=draws, device=cpu)
            last = torch.randn(n_out, generator=draws, device=cpu)
            last = last if variant.endswith("_v2") else torch.where(last < 0, -1.0, 1.0)
            self.register_buffer("gauss", gauss, persistent=False)
            self.register_buffer("last", last, persistent=False)

    def forward(self, z: Tensor, n_out: int) -> Tensor:
        """z (N_in) -> (N_out)."""
        if self.variant == "identity":
            return z
        if self.variant == "shuffle":
            whole = n_out == len(self.permutation)
            order = self.permutation if whole else self.permutation[:n_out].argsort()
            return z.index_select(0, order)
        y = fwht(F.pad(z, (0, len(self.gauss) - len(z)))) * self.gauss
        y = y.index_select(0, self.permutation)  # whose backward is cheaper than that of y[..]
        y = fwht(y)[:n_out] * self.last[:n_out]
        return F.tanhshrink(y) if self.flat else y
