"""FacT to the letter: the network is one tensor (12 L, d, d), its increment a small decomposition.

Jie and Deng, FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023,
arXiv:2212.03145, sections on tensorising a ViT, FacT-TT and FacT-TK.

The paper multiplies from the right (X W, W of inputs x outputs). A layer contributes twelve d x d
slices in the order W_q, W_k, W_v, W_o, the four column blocks of W_up (d x 4d) and the four row
blocks of W_down (4d x d).
    FacT-TT   dW[i, j, k] = s sum_{a, b} Sigma[i, a, b] U[j, a] V[k, b]
    FacT-TK   dW[i, j, k] = s sum_{a, b, c} C[a, b, c] P[i, a] U[j, b] V[k, c]
Loops over the small indices, numpy alone, float64.
"""

import numpy as np


def tensor_train(sigma: np.ndarray, u: np.ndarray, v: np.ndarray, s: float) -> np.ndarray:
    """dW (12 L, d, d) from Sigma (12 L, r, r), U (d, r), V (d, r)."""
    increment = np.zeros((len(sigma), len(u), len(v)))
    for i in range(len(sigma)):
        for a in range(u.shape[1]):
            for b in range(v.shape[1]):
                increment[i] += s * sigma[i, a, b] * np.outer(u[:, a], v[:, b])
    return increment


def tucker(core: np.ndarray, p: np.ndarray, u: np.ndarray, v: np.ndarray, s: float) -> np.ndarray:
    """dW (12 L, d, d) from C (r, r, r), P (12 L, r), U (d, r), V (d, r)."""
    increment = np.zeros((len(p), len(u), len(v)))
    for i in range(len(p)):
        for a in range(core.shape[0]):
            for b in range(core.shape[1]):
                for c in range(core.shape[2]):
                    increment[i] += s * core[a, b, c] * p[i, a] * np.outer(u[:, b], v[:, c])
    return increment


def layers(increment: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The slices in torch's layout (outputs x inputs), by layer; q, k, v fused as timm has them."""
    found = []
    for first in range(0, len(increment), 12):
        q, k, v, o, *mlp = increment[first : first + 12]
        qkv = np.concatenate([q.T, k.T, v.T])
        w_up = np.concatenate(mlp[:4], axis=1)
        w_down = np.concatenate(mlp[4:], axis=0)
        found.append({"qkv": qkv, "proj": o.T, "fc1": w_up.T, "fc2": w_down.T})
    return found
