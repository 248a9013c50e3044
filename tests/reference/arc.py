"""ARC, literally. Dong et al., NeurIPS 2023, arXiv:2310.06234. Float64, no project import."""

import numpy as np


def arc(x, project, coefficients, bias):
    """X_out = X_in + (X_in W_proj) diag(c) W_proj^T + b: the up-projection is the transpose of the
    shared down-projection, recalibrated by one coefficient per direction. x (N, d), project (d,
    r)."""
    width, rank = project.shape
    out = np.zeros_like(x)
    for n, token in enumerate(x):
        code = [
            sum(token[i] * project[i, j] for i in range(width)) * coefficients[j]
            for j in range(rank)
        ]
        out[n] = token + np.array(
            [sum(code[j] * project[i, j] for j in range(rank)) + bias[i] for i in range(width)]
        )
    return out


def swin_block(x, attention, feed_forward, project, coefficients, bias):
    """Swin: the feed-forward ARC adapts the residual stream itself, before the norm. Both branches
    hold their own norms."""
    x = x + attention(x)
    x = arc(x, project, coefficients, bias)
    return x + feed_forward(x)
