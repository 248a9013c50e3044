"""SVDiff to the letter: singular values shift, singular vectors stay.

Han et al., SVDiff: Compact Parameter Space for Diffusion Fine-Tuning, ICCV 2023, arXiv:2303.11305,
section on the compact parameter space (spectral shifts):
    W = U diag(sigma) V^T,   W_delta = U diag(ReLU(sigma + delta)) V^T
A kernel (c_out, c_in, h, w) is decomposed as the matrix (c_out, c_in h w). numpy alone, float64.
"""

import numpy as np


def shifted(weight: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """W_delta, of the shape of W, for delta in the order of falling singular values."""
    matrix = weight.reshape(len(weight), -1)
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    total = np.zeros_like(matrix)
    for i, value in enumerate(sigma + delta):
        total += max(value, 0.0) * np.outer(u[:, i], vt[i])
    return total.reshape(weight.shape)
