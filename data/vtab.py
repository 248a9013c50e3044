"""VTAB-1k: 19 tasks of 800 + 200 training and validation images and the full test sets.

Three sources of the same images, which differ in their pixels:

folder  the community archive: JPEG files and list files, as exported for NOAH and used by most
        released code. Everything in it went through JPEG at quality 75, also 32 x 32 pictures.
raw     the original archives; the subset follows from the hash order (`data.manifest`).
tfds    prepared TFDS folders, read without TensorFlow.
store   what `python -m scripts.prepare` has exported from one of these.

Slices and sizes: google-research/task_adaptation and its unit tests. train800val200 is train800
followed by val200, except in the folder, which lists (and stores) these images a second time.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data import Images, join, raw, store, tfds
from data.formats import naming
from data.manifest import Manifest, hash_order
from data.pictures import Files, require

Slice = tuple[str, int, int]


@dataclass(frozen=True)
class Task:
    """Where a task's images lie in the order of TFDS, and what other people call it.

    folders: its names in the community archive; the first one is the exporter's.
    archive: the function of `data.raw` that reads the original archive.
    sizes: images in each TFDS split that a slice cuts (all of them are checked).
    also: other admissible sizes.
    """

    folders: tuple[str, ...]
    archive: str
    sizes: Mapping[str, int]
    train800: Slice
    val200: Slice
    test: Slice
    also: Mapping[str, int] = field(default_factory=dict)


def _task(
    folders: str, archive: str, sizes: Mapping[str, int], val: str, start: int, test: str = "test",
    cut: int = 0, also: Mapping[str, int] | None = None,
) -> Task:  # fmt: skip
    names = tuple(folders.split())
    train, val200 = ("train", 0, 800), (val, start, start + 200)
    return Task(names, archive, sizes, train, val200, (test, cut, sizes[test]), also or {})


_clevr = ("clevr", {"train": 70_000, "validation": 15_000}, "train", 63_000, "validation")
_dsprites = ("dsprites", {"train": 737_280}, "train", 589_824, "train", 663_552)
_smallnorb = ("smallnorb", {"train": 24_300, "test": 24_300}, "test", 0, "test", 12_150)


def _sizes(train: int, validation: int, test: int) -> dict[str, int]:
    return {"train": train, "validation": validation, "test": test}


TASKS = {
    "cifar100": _task(
        "cifar cifar100 cifar-100", "cifar100", {"train": 50_000, "test": 10_000}, "train", 45_000
    ),
    # One entry of the background class is no picture. If it is among the 30 names that TFDS drew
    # for training, there are 3,059 and 6,085 instead; both exports are about.
    "caltech101": _task(
        "caltech101 caltech-101", "caltech101", {"train": 3_060, "test": 6_084}, "train", 2_754,
        also={"train": 3_059, "test": 6_085},
    ),
    "dtd": _task("dtd", "dtd", _sizes(1_880, 1_880, 1_880), "validation", 0),
    "flowers102": _task(
        "oxford_flowers102 flowers102", "flowers102", _sizes(1_020, 1_020, 6_149), "validation", 0
    ),
    "pets": _task(
        "oxford_iiit_pet oxford_pet pets", "pets", {"train": 3_680, "test": 3_669}, "train", 2_944
    ),
    "svhn": _task(
        "svhn svhn_cropped", "svhn", {"train": 73_257, "test": 26_032}, "train", 65_931
    ),
    # Later versions of TFDS skip an unreadable training image, far behind the first 800.
    "sun397": _task(
        "sun397", "sun397", _sizes(76_128, 10_875, 21_750), "validation", 0,
        also={"train": 76_127},
    ),
    "patch_camelyon": _task(
        "patch_camelyon pcam", "patch_camelyon", _sizes(262_144, 32_768, 32_768), "validation", 0
    ),
    "eurosat": _task("eurosat", "eurosat", {"train": 27_000}, "train", 16_200, "train", 21_600),
    "resisc45": _task("resisc45", "resisc45", {"train": 31_500}, "train", 18_900, "train", 25_200),
    "retinopathy": _task(
        "diabetic_retinopathy retinopathy", "retinopathy", _sizes(35_126, 10_906, 42_670),
        "validation", 0,
    ),
    "clevr_count": _task("clevr_count", *_clevr),
    "clevr_distance": _task("clevr_dist clevr_distance", *_clevr),
    "dmlab": _task("dmlab", "dmlab", _sizes(65_550, 22_628, 22_735), "validation", 0),
    "kitti_distance": _task(
        "kitti kitti_distance", "kitti", _sizes(6_347, 423, 711), "validation", 0
    ),
    "dsprites_location": _task("dsprites_loc dsprites_location", *_dsprites),
    "dsprites_orientation": _task("dsprites_ori dsprites_orientation", *_dsprites),
    "smallnorb_azimuth": _task("smallnorb_azi smallnorb_azimuth", *_smallnorb),
    "smallnorb_elevation": _task("smallnorb_ele smallnorb_elevation", *_smallnorb),
}  # fmt: skip


def read(
    split: str,
    *,
    task: str,
    num_classes: int,
    splits: Mapping[str, int],
    data_root: str | os.PathLike,
    source: str = "folder",
) -> Images:
    """One split of a VTAB-1k task. `splits` states how many images each split has.

    Raises FileNotFoundError if the source is not under `data_root`, ValueError if it is damaged or
    is another dataset's.
    """
    if split not in splits:
        raise ValueError(f"{task} has no split '{split}'; there are {', '.join(splits)}.")
    root = Path(data_root).expanduser()
    if source == "folder":
        return read_folder(root, split, task, num_classes, splits[split])
    if source in ("raw", "tfds"):
        read_one = read_raw if source == "raw" else read_tfds
        parts = ("train800", "val200") if split == "train800val200" else (split,)
        return join(split, [read_one(root, part, task, num_classes) for part in parts])
    if source.partition("/")[0] == "store":
        images = store.read(root, split, "vtab", task, num_classes, source)
        if len(images) not in (splits[split], TASKS[task].also.get(split)):
            raise ValueError(f"{task}: the store has {len(images)} images in its split '{split}'.")
        return images
    raise ValueError(f"VTAB-1k has no source '{source}'; there are folder, raw, tfds, store.")


def read_raw(root: Path, split: str, task: str, num_classes: int) -> Images:
    """A slice of an original archive in hash order."""
    salt, start, stop = getattr(TASKS[task], split)
    with naming(root / "raw"):
        examples = getattr(raw, TASKS[task].archive)(root / "raw", salt, task)
    check_size(task, salt, len(examples.keys), "the original archive")
    rows = hash_order(salt, examples.keys)[start:stop]
    with naming(root / "raw"):
        labels = np.array([examples.label(i) for i in rows])
    keys = [examples.keys[i] for i in rows]
    ids = tuple(k if isinstance(k, str) else f"{salt}/{k}" for k in keys)
    source = "raw-own" if task == "caltech101" else "raw"  # see raw.caltech101
    manifest = Manifest(task, split, ids, labels, num_classes, source, pixels="native")
    return Images(manifest, examples.pick(rows))


def read_tfds(root: Path, split: str, task: str, num_classes: int) -> Images:
    """A slice of a prepared TFDS split. Ids are positions in it: not every builder keeps its
    keys.
    """
    salt, start, stop = getattr(TASKS[task], split)
    records = tfds.records(root, TASKS[task].archive, salt)
    check_size(task, salt, len(records), "the TFDS folder")
    shift = len(records) - TASKS[task].sizes[salt]
    if start or stop == TASKS[task].sizes[salt]:  # val200 and test are cut from the end
        start, stop = start and start + shift, stop + shift
    chosen = records.take(range(start, stop))
    with naming(chosen.files[0].parent):
        labels = np.array([tfds.label(task, chosen.features(i)) for i in range(len(chosen))])
    ids = tuple(f"{salt}[{i}]" for i in range(start, stop))
    manifest = Manifest(task, split, ids, labels, num_classes, source="tfds", pixels="native")
    return Images(manifest, chosen)


def check_size(task: str, salt: str, found: int, what: str) -> None:
    expected = TASKS[task].sizes[salt]
    if found not in (expected, TASKS[task].also.get(salt)):
        raise ValueError(
            f"{task}: {what} has {found} images in its split '{salt}'; expected {expected}. With "
            "other members the hash order cuts other images; complete the archive."
        )


def find_folder(root: Path, task: str) -> Path:
    """The task's folder in the community archive, under any of its names, nested once or not."""
    places = [root / "vtab-1k", root / "vtab-1k" / "vtab-1k", root]
    found = [p / name for p in places for name in TASKS[task].folders if (p / name).is_dir()]
    found = [p for p in found if any((p / f"{s}.txt").exists() for s in ("train800", "test"))]
    if not found:
        expected = places[0] / TASKS[task].folders[0]
        raise FileNotFoundError(
            f"{task}: no folder of the community archive; expected {expected} with train800.txt, "
            "val200.txt, train800val200.txt, test.txt and images/. The archive is linked from the "
            "repositories of NOAH, RepAdapter and SSF; unpack it there, or choose another source "
            "(dataset.source=raw, tfds or store)."
        )
    if len({p.resolve() for p in found}) > 1:
        raise ValueError(
            f"{task}: two copies of the community archive, {found[0]} and {found[1]}. "
            "Remove one, so that it is plain which one a result comes from."
        )
    return found[0]


