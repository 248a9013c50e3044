"""Conv-Adapter: bottlenecks with the receptive field of the convolution they stand beside. Chen et
al., 2022, arXiv:2208.07463.

    y = conv(z) + e * P ReLU(D z)

with D a depthwise k x k convolution from c_in to w, P a 1 x 1 one from w to c_out and e in R^c_out,
in the Convolution Parallel scheme. D has the host's kernel, stride, padding and dilation and w =
c_in / `reduction` groups; both convolutions have biases; e starts at one. Kernels Kaiming-normal
over the fan-out, biases zero: the start is not the pre-trained function. Hosts are the convolutions
with k > 1 of the sites, the others are left alone. The backbone's norms train too. In a bottleneck
the released code adds the branch after the host's norm and ReLU; here, as in the paper's figure, at
its output. Its ConvNeXt has GELU and a truncated normal of 0.02 instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import Tuner
from peft.layers import innermost


class ConvAdapter(Tuner):
    exact_at_init = False

    def __init__(self, base: nn.Module, reduction: int = 8):
        super().__init__(base)
        host = innermost(base)
        if reduction < 1 or host.in_channels % reduction:
            raise ValueError(
                f"reduction={reduction} does not divide the {host.in_channels} input channels"
            )
        hidden = host.in_channels // reduction
        self.down = nn.Conv2d(
            host.in_channels,
            hidden,
            host.kernel_size,
            host.stride,
            host.padding,
            host.dilation,
            groups=hidden,
        )
        self.up = nn.Conv2d(hidden, host.out_channels, 1)
        self.scale = nn.Parameter(torch.ones(host.out_channels, 1, 1))
        for layer in (self.down, self.up):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    @classmethod
    def over(cls, bases, **hparams) -> dict[str, Tuner]:
        hosts = {path: base for path, base in bases.items() if max(innermost(base).kernel_size) > 1}
        if not hosts:
            raise ValueError(f"no convolution with a kernel above 1 x 1 among {', '.join(bases)}")
        return super().over(hosts, **hparams)

    def forward(self, z: Tensor) -> Tensor:
        return self.base(z) + self.scale * self.up(F.relu(self.down(z)))
