"""SVDiff: Compact Parameter Space for Diffusion Fine-Tuning. Han et al., ICCV 2023,
arXiv:2303.11305.

    W = U diag(sigma) V^T,   W' = U diag(ReLU(sigma + delta)) V^T

Only the spectral shift `delta` (one number per singular value, zero at the start) trains. A kernel
is the matrix (out, in * kh * kw). Computed as W + U diag(ReLU(sigma + delta) - sigma) V^T, so that
delta = 0 leaves W bit for bit, whatever the decomposition's rounding. The decomposition is made
when the tuner is attached and is not part of a checkpoint. There is no cheaper forward: U and V
have full rank, and two passes through them cost more than one through W'.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import Tuner, WeightTuner


class SVDiff(WeightTuner):
    def __init__(self, base: nn.Module):
        super().__init__(base)
        if isinstance(base, Tuner):
            raise ValueError(
                "the decomposition is of a frozen weight, "
                f"and {type(base).__name__} keeps changing this one: place SVDiff first"
            )
        u, sigma, vt = torch.linalg.svd(base.weight.detach().flatten(1), full_matrices=False)
        for name, tensor in {"u": u, "sigma": sigma, "vt": vt}.items():
            self.register_buffer(name, tensor, persistent=False)
        self.delta = nn.Parameter(torch.zeros_like(sigma))

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = F.relu(self.sigma + self.delta) - self.sigma
        return weight + ((self.u * shift) @ self.vt).view_as(weight), bias
