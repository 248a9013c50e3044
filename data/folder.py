"""Pictures of one's own: <data_root>/<name>/<split>/<class>/*.jpg, as torchvision's ImageFolder.

The splits are train, val and test. The classes are the folders of train, numbered in alphabetical
order; the other splits may lack some but bring no new ones. Without a folder val, a tenth of the
training images is set aside for it by the hash order of their names, as for FGVC.
"""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from data import Images, join
from data.fgvc import own_split
from data.manifest import Manifest
from data.pictures import Files

SPLITS = ("train", "val", "train+val", "test")


def read(split: str, *, name: str, num_classes: int, data_root: str | os.PathLike) -> Images:
    """One split. Raises FileNotFoundError for a folder that is not there, ValueError for classes
    that do not agree with train's or with `num_classes`."""
    if split not in SPLITS:
        raise ValueError(f"{name} has no split '{split}'; there are {', '.join(SPLITS)}.")
    root = Path(data_root).expanduser() / name
    number = {label: i for i, label in enumerate(classes(root / "train"))}
    if len(number) != num_classes:
        raise ValueError(
            f"{root / 'train'} has {len(number)} folders, one for each class; give "
            f"dataset.num_classes={len(number)}."
        )
    own = not (root / "val").is_dir()
    parts = []
    for part in split.split("+"):
        rows = listed(root, "train" if own and part == "val" else part, number)
        if own and part != "test":
            rows = own_split(rows)[part == "val"]
        names, labels = zip(*rows)
        numbers = np.array([number[label] for label in labels])
        manifest = Manifest(name, part, names, numbers, num_classes, "folder", "native")
        parts.append(Images(manifest, Files(root, names)))
    return join(split, parts)


def classes(folder: Path) -> list[str]:
    """The folders of a split."""
    try:
        return find_classes(str(folder))[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has no folder with pictures for each class. What is expected: "
            f"{folder.parent}/{{train,val,test}}/<class>/<picture>, val if you have it."
        ) from error


def listed(root: Path, split: str, number: dict[str, int]) -> list[tuple[str, str]]:
    """The pictures of a split, (path below `root`, class), in the order of their paths."""
    there = classes(root / split)
    if new := sorted({*there} - {*number}):
        raise ValueError(f"{root / split} has the class '{new[0]}', which {root}/train has not.")
    kept = {label: number[label] for label in there}
    found = make_dataset(str(root / split), kept, IMG_EXTENSIONS, allow_empty=True)
    paths = [Path(path).relative_to(root) for path, _ in found]
    if not paths:
        raise ValueError(f"{root / split} holds no picture ({', '.join(IMG_EXTENSIONS)}).")
    return [(path.as_posix(), path.parts[1]) for path in paths]
