"""MLP-k: the head of a frozen backbone as k linear layers, a baseline of VPT (Jia et al., ECCV
2022, arXiv:2203.12119).

    head(D(BN(ReLU(W_h ... D(BN(ReLU(W_1 x + b_1))) ... + b_h)))),   W_i in R^{d x d}, D a dropout

with h = k - 1 hidden layers: VPT's example asks for two of them to get its MLP-3. W_i ~ N(0, 2/d),
as released. The batch norms belong to the head: their statistics are part of the adapter. The
published count on Swin-B (4.04 M at k = 4) is not reached: three hidden layers have 3.21 M, four
4.26 M.
"""

from torch import Tensor, nn

from peft.core import Tuner
from peft.layers import innermost


class MLPHead(Tuner):
    exact_at_init = False

    def __init__(self, base: nn.Module, layers: int = 3, dropout: float = 0.1):
        super().__init__(base)
        if layers < 1:
            raise ValueError(
                f"layers={layers} must be at least 1; without hidden layers use linear"
            )
        channels = innermost(base).in_features
        self.hidden = nn.Sequential()
        for _ in range(layers):
            linear = nn.Linear(channels, channels)
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            self.hidden.extend(
                [
                    linear,
                    nn.ReLU(),
                    nn.BatchNorm1d(channels),
                    nn.Dropout(dropout),
                ]
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.hidden(x))
