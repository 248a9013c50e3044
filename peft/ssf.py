"""SSF: Scaling and Shifting Your Features. Lian et al., NeurIPS 2022, arXiv:2210.08823.

    y = gamma * z + beta
    (eq. 3)

after every operation with a weight: z is the output of a linear, convolution or norm layer, gamma
and beta have its channel width. Folds into that layer (eq. 4):  W' = gamma[:, None] * W,  b' =
gamma * b + beta. gamma ~ N(1, 0.02) and beta ~ N(0, 0.02), as in the released code: close to the
identity at the start, not equal to it.
"""

import torch
from torch import Tensor, nn

from peft.core import WeightTuner
from peft.layers import add, channel_dim, run


class SSF(WeightTuner):
    exact_at_init = False
    takes_norms = True

    def __init__(self, base: nn.Module, std: float = 0.02):
        super().__init__(base)
        channels = base.weight.shape[0]
        self.gamma = nn.Parameter(torch.empty(channels).normal_(1.0, std))
        self.beta = nn.Parameter(torch.empty(channels).normal_(0.0, std))

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gamma = self.gamma.view(-1, *[1] * (weight.dim() - 1))
        return gamma * weight, add(None if bias is None else self.gamma * bias, self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """On the output: scales activations instead of weights, whose gradient would cost a full
        matrix product. A norm's weights are vectors: there the fold is the cheaper way."""
        if self.base.weight.dim() == 1:
            return super().forward(x)
        z = run(self.base, x, self.base.weight, self.base.bias)
        shape = (1, -1, 1, 1) if channel_dim(self.base) == 1 else (-1,)
        return self.gamma.view(shape) * z + self.beta.view(shape)
