"""VPT's MLP-k head, literally, with running statistics. Jia et al., arXiv:2203.12119 (released
code). Float64, no project import."""

import numpy as np


def mlp_head(x, hidden, classifier):
    """x (d,) of one image; hidden: one (weight, bias, mean, var, gamma, beta, eps) per layer;
    classifier: (weight, bias)."""
    for weight, bias, mean, var, gamma, beta, eps in hidden:
        x = np.maximum(weight @ x + bias, 0.0)
        x = (x - mean) / np.sqrt(var + eps) * gamma + beta
    return classifier[0] @ x + classifier[1]
