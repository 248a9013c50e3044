"""Mixup and CutMix: a batch with its mirror image mixed in, and labels to match."""

from collections.abc import Callable

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

Mix = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def mixing(
    mixup: float, cutmix: float, smoothing: float, num_classes: int, data_seed: int
) -> Mix | None:
    """A function of (images, labels, epoch, batch) that returns mixed images and their labels as
    probabilities (B, num_classes), smoothed; None where nothing is to be mixed.

    mixup, cutmix: the alpha of each; 0 switches it off. With both, one is drawn for each batch.
    This is timm's, which draws from numpy's global state: here it is seeded by (data_seed, epoch,
    batch) as all augmentation is, so that a resumed run mixes what an uninterrupted one mixed.
    """
    if not (mixup or cutmix):
        return None
    timms = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def mix(images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        even = len(labels) // 2 * 2  # timm refuses odd batches: their last image stays itself
        last = mixup_target(labels[even:], num_classes, 1.0, smoothing)
        if not even:
            return images, last
        before = np.random.get_state()  # noqa: NPY002
        seed = np.random.SeedSequence([data_seed, epoch, batch + 1]).generate_state(4)
        np.random.seed(seed)  # noqa: NPY002
        images = images.clone()  # mixed in place
        _, targets = timms(images[:even], labels[:even])
        np.random.set_state(before)  # noqa: NPY002
        return images, torch.cat([targets, last])

    return mix
