"""Tiny backbones whose adapted layers can be seen from the output."""

import functools
import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

import peft
from peft.backbone import head_path
from peft.config import catalogue, compose, placements_of

TINY = [name for name in catalogue("backbone") if name.startswith("tiny_")]
CLASSES = 5


@functools.cache
def node(group: str, name: str) -> DictConfig:
    """The composed yaml of one method or backbone."""
    return compose("train", [f"{group}={name}"])[group]


@functools.cache
def applies(backbone: str, method: str) -> bool:
    """Whether a method applies to a backbone, by the yamls alone."""
    try:
        placements_of(node("method", method), node("backbone", backbone).family)
    except ValueError:
        return False
    return True


def home(method: str) -> str:
    """The tiny backbone on which a method is tried once: the ViT, or the first it applies to."""
    return next(name for name in ["tiny_vit", *TINY] if applies(name, method))


def shallow(backbone: str) -> dict[str, int]:
    """Overrides that make a tiny backbone faster, where it has a depth to choose."""
    return {"backbone.model.depth": 2} if backbone == "tiny_vit" else {}


def tiny(backbone: str, method: str = "linear", **overrides) -> nn.Module:
    """A seeded tiny model. Random initialisation hides adapted layers (zero heads, last batch norms
    at 0, layer scales at 1e-6): everything would pass with dead tuners. Those paths are opened
    here."""
    torch.manual_seed(0)
    model = peft.create(backbone, method, num_classes=CLASSES, **overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf in {"gamma", "gamma_1", "gamma_2"} and parameter.abs().max() < 1e-3:
                parameter.fill_(1.0)  # layer scales
            if leaf == "weight" and parameter.dim() == 1 and not parameter.any():
                parameter.fill_(1.0)  # zero-initialised norms
            if name.startswith(head_path(model)) and not parameter.any():
                parameter.normal_(0, 1, generator=generator)
        for module in model.modules():
            if (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and module.running_mean is not None
            ):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def jitter(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Moves every trainable tensor: a zero-initialised factor blocks its partner's first gradient
    by design."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    scale * torch.randn(parameter.shape, generator=generator).to(parameter)
                )
    return model


def stackable(model: nn.Module) -> nn.Module:
    """In training, but for the running statistics of batch norms: packs have one set for all."""
    for module in model.train().modules():
        if getattr(module, "track_running_stats", False):
            module.eval()
    return model


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
