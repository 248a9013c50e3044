"""The published preprocessing presets: how an image becomes a network input.

A preset has two views, `train` and `eval`. Each view splits into a fixed part, computed once per
image and kept as uint8 (`View.fixed`), and a random part, drawn per batch and applied where the
images lie (`View.vary`). All random numbers are drawn on the CPU from a generator that the loader
seeds, so every device sees the same crops and flips. Sizes in a preset are stated for a network
input of 224 pixels and scale with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

REFERENCE = 224  # the input size for which presets state their sizes
PIL_KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
KERNELS = (*PIL_KERNELS, "legacy_bilinear", "bilinear_or_bicubic")
# Uniform numbers drawn per image: a box (10 tries of area and ratio, 2 offsets), kernel, flip, then
# whether to erase, and another box.
DRAWS, KERNEL, FLIP, ERASE = 47, 22, 23, 24


def resize(image: np.ndarray, height: int, width: int, kernel: str) -> Tensor:
    """(H, W, 3) uint8 -> (3, height, width): uint8 for Pillow's antialiased kernels, float32 for
    `legacy_bilinear`.
    """
    if kernel == "legacy_bilinear":
        return legacy_bilinear(image, height, width)
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), PIL_KERNELS[kernel]))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def legacy_bilinear(image: np.ndarray, height: int, width: int) -> Tensor:
    """The kernel of `tf.compat.v1.image.resize` (half_pixel_centers and align_corners off): (H, W,
    3) -> float32 (3, h, w).

    Output index j reads source coordinate j * (in / out): no half-pixel shift, no antialiasing; the
    pixel after the last one is the last one. Evaluated in float32 in TensorFlow's order (rows'
    blends first, then columns), so it is bit-exact.
    """

    def taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = np.arange(size_out, dtype=np.float32) * (
            np.float32(size_in) / np.float32(size_out)
        )
        low = np.floor(position).astype(np.int64)
        return low, np.minimum(low + 1, size_in - 1), position - low.astype(np.float32)

    top, bottom, dy = taps(image.shape[0], height)
    left, right, dx = taps(image.shape[1], width)
    pixels = image.astype(np.float32)
    dx, dy = dx[None, :, None], dy[:, None, None]
    upper = pixels[top][:, left] + (pixels[top][:, right] - pixels[top][:, left]) * dx
    lower = pixels[bottom][:, left] + (pixels[bottom][:, right] - pixels[bottom][:, left]) * dx
    return torch.from_numpy(np.ascontiguousarray((upper + (lower - upper) * dy).transpose(2, 0, 1)))


def resample(image: Tensor, size: int, kernel: str) -> Tensor:
    """(3, h, w) uint8 on any device -> (3, size, size) uint8, antialiased; within one grey level of
    Pillow.
    """
    if image.shape[-2:] == (size, size):
        return image
    x = image[None] if image.device.type == "cpu" else image[None].float()
    x = F.interpolate(x, size=(size, size), mode=kernel, antialias=True)
    return (x if x.dtype == torch.uint8 else x.round_().clamp_(0, 255).to(torch.uint8))[0]


def random_box(
    height: int, width: int, u: np.ndarray, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, ...]:
    """(top, left, h, w) of a random resized crop, from uniform numbers u: area and log aspect ratio
    uniform, ten tries, then the largest centred box within `ratio`. As
    torchvision.transforms.RandomResizedCrop.
    """
    for area, aspect in u[:20].reshape(10, 2):
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + aspect * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class View:
    """How images are brought to the network's size.

    resize: "squash" both sides to `size`; the "short" side to `size`, keeping the aspect ratio; or
    "random", a random resized crop of area `scale` and aspect `ratio` straight to the input size.
    crop: None, "centre" or "random": how a window of the input size is cut out of what `resize`
    leaves.
    """

    resize: str = "squash"
    size: int = REFERENCE
    kernel: str = "bicubic"
    crop: str | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        for key, value, known in (
            ("resize", self.resize, ("squash", "short", "random")),
            ("kernel", self.kernel, KERNELS),
            ("crop", self.crop, (None, "centre", "random")),
        ):
            if value not in known:
                raise ValueError(
                    f"Unknown {key} '{value}' in a preprocessing preset; there are {known}."
                )
        fitting = ("bilinear", "bicubic", KERNELS[-1]) if self.resize == "random" else KERNELS[:-1]
        if self.kernel not in fitting:
            raise ValueError(
                f"Kernel '{self.kernel}' does not go with resize '{self.resize}'; "
                f"there are {fitting}."
            )
        if self.crop is None and (
            self.resize == "short" or (self.resize == "squash" and self.size != REFERENCE)
        ):
            raise ValueError(
                f"resize '{self.resize}' to {self.size} needs crop 'centre' or 'random' "
                f"to reach {REFERENCE}."
            )

    @property
    def random(self) -> bool:
        return self.resize == "random" or self.crop == "random"

    def fixed(self, image: np.ndarray, image_size: int) -> Tensor:
        """The part that never changes: (H, W, 3) uint8 -> (3, h, w), uint8 (float32 for
        legacy_bilinear).
        """
        if self.resize == "random":
            return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        height, width = image.shape[:2]
        size = round(self.size * image_size / REFERENCE)
        if self.resize == "squash":
            x = resize(image, size, size, self.kernel)
        elif height <= width:
            x = resize(image, size, int(size * width / height), self.kernel)
        else:
            x = resize(image, int(size * height / width), size, self.kernel)
        if self.crop == "centre":
            top, left = (round((side - image_size) / 2) for side in x.shape[1:])
            x = x[:, top : top + image_size, left : left + image_size].contiguous()
        return x

    def vary(self, image: Tensor, u: np.ndarray, image_size: int) -> Tensor:
        """The random part for one image, from uniform numbers u (DRAWS,): (3, h, w) -> (3,
        image_size, image_size).
        """
        height, width = image.shape[1:]
        if self.resize == "random":
            top, left, h, w = random_box(height, width, u, self.scale, self.ratio)
            kernel = self.kernel
            if kernel == "bilinear_or_bicubic":
                kernel = "bilinear" if u[KERNEL] < 0.5 else "bicubic"
            return resample(image[:, top : top + h, left : left + w], image_size, kernel)
        if self.crop == "random":
            top, left = int(u[0] * (height - image_size + 1)), int(u[1] * (width - image_size + 1))
            return image[:, top : top + image_size, left : left + image_size]
        return image


@dataclass(frozen=True)
class Preset:
    """A published preprocessing recipe, from configs/preset/*.yaml.

    flip: probability of a horizontal flip while training; flip_tasks: the tasks it applies to
    (None: all).
    erase: probability of replacing a random box by noise while training, after normalisation.
    mean, std: "backbone" for the checkpoint's own statistics, a list of three, or None for inputs
    in [0, 1] as they are.
    """

    name: str
    train: View | Mapping = View()
    eval: View | Mapping = View()
    flip: float = 0.0
    flip_tasks: Sequence[str] | None = None
    erase: float = 0.0
    mean: str | Sequence[float] | None = "backbone"
    std: str | Sequence[float] | None = "backbone"

    def __post_init__(self) -> None:
        for view in ("train", "eval"):
            value = getattr(self, view)
            object.__setattr__(self, view, value if isinstance(value, View) else View(**value))
        if self.eval.random:
            raise ValueError(
                f"Preset '{self.name}' would evaluate on random crops; "
                "its eval view needs crop 'centre'."
            )

    def flips(self, task: str | None) -> float:
        """Probability of a horizontal flip while training on `task`."""
        return self.flip if self.flip_tasks is None or task in self.flip_tasks else 0.0

    def statistics(
        self, mean: Sequence[float], std: Sequence[float]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and std to normalise with; the arguments are the backbone's own."""

        def choose(
            value: str | Sequence[float] | None, own: Sequence[float], none: float
        ) -> tuple[float, ...]:
            if value is None:
                return (none,) * 3
            chosen = tuple(float(v) for v in (own if value == "backbone" else value))
            if len(chosen) != 3:
                raise ValueError(
                    f"Preset '{self.name}' needs three channel statistics, "
                    f"or 'backbone'; got {value!r}."
                )
            return chosen

        return choose(self.mean, mean, 0.0), choose(self.std, std, 1.0)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) uint8 or float32 in 0..255 -> float32, channel-wise (x / 255 - mean) / std. Out
    of place.
    """
    x = images.to(torch.float32, copy=True).div_(255)
    low, spread = torch.tensor([mean, std])[..., None, None].to(x.device, non_blocking=True)
    return x.sub_(low).div_(spread)


def erase(images: Tensor, u: np.ndarray, probability: float) -> Tensor:
    """Random erasing of normalised images (B, 3, S, S), in place: with `probability`, a box of 2 to
    33 % of the area and aspect 0.3 to 3.3 becomes normal noise. As timm's RandomErasing("pixel").
    """
    size = images.shape[-1]
    for image, v in zip(images, u[:, ERASE:]):
        if v[0] < probability:
            top, left, h, w = random_box(size, size, v[1:], (0.02, 1 / 3), (0.3, 1 / 0.3))
            noise = torch.Generator().manual_seed(int(v[0] * 2**53))
            box = torch.randn((3, h, w), generator=noise)
            image[:, top : top + h, left : left + w].copy_(box, non_blocking=True)
    return images
