"""The mini suite: four tasks shaped like VTAB-1k (train800, val200, test) that need no download.

digits                scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 10 classes
textures              from which of 14 pictures of scikit-image is this 32 x 32 patch? The splits
                      are cut from disjoint areas: the left 55 % of each picture, a strip of 15 %,
                      and the right 30 %
dsprites_location     rendered sprites, "dSprites-like": the archive itself is not read. Rows and
dsprites_orientation  labels are VTAB-1k's (train800, val200, and the first 2,000 rows of its test
                      split, all in hash order)

train800val200 is train800 followed by val200; for this suite that order is our own choice.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data import Images, Rows
from data.manifest import Manifest, hash_order, replacing

VERSION = 1  # of the cached arrays: raise it whenever a picture or a label would change
SPLITS = {"train800": slice(0, 800), "val200": slice(800, 1000), "train800val200": slice(0, 1000)}
PICTURES = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png",
    "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "retina.jpg", "rocket.jpg",
)  # fmt: skip
PATCH = 32
DSPRITES_ROWS = 3 * 6 * 40 * 32 * 32
DSPRITES_TEST = 2000
# Half the outline of the dSprites heart at scale 1: (u, v) with v downwards, fitted to the public
# preview animation.
HEART = 1.01 * np.array([
    (0, -6.2), (0.85, -7), (1.89, -8), (3.07, -9), (4.77, -9.4), (6.47, -9), (7.64, -8), (8.56, -7),
    (9.21, -6), (9.5, -5), (9.6, -4), (9.47, -3), (9.15, -2), (8.69, -1), (8.04, 0), (7.25, 1),
    (6.4, 2), (5.4, 3), (4.4, 4), (3.25, 5), (2.2, 6), (1.35, 7), (0.6, 8), (0, 9.2),
])  # fmt: skip


def read(split: str, *, task: str, data_root: str | os.PathLike) -> Images:
    """One split of a mini task. Made on first use, then cached in `data_root`/mini (which may be
    read-only).

    Raises ValueError for an unknown task or split.
    """
    if task not in TASKS:
        raise ValueError(f"The mini suite has no task '{task}'; there are {', '.join(TASKS)}.")
    if split not in (*SPLITS, "test"):
        raise ValueError(
            f"The mini suite has no split '{split}'; there are {', '.join(SPLITS)}, test."
        )
    make, num_classes, pixels = TASKS[task]
    arrays = _cached(Path(data_root).expanduser() / "mini" / f"{task}-v{VERSION}.npz", make)
    rows = SPLITS.get(split, slice(1000, None))
    ids, labels = tuple(map(str, arrays["ids"][rows])), arrays["labels"][rows]
    manifest = Manifest(task, split, ids, labels, num_classes, source="mini", pixels=pixels)
    return Images(manifest, Rows(arrays["images"][rows]))


def _cached(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile):  # absent, or damaged: then made anew
        arrays = make()
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError:
        pass  # a cache only: nothing is lost but the seconds it would save
    return arrays


def _digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = hash_order("train", range(len(bunch.target)))
    images = np.rint(bunch.images[order] * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return {
        "images": images,
        "labels": bunch.target[order],
        "ids": np.array([str(i) for i in order]),
    }


def _textures() -> dict[str, np.ndarray]:
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    pictures = [np.asarray(Image.open(folder / name).convert("RGB")) for name in PICTURES]
    images, labels, ids = [], [], []
    for split, count, left, right in (
        ("train", 800, 0, 0.55),
        ("val", 200, 0.55, 0.7),
        ("test", 1400, 0.7, 1),
    ):
        streams = [
            _positions(split, name, p.shape, left, right)
            for name, p in zip(PICTURES, pictures, strict=True)
        ]
        for k in range(count):  # the classes in turn, so that every split is balanced
            label = k % len(PICTURES)
            x, y = next(streams[label])
            images.append(pictures[label][y : y + PATCH, x : x + PATCH])
            labels.append(label)
            ids.append(f"{PICTURES[label]}@{x},{y}")
    return {"images": np.stack(images), "labels": np.array(labels), "ids": np.array(ids)}


def _positions(
    split: str, name: str, shape: tuple[int, ...], left: float, right: float
) -> Iterator[tuple[int, int]]:
    """Distinct corners (x, y) of patches between two fractions of a picture's width, drawn by
    hashing a counter.
    """
    height, width = shape[:2]
    first, last = int(left * width), int(right * width) - PATCH
    seen, k = set(), 0
    while True:
        digest = hashlib.md5(f"{split}/{name}/{k}".encode()).digest()
        k += 1
        x = first + int.from_bytes(digest[:8], "big") % (last - first + 1)
        y = int.from_bytes(digest[8:], "big") % (height - PATCH + 1)
        if (x, y) not in seen:
            seen.add((x, y))
            yield x, y


@cache
def dsprites_rows() -> tuple[int, ...]:
    """The rows of dSprites that make train800, val200 and the first 2,000 of VTAB-1k's test split,
    in that order.
    """
    order = hash_order("train", range(DSPRITES_ROWS))
    return tuple(order[:800] + order[589_824:590_024] + order[663_552 : 663_552 + DSPRITES_TEST])


def sprite(row: int) -> np.ndarray:
    """The 64 x 64 image (0 or 255) that row `row` of dSprites shows, rendered; row-major in (shape,
    scale, orientation, x, y). IoU with the public preview animation: square 0.9995, ellipse 0.995,
    heart 0.987.
    """
    shape, scale, turn, i, j = np.unravel_index(row, (3, 6, 40, 32, 32))
    centres = np.arange(64) + 0.5
    dx = centres[None, :] - (16 + 32 * i / 31)
    dy = centres[:, None] - (16 + 32 * j / 31)
    size, angle = (
        0.5 + 0.1 * scale,
        2 * np.pi * turn / 39,
    )  # counter-clockwise on the screen, where y points down
    u = (np.cos(angle) * dx - np.sin(angle) * dy) / size
    v = (np.sin(angle) * dx + np.cos(angle) * dy) / size
    if shape == 0:
        inside = (np.abs(u) <= 9.6) & (np.abs(v) <= 9.6)
    elif shape == 1:
        inside = (u / 12.8) ** 2 + (v / 7.2) ** 2 <= 1
    else:
        inside = np.zeros(
            u.shape, dtype=bool
        )  # even-odd rule along +u; the outline is mirrored, hence |u|
        for (u0, v0), (u1, v1) in pairwise(HEART):
            if v0 != v1:
                inside ^= ((v0 <= v) != (v1 <= v)) & (
                    np.abs(u) < u0 + (v - v0) * (u1 - u0) / (v1 - v0)
                )
    return inside.astype(np.uint8) * 255


def _dsprites(label: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    rows = np.array(dsprites_rows())
    return {
        "images": np.stack([sprite(r) for r in rows]),
        "labels": label(rows),
        "ids": rows.astype(str),
    }


def _location() -> dict[str, np.ndarray]:
    return _dsprites(
        lambda rows: rows // 32 % 32 // 2
    )  # 32 columns in 16 bins; the height is ignored


def _orientation() -> dict[str, np.ndarray]:
    return _dsprites(
        lambda rows: rows // 1024 % 40 * 2 // 5
    )  # 40 turns in 16 bins of 3, 2, 3, 2, ...


TASKS: dict[str, tuple[Callable[[], dict[str, np.ndarray]], int, str]] = {
    "digits": (_digits, 10, "native"),
    "textures": (_textures, len(PICTURES), "native"),
    "dsprites_location": (_location, 16, "rendered"),
    "dsprites_orientation": (_orientation, 16, "rendered"),
}
