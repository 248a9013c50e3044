"""Convpass, literally: the image grid as a dictionary of tokens. Jie & Deng, arXiv:2207.07039,
section 3. Float64, no project import."""

import math

import numpy as np


def quick_gelu(z):
    return z / (1.0 + math.exp(-1.702 * z))


def convolve(grid, kernel, bias):
    """A 3 x 3 convolution with zero padding by its definition: grid (rows, columns, c), kernel
    (c_out, c_in, 3, 3)."""
    rows, columns, channels = grid.shape
    out = np.zeros((rows, columns, len(kernel)))
    for r in range(rows):
        for c in range(columns):
            for o in range(len(kernel)):
                total = bias[o]
                for i in range(channels):
                    for dr in (-1, 0, 1):
                        for dc in (-1, 0, 1):
                            if 0 <= r + dr < rows and 0 <= c + dc < columns:
                                total += kernel[o, i, dr + 1, dc + 1] * grid[r + dr, c + dc, i]
                out[r, c, o] = total
    return out


def convpass(z, prefix, down, down_bias, kernel, kernel_bias, up, up_bias):
    """up(QuickGELU(conv(QuickGELU(down(z))))) for one image z (N, d); the first `prefix` tokens,
    such as the class token, are images of one pixel of their own: the same convolution sees only
    itself and padding there."""
    act = np.vectorize(quick_gelu)
    code = act(z @ down.T + down_bias)
    side = math.isqrt(len(z) - prefix)
    assert side * side == len(z) - prefix
    parts = [convolve(token[None, None], kernel, kernel_bias)[0] for token in code[:prefix]]
    parts.append(
        convolve(code[prefix:].reshape(side, side, -1), kernel, kernel_bias).reshape(
            side * side, -1
        )
    )
    return act(np.concatenate(parts)) @ up.T + up_bias
