"""LAVA written out from the paper (A Unified Framework for Finetuning Language and Vision Models).

Sums of rank-1 terms, entry by entry. Nothing here knows how the suite stores its tensors.
"""

import torch
from torch import Tensor


def matrix(u: Tensor, v: Tensor) -> Tensor:
    """Eq. 4: sum_r U[:, r] o V[:, r]; u (m, R), v (n, R), the update (m, n)."""
    return sum(torch.outer(u[:, r], v[:, r]) for r in range(u.shape[1]))


def kernel(u: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Eq. 3: sum_r U[:, r] o V[:, r] o X[:, r] o Y[:, r] as a kernel (c_out, c_in, h, w).

    u (c_out, R), v (c_in, R), x (h, R), y (w, R).
    """
    out = torch.zeros(len(u), len(v), len(x), len(y), dtype=u.dtype)
    for r in range(u.shape[1]):
        for o in range(len(u)):
            for i in range(len(v)):
                for a in range(len(x)):
                    for b in range(len(y)):
                        out[o, i, a, b] += u[o, r] * v[i, r] * x[a, r] * y[b, r]
    return out


def reshaped(up: Tensor, down: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Section 3, reshape-involved: LoRA on the kernel flattened to (c_out, rest), folded back.

    up (c_out, R), down (R, rest).
    """
    return (up @ down).reshape(shape)


def penalty(factor: Tensor) -> Tensor:
    """||A^T A - I||_F^2 (section 4.2), entry by entry over A^T A; factor (n, R)."""
    total = torch.zeros((), dtype=factor.dtype)
    for i in range(factor.shape[1]):
        for j in range(factor.shape[1]):
            total = total + (factor[:, i] @ factor[:, j] - (1.0 if i == j else 0.0)) ** 2
    return total


def penalty_gradient(factor: Tensor) -> Tensor:
    """Eq. 5 without lambda: 4 A (A^T A - I)."""
    return 4 * factor @ (factor.T @ factor - torch.eye(factor.shape[1], dtype=factor.dtype))
