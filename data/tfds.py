"""Prepared TensorFlow Datasets folders, read without TensorFlow.

TFDS writes the examples of a split in hash order, cut into shards; reading the shards by name gives
that order back. Both of its record formats are read: tfrecord (the default, what users of VPT have)
and array_record. Preparing a folder takes TFDS and, for most of these data sets, TensorFlow.
"""

import os
import re
from pathlib import Path

from data import labels
from data.formats import Records

# The builder (and configuration) of each archive, and the major versions with VTAB-1k's examples.
BUILDERS = {
    "cifar100": ("cifar100", "3"),
    "caltech101": ("caltech101", "3"),
    "dtd": ("dtd", "3"),
    "flowers102": ("oxford_flowers102", "2"),
    "pets": ("oxford_iiit_pet", "34"),  # 3.2.0 is gone from TFDS 4.9.10; 4.0.0 has the same members
    "svhn": ("svhn_cropped", "3"),
    "sun397": ("sun397/tfds", "4"),
    "patch_camelyon": ("patch_camelyon", "2"),
    "eurosat": ("eurosat/rgb", "2"),
    "resisc45": ("resisc45", "3"),
    "retinopathy": ("diabetic_retinopathy_detection/btgraham-300", "3"),
    "clevr": ("clevr", "3"),
    "dmlab": ("dmlab", "2"),
    "kitti": ("kitti", "3"),
    "dsprites": ("dsprites", "2"),
    "smallnorb": ("smallnorb", "2"),
}
SHARD = re.compile(r"-(?P<split>\w+)\.(tfrecord|array_record)-(?P<i>\d{5})-of-(?P<n>\d{5})$")


def roots(data_root: Path) -> list[Path]:
    """Where prepared folders may lie: under data_root, and where TFDS itself would look."""
    home = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return [data_root / "tfds", Path(home).expanduser()]


def find(data_root: Path, archive: str) -> Path:
    """The newest fitting version of a prepared data set."""
    name, majors = BUILDERS[archive]
    for root in roots(data_root):
        folder = root / name
        versions = [p for p in folder.glob("*.*.*") if p.is_dir() and p.name[0] in majors]
        if versions:
            return max(versions, key=lambda p: [int(x) for x in p.name.split(".")])
    raise FileNotFoundError(
        f"{archive}: no prepared TFDS folder {roots(data_root)[0] / name}/{majors[-1]}.*.*. Copy "
        "one there, set TFDS_DATA_DIR, or prepare it where TensorFlow is installed: "
        f"python -m scripts.prepare source=tfds, or tfds build {name}."
    )


def records(data_root: Path, archive: str, split: str) -> Records:
    """All examples of a TFDS split, in hash order. Raises ValueError if a shard is missing."""
    folder = find(data_root, archive)
    matches = [(SHARD.search(p.name), p) for p in sorted(folder.iterdir())]
    shards = [(int(m["i"]), int(m["n"]), p) for m, p in matches if m and m["split"] == split]
    if not shards or [i for i, _, _ in shards] != list(range(shards[0][1])):
        raise ValueError(
            f"{folder} has {len(shards)} of {shards[0][1] if shards else '?'} shards of its split "
            f"'{split}' as tfrecord or array_record. Copy or prepare it again."
        )
    scale = 255 if archive == "dsprites" else 1  # stored as 0 and 1
    return Records.of([p for _, _, p in shards], scale)


def label(task: str, features: dict) -> int:
    """The VTAB-1k label of a parsed example."""

    def values(name: str, kind: str) -> list:
        if name not in features:
            raise KeyError(f"no feature {name}; there are {', '.join(sorted(features))}")
        return list(getattr(features[name], kind).value)

    if task in ("clevr_count", "clevr_distance"):
        coordinates = values("objects/pixel_coords", "float_list")
        scene = {
            "objects": [
                {"pixel_coords": coordinates[i : i + 3]} for i in range(0, len(coordinates), 3)
            ]
        }
        return getattr(labels, task)(scene)
    if task == "kitti_distance":
        kinds = values("objects/type", "int64_list")
        depths = values("objects/location", "float_list")[2::3]
        return labels.kitti_distance(
            d for k, d in zip(kinds, depths) if k < len(labels.KITTI_VEHICLES)
        )
    if task == "dsprites_location":
        return values("label_x_position", "int64_list")[0] // 2
    if task == "dsprites_orientation":
        return values("label_orientation", "int64_list")[0] * 2 // 5
    name = {"smallnorb_azimuth": "label_azimuth", "smallnorb_elevation": "label_elevation"}
    return values(name.get(task, "label"), "int64_list")[0]
