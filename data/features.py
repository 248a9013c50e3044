"""Training a head on features that a frozen trunk computed once."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from data import Loader
from peft.backbone import head_path


def cached_features(
    model: nn.Module, batches: Loader, scored: Loader, autocast: torch.autocast
) -> tuple[nn.Module, object, object]:
    """What the loop runs on: (net, training batches, scored batches).

    Where only the head trains and nothing before it is random, the frozen rest runs once per image
    and the head, which stays the model's own, trains on its outputs: the numbers of the long way,
    without its cost.
    """
    path = head_path(model)
    head = model.get_submodule(path)
    inside = {id(p) for p in head.parameters()}
    only_head = all(id(p) in inside for p in model.parameters() if p.requires_grad)
    random = any(getattr(m, "p", 0) or getattr(m, "drop_prob", 0) for m in model.modules())
    if not only_head or random or batches.augments:
        return model, batches, scored
    model.set_submodule(path, nn.Identity())
    features = Features(model.eval(), batches, autocast), Features(model, scored, autocast)
    model.set_submodule(path, head)
    return head, *features


class Features:
    """A loader's batches as features of a frozen trunk, computed once; same order, same
    interface."""

    @torch.no_grad()
    def __init__(self, trunk: nn.Module, loader: Loader, autocast: torch.autocast):
        self.loader, self.device, self.batch_size = loader, loader.device, loader.batch_size
        whole = replace(loader, train=False, drop_last=False)
        with autocast:
            pairs = [(trunk(images).float(), labels) for images, labels in whole.epoch()]
        self.features, self.labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, e: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(self.loader.order(e)).to(self.device)
        for b in range(start, len(self)):
            rows = order[b * self.batch_size : (b + 1) * self.batch_size]
            yield self.features[rows], self.labels[rows]
