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

    With the `schedule` timm_epoch, timm_late or bolts_late it moves once an epoch instead, as in
    most released code; see `timm_rate` and `bolts_rate`.

    With `restart_epochs` the cosine starts again after so many epochs from the warm-up's end on,
    each time `restart_factor` times as long (SGDR, arXiv:1608.03983).
    """
    total, warmup = length(optim, per_epoch), optim["warmup_epochs"] * per_epoch
    low, high = optim["min_lr"], optim["lr"]
    if optim["lr_base_size"]:
        high *= optim["batch_size"] / optim["lr_base_size"]
    if optim["schedule"] != "step":
        told = max(0, step // per_epoch - optim["schedule"].endswith("late"))
        rate = bolts_rate if optim["schedule"] == "bolts_late" else timm_rate
        bounds = optim["warmup_lr"], low, high
        return rate(told, math.ceil(total / per_epoch), optim["warmup_epochs"], *bounds)
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    position, period = step - warmup, max(1, total - warmup)
    if optim["restart_epochs"]:
        period = optim["restart_epochs"] * per_epoch
        while position >= period:
            position, period = position - period, period * optim["restart_factor"]
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * (position / period)))


def timm_rate(
    epoch: int, epochs: int, warmup: float, start: float, low: float, high: float
) -> float:
    """The rate of an epoch, counted from 0, under timm's cosine: the warm-up begins at `start`, and
    when it ends the cosine is as old as the run. (SSF's loop tells the scheduler the number of the
    next epoch. RLRR, NOAH, FacT, Convpass and RepAdapter tell it, late, that of the epoch which is
    over, so that the first two have the same rate.)"""
    if epoch < warmup:
        return start + epoch * (high - start) / warmup
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def bolts_rate(
    epoch: int, epochs: int, warmup: float, start: float, low: float, high: float
) -> float:
    """The rate of an epoch, counted from 0, under Lightning Bolts' warm-up and cosine: the last
    epoch of the warm-up has `high` already, and so has the first after it, where the cosine begins.
    (Adapter+'s loop tells the scheduler, late, the number of the epoch which is over.)"""
    if epoch < warmup:
        return start + epoch * (high - start) / max(1, warmup - 1)
    position = (epoch - warmup) / (epochs - warmup)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * position))


def spared(rule: str) -> Callable[[str, torch.Tensor], bool]:
    """What is spared weight decay, as a question about a parameter and its name."""
    rules = {
        "one_dim": lambda name, p: p.dim() < 2,
        # RLRR's f, `shift` here, is called shift_bias in its code
        "names": lambda name, p: "bias" in name or "norm" in name or name.endswith(".shift"),
        "none": lambda name, p: False,
    }
    return rules[rule]


def make_optimizer(pack: Pack, optims: Sequence[Mapping]) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups a member, with and without weight decay; see `checks`."""
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
