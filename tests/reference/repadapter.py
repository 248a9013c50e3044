"""RepAdapter, literally. Luo et al., arXiv:2302.08106. Float64, no project import."""

import numpy as np


def dense_up(up, groups):
    """The group-wise transformation as a dense (d, b) matrix: block g maps codes g b/G ... to
    channels g d/G ... (section 3.3)."""
    width, share = up.shape
    dense = np.zeros((width, share * groups))
    for i in range(width):
        group = i // (width // groups)
        for j in range(share):
            dense[i, group * share + j] = up[i, j]
    return dense


def repadapter(x, down, down_bias, up, up_bias, groups, scale):
    """f(x) = x + s phi_u(phi_d(x)) (section 3.3), both projections affine and without activation; x
    (N, d)."""
    out = np.zeros_like(x)
    dense = dense_up(up, groups)
    for n, token in enumerate(x):
        code = np.array(
            [
                sum(down[j, i] * token[i] for i in range(len(token))) + down_bias[j]
                for j in range(len(down))
            ]
        )
        out[n] = token + scale * (dense @ code + up_bias)
    return out
