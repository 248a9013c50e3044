"""The label maps of VTAB-1k's structured tasks, as google-research/task_adaptation defines them."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
KITTI_VEHICLES = ("Car", "Van", "Truck")  # the first three of the eight types of TFDS


def bin_of(value: float, thresholds: Sequence[float]) -> int:
    """The largest i with thresholds[i] < value: strictly, and in float32 as the original."""
    return int(np.flatnonzero(np.asarray(thresholds, np.float32) < np.float32(value)).max())


def clevr_count(scene: Mapping) -> int:
    """3 to 10 objects -> 0..7. `scene` is one of the "scenes" of a CLEVR scene file."""
    return len(scene["objects"]) - 3


def clevr_distance(scene: Mapping) -> int:
    """Depth of the nearest object (third pixel coordinate): up to 8, 8.5, 9, 9.5, 10, more."""
    depth = min(thing["pixel_coords"][2] for thing in scene["objects"])
    return bin_of(depth, CLEVR_DISTANCES)


def kitti_distance(vehicles: Iterable[float]) -> int:
    """Distances (m) of the vehicles -> up to 8 m, up to 20 m, farther, none."""
    return bin_of(min(vehicles, default=1000.0), KITTI_DISTANCES)


def kitti_vehicles(lines: Iterable[str]) -> list[float]:
    """z in camera coordinates (m), column 14 of a label file, of cars, vans and trucks."""
    rows = [line.split() for line in lines if line.strip()]
    return [float(row[13]) for row in rows if row[0] in KITTI_VEHICLES]


def kitti_splits(train_rand: str, train_mapping: str) -> dict[str, list[int]]:
    """Image numbers of TFDS' splits, which keep each video in one of them (10 % of the videos for
    validation, 10 % for test).

    train_rand: the devkit's comma-separated list; its i-th number is the line (from 1) of
    train_mapping, "date drive frame", that image i was taken from.
    """
    lines = train_mapping.splitlines()
    videos: dict[str, list[int]] = {}
    for image, line in enumerate(train_rand.split(",")):
        videos.setdefault(lines[int(line) - 1].split()[1], []).append(image)
    draw = np.random.RandomState(123)  # the legacy generator, as in the TFDS builder
    tenth = max(1, len(videos) // 10)
    test = set(draw.choice(sorted(videos), tenth, replace=False))
    validation = set(draw.choice(sorted(set(videos) - test), tenth, replace=False))
    names = {
        v: "test" if v in test else "validation" if v in validation else "train" for v in videos
    }
    splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for video, images in videos.items():
        splits[names[video]] += images
    return splits


def dsprites_location(row: int) -> int:
    """Column 0..31 of the sprite in 16 bins; the height is ignored."""
    return row // 32 % 32 // 2


def dsprites_orientation(row: int) -> int:
    """Turn 0..39 in 16 bins of 3, 2, 3, 2, ... steps."""
    return row // 1024 % 40 * 2 // 5


def smallnorb_azimuth(stored: int) -> int:
    """0, 2, ..., 34 -> 0..17."""
    return stored // 2


def svhn_digit(stored: int) -> int:
    """1..10 -> the digit itself: 10 stands for 0."""
    return stored % 10
