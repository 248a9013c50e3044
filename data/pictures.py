"""Image files and bytes to RGB arrays, the same way for every reader.

Pixels are taken as they are stored: an EXIF rotation is ignored, alpha is dropped, grey and CMYK
are converted by Pillow. That is what the published loaders do, and what the published numbers saw.
Pictures that TFDS itself has opened with OpenCV (`data.retina`) are turned upright, as OpenCV does.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def turn(image: Image.Image) -> Image.Image:
    """The picture upright, by its EXIF data; damaged ones turn nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises whatever its parser stumbles over
        return image


def decode(source: str | os.PathLike | bytes, name: str, upright: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 of an image file, or of its bytes; `name` is what errors call it.

    upright: apply an EXIF rotation.
    Raises FileNotFoundError, or ValueError for a damaged file or one with more than 8 bits.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.mode not in EIGHT_BITS:
                raise ValueError(f"mode {image.mode} instead of 8 bits per channel")
            if upright:
                image = turn(image)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns on the direct way
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Image '{name}' is listed but is not there ({source}). Unpack the archive again."
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Image '{name}' cannot be read: {error}. Restore this file from the original archive."
        ) from error


@dataclass(frozen=True, eq=False)
class Files:
    """An `Images.open` over files: `names` are paths relative to `root`."""

    root: Path
    names: Sequence[str]

    def __call__(self, i: int) -> np.ndarray:
        return decode(self.root / self.names[i], self.names[i])


def missing(root: Path, names: Sequence[str]) -> list[int]:
    """Positions of the names that are no files under `root`; lists every folder only once."""
    folders: dict[str, set[str]] = {}
    absent = []
    for i, name in enumerate(names):
        folder, _, file = name.rpartition("/")
        if folder not in folders:
            path = root / folder
            folders[folder] = set(os.listdir(path)) if path.is_dir() else set()
        if file not in folders[folder]:
            absent.append(i)
    return absent


def require(root: Path, names: Sequence[str], what: str) -> None:
    """Raises FileNotFoundError that counts and names the absent files, if there are any."""
    if absent := missing(root, names):
        first = ", ".join(names[i] for i in absent[:5])
        raise FileNotFoundError(
            f"{what}: {len(absent)} of {len(names)} images are not under {root}; the first: {first}"
            ". The archive is unpacked incompletely or elsewhere."
        )
