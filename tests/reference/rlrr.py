"""RLRR written out from the paper (Dong et al., CVPR 2024, arXiv:2403.19067), as it writes: X W.

W is (in, out). Loops over single entries, three separate layers for query, key and value, and the
rescaled matrix formed in full. Nothing here knows how the suite stores its tensors.
"""

import torch
from torch import Tensor


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    s_left: Tensor | None,
    s_right: Tensor | None,
    f: Tensor,
    residual: bool = True,
) -> Tensor:
    """X (W + s_left * W * s_right^T) + b + f (eq. 16), entry by entry as in eq. 19.

    x (N, in), w (in, out), s_left (in), s_right (out). A side that is None is left out, and
    without `residual` the frozen W is (the six rows of Table 6).
    """
    adapted = torch.empty_like(w)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            scale = 1.0
            if s_left is not None:
                scale = scale * s_left[i]
            if s_right is not None:
                scale = scale * s_right[j]
            adapted[i, j] = ((1.0 if residual else 0.0) + scale) * w[i, j]
    return x @ adapted + (0 if b is None else b) + f


def ranked(
    x: Tensor, w: Tensor, b: Tensor, left: Tensor, right: Tensor, f: Tensor, times_w: bool = True
) -> Tensor:
    """Section F: X (W + (S_left S_right) * W) + b + f with S_left (in, r) and S_right (r, out).

    Without the factor W, the comparison of Table 11: X (W + S_left S_right) + b + f.
    """
    delta = sum(torch.outer(left[:, k], right[k]) for k in range(left.shape[1]))
    return x @ (w + (delta * w if times_w else delta)) + b + f


def convolution(kernel: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Section G and Fig. 3: the kernels side by side form one matrix W'. Returns the new kernel.

    Kernel (o, i) of (co, ci, kh, kw) is the kh x kw tile at row o and column i of a matrix
    (co kh) x (ci kw), which is rescaled as in section F: `left` (co kh, r) scales its rows and
    `right` (r, ci kw) its columns.
    """
    co, ci, kh, kw = kernel.shape
    matrix = torch.cat(
        [torch.cat([kernel[o, i] for i in range(ci)], dim=1) for o in range(co)], dim=0
    )
    matrix = matrix + (left @ right) * matrix
    out = torch.empty_like(kernel)
    for o in range(co):
        for i in range(ci):
            out[o, i] = matrix[o * kh : (o + 1) * kh, i * kw : (i + 1) * kw]
    return out


def combined(
    lefts: list[Tensor], rights: list[Tensor], shifts: list[Tensor], weights: list[float], form: str
) -> tuple[Tensor, Tensor]:
    """Section H: the scale matrix (in, out) and the shift of N combined RLRRs.

    s_left (in), s_right (out). "vectors" averages each side before the outer product; "products"
    sums the outer products, here weighted (the paper prints that sum without w_i).
    """
    shift = sum(w * f for w, f in zip(weights, shifts, strict=True))
    if form == "vectors":
        left = sum(w * s for w, s in zip(weights, lefts, strict=True))
        right = sum(w * s for w, s in zip(weights, rights, strict=True))
        return torch.outer(left, right), shift
    return sum(w * torch.outer(a, c) for w, a, c in zip(weights, lefts, rights, strict=True)), shift
