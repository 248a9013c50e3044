"""What the layers of a backbone are to a method: how one runs with other weights, where its
channels are, how wide it is. Methods ask here and name no architecture.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn


class Stand(nn.Module):
    """Stands in for one module `base`, put there by module replacement."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)

    def merge(self) -> nn.Module:
        """The plain module that computes the same. Raises TypeError where there is none."""
        raise TypeError(f"{type(self).__name__} cannot be folded into {type(self.base).__name__}")


class Still(Stand):
    """A frozen batch norm that stays in eval mode: frozen is not still, its statistics would follow
    the new data in `train()`."""

    def __init__(self, base: nn.Module):
        super().__init__(base.eval())

    def train(self, mode: bool = True) -> "Still":
        super().train(mode)
        self.base.eval()
        return self

    def merge(self) -> nn.Module:
        return self.base


def innermost(base: nn.Module) -> nn.Module:
    """The layer of the backbone below whatever stands in for it."""
    while isinstance(base, Stand):
        base = base.base
    return base


def run(base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`base(x)` with other weights. Frozen batch norms use their running statistics in either
    mode."""
    base = innermost(base)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(base, nn.Conv2d) and type(base).forward is nn.Conv2d.forward:
        return base._conv_forward(x, weight, bias)
    if isinstance(base, nn.LayerNorm):
        if channel_dim(base) == 1:  # timm's LayerNorm2d: NCHW in and out
            return F.layer_norm(
                x.permute(0, 2, 3, 1), base.normalized_shape, weight, bias, base.eps
            ).permute(0, 3, 1, 2)
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
    if isinstance(base, nn.BatchNorm2d) and type(base).forward is nn.BatchNorm2d.forward:
        return F.batch_norm(
            x, base.running_mean, base.running_var, weight, bias, False, 0.0, base.eps
        )
    if isinstance(base, nn.GroupNorm) and type(base).forward is nn.GroupNorm.forward:
        return F.group_norm(x, base.num_groups, weight, bias, base.eps)
    known = "Linear, Conv2d, LayerNorm, BatchNorm2d, GroupNorm"
    raise TypeError(
        f"no way is known to run {type(base).__name__} with other weights; known: {known}"
    )


def channel_dim(base: nn.Module) -> int:
    """The dimension of the output that holds the channels of `base`: 1 for NCHW layers, else the
    last."""
    base = innermost(base)
    nchw = isinstance(base, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)) or (
        isinstance(base, nn.LayerNorm) and "2d" in type(base).__name__
    )
    return 1 if nchw else -1


def width(base: nn.Module) -> int:
    """The channels of what a sub-layer or block of a transformer puts out: those of its last linear
    layer."""
    linears = [module for module in innermost(base).modules() if isinstance(module, nn.Linear)]
    if not linears:
        kind = type(innermost(base)).__name__
        raise ValueError(
            f"{kind} holds no linear layer: only attentions, MLPs and blocks have a width"
        )
    return linears[-1].out_features


def with_weights(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of `base` with other weights; a layer that had no bias gains one where the method
    shifts it."""
    plain = copy.copy(base)
    plain._parameters = dict(base._parameters)
    plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain


def add(bias: Tensor | None, shift: Tensor) -> Tensor:
    """`bias + shift` where a layer may have no bias."""
    return shift if bias is None else bias + shift
