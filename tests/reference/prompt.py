"""VPT, literally: the sequence is written out, head by head. Jia et al., ECCV 2022,
arXiv:2203.12119. Float64, no project import.

Weights come as a dictionary of arrays under timm's names for one block, `norm1.weight`,
`attn.qkv.weight` ... (out, in).
"""

import math

import numpy as np


def gelu(z):
    return 0.5 * z * (1.0 + math.erf(z / math.sqrt(2.0)))


def norm(x, weight, bias, eps):
    return np.stack(
        [
            (row - row.mean()) / math.sqrt(((row - row.mean()) ** 2).mean() + eps) * weight + bias
            for row in x
        ]
    )


def softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def attention(x, w, heads, score_bias=None):
    """softmax(Q K^T / sqrt(d_h) + bias) V for every head; x (N, d), bias (heads, N, N)."""
    q, k, v = np.split(x @ w["attn.qkv.weight"].T + w["attn.qkv.bias"], 3, axis=-1)
    size, outputs = x.shape[-1] // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        outputs.append(
            softmax(scores if score_bias is None else scores + score_bias[h]) @ v[:, part]
        )
    return np.concatenate(outputs, -1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]


def mlp(x, w):
    return (
        np.vectorize(gelu)(x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T
        + w["mlp.fc2.bias"]
    )


def block(x, w, heads, eps):
    x = x + attention(norm(x, w["norm1.weight"], w["norm1.bias"], eps), w, heads)
    return x + mlp(norm(x, w["norm2.weight"], w["norm2.bias"], eps), w)


def shallow(x, prompts, blocks, heads, eps):
    """[x_1, Z_1, E_1] = L_1([x_0, P, E_0]);  [x_i, Z_i, E_i] = L_i([x_{i-1}, Z_{i-1}, E_{i-1}])
    (eqs. 4 and 5). x (1 + N, d) with the class token first; returns the class token and the
    patches, without the prompts."""
    count = len(prompts)
    x = np.concatenate([x[:1], prompts, x[1:]])
    for w in blocks:
        x = block(x, w, heads, eps)
    return np.concatenate([x[:1], x[1 + count :]])


def deep(x, prompts, blocks, heads, eps):
    """[x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]) (eq. 7): every block has prompts of its own,
    its outputs for them are dropped."""
    for own, w in zip(prompts, blocks, strict=True):
        x = shallow(x, own, [w], heads, eps)
    return x


def swin_block(x, prompts, w, heads, eps, window, shift, table):
    """One Swin block on one image x (H, W, d) with prompts (p, d): returns both. Appendix A of the
    paper: prompts join every window, are averaged over windows after the attention, have neither
    relative position bias nor shift mask, and pass the MLP. `table` ((2 window - 1)^2, heads) is
    the relative position bias."""
    height, breadth, width = x.shape
    count = len(prompts)
    normed = norm(x.reshape(-1, width), w["norm1.weight"], w["norm1.bias"], eps).reshape(x.shape)
    normed_prompts = norm(prompts, w["norm1.weight"], w["norm1.bias"], eps)
    attended, prompt_sum, windows = np.zeros_like(x), np.zeros_like(prompts), 0
    for top in range(0, height, window):
        for left in range(0, breadth, window):
            # where each token of this window lies in the unshifted image, and in which region of
            # the shifted one
            cells = [
                ((top + i + shift) % height, (left + j + shift) % breadth)
                for i in range(window)
                for j in range(window)
            ]
            region = [
                (_region(top + i, height, window, shift), _region(left + j, breadth, window, shift))
                for i in range(window)
                for j in range(window)
            ]
            bias = np.zeros((heads, count + window**2, count + window**2))
            for a in range(window**2):
                for b in range(window**2):
                    dr, dc = a // window - b // window, a % window - b % window
                    entry = table[(dr + window - 1) * (2 * window - 1) + dc + window - 1].copy()
                    if region[a] != region[b]:
                        entry += -100.0
                    bias[:, count + a, count + b] = entry
            joined = np.concatenate([normed_prompts, np.stack([normed[cell] for cell in cells])])
            out = attention(joined, w, heads, bias)
            prompt_sum += out[:count]
            windows += 1
            for cell, token in zip(cells, out[count:], strict=True):
                attended[cell] = token
    x, prompts = x + attended, prompts + prompt_sum / windows
    joined = np.concatenate([prompts, x.reshape(-1, width)])
    joined = joined + mlp(norm(joined, w["norm2.weight"], w["norm2.bias"], eps), w)
    return joined[count:].reshape(x.shape), joined[:count]


def _region(position, size, window, shift):
    """Which of the three strips of a cyclically shifted axis a position lies in; without a shift
    there is one."""
    if shift == 0:
        return 0
    return 0 if position < size - window else 1 if position < size - shift else 2


def swin_merge(prompts, norm_weight, norm_bias, reduction, eps):
    """Patch merging concatenates four neighbours; a prompt has none and is repeated four times in
    channels."""
    return norm(np.tile(prompts, (1, 4)), norm_weight, norm_bias, eps) @ reduction.T
