"""AS-MLP: An Axial Shifted MLP Architecture for Vision. Lian et al., ICLR 2022, arXiv:2107.08391.

Swin's pyramid with 1x1 convolutions only: tokens meet by shifting groups of channels along one
axis, each group by its own step (section 3.2):

    Z = gelu(norm(conv1(X)))
    Y = conv3(norm(gelu(conv2_1(shift_w(Z))) + gelu(conv2_2(shift_h(Z)))))

timm has no such model; module names are those of the public checkpoints of svip-lab/AS-MLP, so that
their files load as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn


def norm(width: int) -> nn.GroupNorm:
    """Over all channels and places of an image, NCHW."""
    return nn.GroupNorm(1, width)


def shifted(x: Tensor, steps: int, dim: int) -> Tensor:
    """Channels in `steps` groups, group g moved by g - steps // 2 places along `dim` (2: down,
    3: right); zeros move in.

    x: (B, C, H, W). A group has ceil(C / steps) channels, the last one what is left.
    """
    moved = []
    for g, group in enumerate(x.chunk(steps, dim=1)):
        k = g - steps // 2
        moved.append(F.pad(group, (k, -k) if dim == 3 else (0, 0, k, -k)))
    return torch.cat(moved, dim=1)


class AxialShift(nn.Module):
    def __init__(self, width: int, steps: int):
        super().__init__()
        self.steps = steps
        self.conv1 = nn.Conv2d(width, width, 1)
        self.conv2_1 = nn.Conv2d(width, width, 1)  # along the width
        self.conv2_2 = nn.Conv2d(width, width, 1)  # along the height
        self.conv3 = nn.Conv2d(width, width, 1)
        self.norm1 = norm(width)
        self.norm2 = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        across = F.gelu(self.conv2_1(shifted(x, self.steps, 3)))
        along = F.gelu(self.conv2_2(shifted(x, self.steps, 2)))
        return self.conv3(self.norm2(across + along))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, steps: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = norm(width)
        self.axial_shift = AxialShift(width, steps)
        self.norm2 = norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.axial_shift(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Merging(nn.Module):
    """2 x 2 places become one of twice the width. (B, C, H, W) -> (B, 2 C, H / 2, W / 2)"""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(4 * width)
        self.reduction = nn.Conv2d(4 * width, 2 * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [
            x[:, :, 0::2, 0::2],
            x[:, :, 1::2, 0::2],
            x[:, :, 0::2, 1::2],
            x[:, :, 1::2, 1::2],
        ]
        return self.reduction(self.norm(torch.cat(corners, dim=1)))


class Stage(nn.Module):
    def __init__(
        self, width: int, steps: int, mlp_ratio: float, drop_path: Sequence[float], merges: bool
    ):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, steps, mlp_ratio, rate) for rate in drop_path))
        self.downsample = Merging(width) if merges else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class ASMLP(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes). The defaults are AS-MLP-B.

    H and W must be multiples of patch * 2^(stages - 1).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        steps: int = 5,
        patch: int = 4,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        rates = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        self.patch_embed = PatchEmbed(width, patch)
        self.layers = nn.Sequential()
        for i, depth in enumerate(depths):
            own, rates = rates[:depth], rates[depth:]
            self.layers.append(
                Stage(width * 2**i, steps, mlp_ratio, own, merges=i < len(depths) - 1)
            )
        last = width * 2 ** (len(depths) - 1)
        self.norm = norm(last)
        self.head = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patch_embed(x))).mean((2, 3)))
