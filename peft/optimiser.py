"""The optimiser of a run: how long, at which rate, over which groups.

`optim` is everywhere the configuration's node of that name, as a mapping.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from peft.pack import Pack


def length(optim: Mapping, per_epoch: int) -> int:
    """Optimiser steps of a run: `steps`, or else those of its epochs."""
    return int(optim["steps"] or int(optim["epochs"]) * per_epoch)


def learning_rate(step: int, per_epoch: int, optim: Mapping) -> float:
    """Linear warm-up from 0, then a cosine to `min_lr` at the last step; a pure function of the
    step. With `lr_base_size`, `lr` is meant for a batch of that size and grows with the batch
    (Goyal et al., arXiv:1706.02677).

    With `restart_epochs` the cosine starts again after so many epochs from the warm-up's end on,
    each time `restart_factor` times as long (SGDR, arXiv:1608.03983).
    """
    total, warmup = length(optim, per_epoch), optim["warmup_epochs"] * per_epoch
    low, high = optim["min_lr"], optim["lr"]
    if optim["lr_base_size"]:
        high *= optim["batch_size"] / optim["lr_base_size"]
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    position, period = step - warmup, max(1, total - warmup)
    if optim["restart_epochs"]:
        period = optim["restart_epochs"] * per_epoch
        while position >= period:
            position, period = position - period, period * optim["restart_factor"]
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * (position / period)))


def spared(rule: str) -> Callable[[str, torch.Tensor], bool]:
    """What is spared weight decay, as a question about a parameter and its name."""
    rules = {
        "one_dim": lambda name, p: p.dim() < 2,
        "names": lambda name, p: "bias" in name or "norm" in name,
        "none": lambda name, p: False,
    }
    if rule not in rules:
        raise ValueError(f"optim.no_decay={rule} is none of {', '.join(rules)}")
    return rules[rule]


def make_optimizer(pack: Pack, optims: Sequence[Mapping]) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups a member, with and without weight decay; see `check`."""
    optim = optims[0]
    groups = [
        {"params": leaves, "member": k, "lr": optims[k]["lr"], "weight_decay": decay}
        for k in pack.members
        for leaves, decay in zip(pack.leaves[k], (optims[k]["weight_decay"], 0.0), strict=True)
        if leaves
    ]
    if optim["optimizer"] == "adamw":
        return torch.optim.AdamW(groups, betas=tuple(optim["betas"]), fused=True)
    return torch.optim.SGD(groups, momentum=optim["momentum"], fused=True)


def check(optim: Mapping) -> None:
    """Raises ValueError for a value that no run can mean, naming its key."""
    for key, fits, means in (
        ("epochs", lambda v: v >= 1, "1 or more"),
        ("steps", lambda v: v is None or v >= 1, "null or 1 and more"),
        ("lr_base_size", lambda v: v is None or v > 0, "null or more than 0, such as 256"),
        ("warmup_epochs", lambda v: v >= 0, "0 or more"),
        ("restart_epochs", lambda v: v is None or v > 0, "null or more than 0"),
        ("restart_factor", lambda v: v >= 1, "1 or more"),
        ("mixup", lambda v: v >= 0, "0 or more"),
        ("cutmix", lambda v: v >= 0, "0 or more"),
        ("ema", lambda v: v is None or 0 < v < 1, "null or between 0 and 1, such as 0.9998"),
        ("accumulate", lambda v: v >= 1 and v == int(v), "1, 2, 3 ..."),
        ("label_smoothing", lambda v: 0 <= v < 1, "from 0 to below 1"),
        ("layer_dropout", lambda v: 0 <= v < 1, "from 0 to below 1"),
        ("drop_path", lambda v: 0 <= v < 1, "from 0 to below 1"),
    ):
        if not fits(optim[key]):
            raise ValueError(f"optim.{key}={optim[key]} should be {means}")
    needs = {"adamw": "betas", "sgd": "momentum"}.get(kind := optim["optimizer"])
    if needs is None:
        raise ValueError(f"optim.optimizer={kind} is neither adamw nor sgd")
    if optim.get(needs) is None:
        raise ValueError(f"optim.optimizer={kind} needs optim.{needs}: take optim={kind}_cosine")
