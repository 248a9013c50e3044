"""Small layers, inputs and networks that the comparisons with the references share."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = {"atol": 1e-9, "rtol": 1e-9}


def rows(*values: float) -> torch.Tensor:
    """A float64 matrix, one row per argument."""
    return torch.tensor(values, dtype=torch.double)


def linear(into: int, out: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(into, out, bias=bias).double()


def randomised(tuner: nn.Module) -> nn.Module:
    """Every tensor of a tuner but its base's at random: no factor is left at zero."""
    generator = torch.Generator().manual_seed(1)
    tuner = tuner.double().eval()
    with torch.no_grad():
        for name, parameter in tuner.named_parameters():
            if not name.startswith("base."):
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.double)
                )
    return tuner


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)


def vit(width: int, depth: int) -> dict:
    """A plain ViT of another size, as the `model` of a backbone yaml."""
    size = {"embed_dim": width, "depth": depth, "num_heads": max(1, width // 64)}
    timm = {"_target_": "timm.create_model", "_partial_": True, "model_name": "test_vit"}
    return {**timm, "dynamic_img_size": True, "mlp_ratio": 4, **size}


class Shapes(TorchDispatchMode):
    """Collects the shapes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return result
