"""MLP-k: k hidden layers before the classifier of a frozen backbone, a baseline of VPT (Jia et al.,
ECCV 2022, arXiv:2203.12119).

    head(D(BN(ReLU(W_k ... D(BN(ReLU(W_1 x + b_1))) ... + b_k)))),   W_i in R^{d x d}, D a dropout

as in the released code. The batch norms belong to the head: their statistics are part of the
adapter. Published counts on Swin-B (4.04 M at k = 4) are reached neither with nor without them; k =
4 has 4.26 M.
"""

from torch import Tensor, nn

from peft.core import Tuner
from peft.layers import innermost


class MLPHead(Tuner):
    exact_at_init = False

    def __init__(self, base: nn.Module, layers: int = 4, dropout: float = 0.1):
        super().__init__(base)
        if layers < 1:
            raise ValueError(
                f"layers={layers} must be at least 1; without hidden layers use linear"
            )
        channels = innermost(base).in_features
        self.hidden = nn.Sequential()
        for _ in range(layers):
            self.hidden.extend(
                [
                    nn.Linear(channels, channels),
                    nn.ReLU(),
                    nn.BatchNorm1d(channels),
                    nn.Dropout(dropout),
                ]
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.hidden(x))
