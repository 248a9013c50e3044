"""Training the end of a network on features that its frozen beginning computed once."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data import Loader
from peft.backbone import head_path

LARGEST = 2 * 1024**3  # bytes of features that are kept


def cached_features(
    model: nn.Module, batches: Loader, scored: Loader, autocast: torch.autocast
) -> tuple[nn.Module, object, nn.Module, object]:
    """What the loop runs on: (what trains, its training batches, what is judged, its batches).

    Where no augmentation makes one epoch differ from another, what is frozen and not random runs
    once per image: all but the head in linear probing, what comes before the first trained block in
    a ViT. What trains consists of the model's own modules, so that training it trains the model:
    the numbers of the long way, without its cost.
    """
    path = head_path(model)
    head = model.get_submodule(path)
    if not batches.augments and fixed([model], but=[head]):
        trunk = without(model, {path: nn.Identity()})
        made = Features(trunk, batches, autocast), Features(trunk, scored, autocast)
        return head, made[0], head, made[1]
    first = first_block(model)
    if not batches.augments and first:
        blocks = list(model.blocks)
        trunk = without(model, {"blocks": nn.Sequential(*blocks[:first]), "norm": nn.Identity()})
        trunk.forward = trunk.forward_features
        with torch.no_grad(), autocast:
            one = torch.zeros(1, 3, *[batches.image_size] * 2, device=batches.device)
            size = trunk(one).nbytes * batches.num_images
        if size <= LARGEST:
            names = ("patch_embed", "patch_drop", "norm_pre")
            later = nn.Sequential(*blocks[first:])
            end = without(model, {"blocks": later} | {name: nn.Identity() for name in names})
            end._pos_embed = _same
            return end, Features(trunk, batches, autocast), model, scored
    return model, batches, model, scored


def first_block(model: nn.Module) -> int:
    """How many blocks of a ViT come before all that trains or draws random numbers; 0 for another
    network."""
    if not isinstance(model, VisionTransformer) or type(model.blocks) is not nn.Sequential:
        return 0
    blocks = list(model.blocks)
    count = next((i for i, block in enumerate(blocks) if not fixed([block])), len(blocks))
    after = [*blocks[count:], model.norm, model.fc_norm, model.head_drop, model.head]
    return count if fixed([model], but=after) else 0


def fixed(modules: Iterable[nn.Module], but: Iterable[nn.Module] = ()) -> bool:
    """Whether nothing in these modules trains or is random, apart from what is in `but`."""
    outside = {id(m) for part in but for m in part.modules()}
    inside = [m for part in modules for m in part.modules() if id(m) not in outside]
    trains = any(p.requires_grad for m in inside for p in m.parameters(recurse=False))
    return not trains and not any(getattr(m, "p", 0) or getattr(m, "drop_prob", 0) for m in inside)


def without(model: nn.Module, replaced: dict[str, nn.Module]) -> nn.Module:
    """A view of a model in eval mode that shares all its modules but those at these paths."""
    view = copy.copy(model.eval())
    for path, module in replaced.items():
        parent, (*owners, leaf) = view, path.split(".")
        parent._modules = dict(parent._modules)
        for owner in owners:
            parent._modules[owner] = copy.copy(parent._modules[owner])
            parent = parent._modules[owner]
            parent._modules = dict(parent._modules)
        parent._modules[leaf] = module
    return view


def _same(x: Tensor) -> Tensor:
    return x


class Features:
    """A loader's batches as features of a frozen trunk, computed once; same order, same
    interface."""

    augments = False

    @torch.no_grad()
    def __init__(self, trunk: nn.Module, loader: Loader, autocast: torch.autocast):
        self.loader, self.device, self.batch_size = loader, loader.device, loader.batch_size
        # a batch of the head's may be more than the trunk can take at once
        pieces = min(loader.batch_size, 512)
        whole = replace(loader, train=False, drop_last=False, batch_size=pieces)
        with autocast:
            pairs = [(trunk(images), labels) for images, labels in whole.epoch()]
        self.features, self.labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, e: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(self.loader.order(e)).to(self.device, non_blocking=True)
        for b in range(start, len(self)):
            rows = order[b * self.batch_size : (b + 1) * self.batch_size]
            yield self.features[rows], self.labels[rows]
