"""Which labels of a checkpoint's own head stand for the classes of a new task: with these rows
kept, the head needs no training. SuperLoRA, supplement, section A.3.1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def votes(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Tensor:
    """How many images (B, 3, H, W) of each class a network takes for each label of its own head.

    Returns (num_classes, labels), for `match_labels`.
    """
    net.eval()
    table = None
    with torch.inference_mode():
        for images, classes in batches:
            logits = net(images)
            table = logits.new_zeros(num_classes, logits.shape[1]) if table is None else table
            table.index_put_((classes, logits.argmax(1)), logits.new_ones(()), accumulate=True)
    return table


def match_labels(votes: Tensor) -> list[int]:
    """The label that stands for each class, from votes (classes, labels).

    SuperLoRA's automatic label matching (supplement, A.3.1): each class takes its most voted label.
    Where several want the same one, the class that leads most over its second choice gets it, and
    the others move on to their next free label. Equal leads go to the earlier class, equal votes to
    the earlier label. Raises ValueError when there are more classes than labels.
    """
    classes, labels = votes.shape
    if classes > labels:
        raise ValueError(f"{classes} classes cannot be matched to {labels} labels one to one")
    free, matched = votes.double().cpu(), {}
    while len(matched) < classes:
        ranked, order = free.sort(dim=1, descending=True, stable=True)
        lead = ranked[:, 0] - ranked[:, min(1, labels - 1)].clamp(min=0)
        for c in sorted(set(range(classes)) - matched.keys(), key=lambda c: (-lead[c].item(), c)):
            if order[c, 0].item() not in matched.values():
                matched[c] = order[c, 0].item()
        free[:, list(matched.values())] = -1.0
    return [matched[c] for c in range(classes)]