def read_folder(root: Path, split: str, task: str, num_classes: int, count: int) -> Images:
    """One list file and its pictures. All files must be there; they are decoded on demand."""
    folder = find_folder(root, task)
    path = folder / f"{split}.txt"
    names, labels = read_list(path, num_classes)
    if len(names) not in (count, TASKS[task].also.get(split, count)):
        raise ValueError(
            f"{path} has {len(names)} lines; expected {count}. The list is incomplete or belongs "
            "to another export; take it from the archive again."
        )
    require(folder, names, f"{task}/{split}")
    manifest = Manifest(task, split, names, labels, num_classes, source="folder", pixels="jpeg75")
    return Images(manifest, Files(folder, names))


def read_list(path: Path, num_classes: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Paths and labels of a list file: a path relative to its folder, a space, a label per line."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; the community archive has it. Copy it back.")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    names, labels = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdecimal():
            raise ValueError(f"{path}, line {number}: expected 'path label', found {line!r}.")
        name, label = fields[0], int(fields[1])
        if label >= num_classes:
            raise ValueError(f"{path}, line {number}: label {label} is not below {num_classes}.")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{path}, line {number}: '{name}' points out of the dataset's folder.")
        names.append(name)
        labels.append(label)
    return tuple(names), np.array(labels, dtype=np.int64)
