"""Pictures that TFDS has resized or processed before storing them: Sun397 and the retina scans.

The TFDS builders use OpenCV. Its default resize (bilinear at half-pixel centres, no antialiasing)
and its Gaussian blur are rewritten here with numpy and scipy. Resized pictures agree with OpenCV 4
to one grey level; the retina processing multiplies such differences by four and compresses (1.7
levels on average for scikit-image's retina picture). Left out is the JPEG step of TFDS for Sun397.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.pictures import decode


def rescale(image: np.ndarray, factor: float) -> np.ndarray:
    """(H, W, 3) uint8 times `factor` in both directions, as cv2.resize(image, None, fx=f, fy=f)."""

    def taps(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = (np.arange(max(1, round(size * factor))) + 0.5) / factor - 0.5
        position = np.clip(position, 0, size - 1)
        low = np.floor(position).astype(int)
        return low, np.minimum(low + 1, size - 1), (position - low).astype(np.float32)

    (top, bottom, dy), (left, right, dx) = taps(image.shape[0]), taps(image.shape[1])
    rows = image[top] + (image[bottom].astype(np.float32) - image[top]) * dy[:, None, None]
    pixels = rows[:, left] + (rows[:, right] - rows[:, left]) * dx[:, None]
    return np.rint(pixels).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Shrunk:
    """An `Images.open` over files that are scaled down to at most `pixels` pixels."""

    root: Path
    names: Sequence[str]
    pixels: int

    def __call__(self, i: int) -> np.ndarray:
        image = decode(self.root / self.names[i], self.names[i], upright=True)
        factor = math.sqrt(self.pixels / (image.shape[0] * image.shape[1]))
        return rescale(image, factor) if factor < 1 else image


@dataclass(frozen=True, eq=False)
class Retina:
    """An `Images.open` over retina scans, processed as TFDS' configuration btgraham-300."""

    root: Path
    names: Sequence[str]

    def __call__(self, i: int) -> np.ndarray:
        return btgraham(decode(self.root / self.names[i], self.names[i], upright=True))


def btgraham(image: np.ndarray, radius: int = 300) -> np.ndarray:
    """The winner's processing of Kaggle's 2015 contest: scale the eye to `radius`, subtract the
    local mean, keep the inner 90 % on grey, crop, and compress once (JPEG, quality 72).

    (H, W, 3) uint8 -> at most (540, 540, 3) uint8.
    """
    from scipy.ndimage import gaussian_filter1d

    row = image[image.shape[0] // 2].sum(axis=1, dtype=np.int64)
    eye = (row > row.mean() / 10).sum() / 2
    image = rescale(image, radius / (eye if eye >= 1 else image.shape[0] / 2)).astype(np.float32)
    blurred = image
    for axis in (
        0,
        1,
    ):  # OpenCV's kernel for 8-bit images reaches 3 sigma and mirrors at the border
        blurred = gaussian_filter1d(blurred, radius / 30, axis, truncate=3, mode="mirror")
    image = np.clip(np.rint(4 * image - 4 * np.rint(blurred) + 128), 0, 255)
    inner = int(0.9 * radius)
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    outside = (x - width // 2) ** 2 + (y - height // 2) ** 2 > inner**2
    image[outside] = 128
    top, left = max(height // 2 - inner, 0), max(width // 2 - inner, 0)
    image = image[top : height // 2 + inner, left : width // 2 + inner]
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=72)
    return decode(file.getvalue(), "retina")
