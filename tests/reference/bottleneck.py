"""Bottleneck adapters, literally: one token at a time, one sum at a time, in float64. Imports
nothing of the project."""

import math

import numpy as np


def gelu(z):
    """z * Phi(z), the exact GELU (Hendrycks & Gimpel, arXiv:1606.08415, section 2)."""
    return 0.5 * z * (1.0 + math.erf(z / math.sqrt(2.0)))


def quick_gelu(z):
    """z * sigmoid(1.702 z) (the same paper, section 2)."""
    return z / (1.0 + math.exp(-1.702 * z))


def relu(z):
    return max(z, 0.0)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "relu": relu}


def branch(token, down, down_bias, up, up_bias, activation):
    """U act(D h + b_D) + b_U for one token h: down (b, d), up (d, b). Houlsby et al.,
    arXiv:1902.00751, section 2.1."""
    act = ACTIVATIONS[activation]
    hidden, width = down.shape
    code = [
        act(sum(down[j, i] * token[i] for i in range(width)) + down_bias[j]) for j in range(hidden)
    ]
    return np.array(
        [sum(up[i, j] * code[j] for j in range(hidden)) + up_bias[i] for i in range(width)]
    )


def tokens(function, x):
    """Applies a function of one token to every token of x (..., d)."""
    flat = x.reshape(-1, x.shape[-1])
    return np.stack([function(token) for token in flat]).reshape(x.shape)


def adapter(h, weights, activation):
    """h + branch(h): the adapter's own skip connection, h the output of the sub-layer
    (arXiv:1902.00751, figure 2)."""
    return h + tokens(lambda token: branch(token, *weights, activation), h)


def adapter_plus(x, weights, scale):
    """x + s * Adapter(x), x the residual stream after both sub-layers, s one number per channel.
    Steitz & Roth, CVPR 2024, arXiv:2406.06820: the Post-Adapter position and channel-wise
    scaling."""
    return x + tokens(lambda token: scale * branch(token, *weights, "gelu"), x)


def adaptformer(x, attention, norm, mlp, weights, scale):
    """x' = x + attention(x);  x_hat = ReLU(x' W_down) W_up;  out = MLP(LN(x')) + s x_hat + x'. Chen
    et al., NeurIPS 2022, arXiv:2205.13535, section 3.2. The branch reads x' itself, as in the
    released code; the paper's figure shows it behind the norm. `attention` holds its own norm."""
    middle = x + attention(x)
    adapted = tokens(lambda token: branch(token, *weights, "relu"), middle)
    return mlp(norm(middle)) + scale * adapted + middle


def res_tuning(x, operation, weights):
    """OP(x) + Res-Tuner(x). Jiang et al., NeurIPS 2023, arXiv:2310.19859: a frozen operation beside
    its own tuner."""
    return operation(x) + tokens(lambda token: branch(token, *weights, "gelu"), x)
