"""Compacter, literally: dense Kronecker products summed. Karimi Mahabadi et al., NeurIPS 2021,
arXiv:2106.04647. Float64, no project import."""

import math

import numpy as np


def kronecker(a, b):
    """A (x) B by its definition: entry (p * rows_b + u, q * cols_b + v) is A[p, q] B[u, v]."""
    out = np.zeros((a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]))
    for p in range(a.shape[0]):
        for q in range(a.shape[1]):
            for u in range(b.shape[0]):
                for v in range(b.shape[1]):
                    out[p * b.shape[0] + u, q * b.shape[1] + v] = a[p, q] * b[u, v]
    return out


def phm(rule, left, right):
    """W = sum_i A_i (x) (s_i t_i^T), (in, out) (section 4): rule (n, n, n), left (n, in / n, k),
    right (n, k, out / n)."""
    return sum(kronecker(rule[i], left[i] @ right[i]) for i in range(len(rule)))


def gelu(z):
    return 0.5 * z * (1.0 + math.erf(z / math.sqrt(2.0)))


def compacter(h, rule, down, down_bias, up, up_bias):
    """h + LPHM_up(gelu(LPHM_down(h))) with the skip connection of an adapter; down and up are pairs
    (left, right)."""
    code = h @ phm(rule, *down) + down_bias
    return h + np.vectorize(gelu)(code) @ phm(rule, *up) + up_bias
