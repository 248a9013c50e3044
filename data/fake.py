"""A made-up task of any size for tests and dry runs: every class is a coloured wave, every image
adds its own noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data import Images
from data.manifest import Manifest


@dataclass(frozen=True)
class Waves:
    """An `Images.open` that draws image i of a split from (split, i) alone, so that no array need
    be kept.
    """

    salt: int
    num_classes: int
    size: int

    def __call__(self, i: int) -> np.ndarray:
        label = i % self.num_classes
        noise = np.random.default_rng([self.salt, i]).normal(0, 24, (self.size, self.size, 3))
        y, x = np.mgrid[: self.size, : self.size] / self.size
        angle = np.pi * label / self.num_classes
        wave = np.sin(2 * np.pi * (1 + label % 3) * (x * np.cos(angle) + y * np.sin(angle)))
        colour = np.cos(2 * np.pi * (label / self.num_classes + np.arange(3) / 3))
        return np.clip(128 + 80 * wave[..., None] * colour + noise, 0, 255).astype(np.uint8)


def read(
    split: str,
    *,
    num_classes: int,
    splits: Mapping[str, int],
    task: str = "fake",
    size: int = 32,
    data_root: str = "",
) -> Images:
    """`splits[split]` images of `size` x `size` pixels; `train800val200` and the like must be
    listed too. Nothing is read from `data_root`. Raises ValueError for a split that is not
    listed.
    """
    if split not in splits:
        raise ValueError(f"The fake task has no split '{split}'; there are {', '.join(splits)}.")
    count = int(splits[split])
    labels = np.arange(count) % num_classes
    ids = tuple(f"{split}/{i}" for i in range(count))
    salt = int.from_bytes(split.encode(), "big")
    manifest = Manifest(task, split, ids, labels, num_classes, source="fake", pixels="rendered")
    return Images(manifest, Waves(salt, num_classes, size))
