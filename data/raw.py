"""The original archives of VTAB-1k, as their makers distribute them, unpacked under data_root/raw.

Every function below opens one archive and returns the `Examples` of one TFDS split: the keys that
the hash order sorts, a label per image, and a way to open chosen images. Membership and keys are
those of the TFDS builders; no TensorFlow is needed.
"""

import csv
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data import Rows, cifar, formats, labels
from data.archives import ARCHIVES, Examples, Open, files, find
from data.pictures import require
from data.retina import Retina, Shrunk


def classes(root: Path, suffix: str = ".jpg") -> list[tuple[str, str]]:
    """(class folder, file name) of every picture in a folder of class folders, both sorted."""
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    return [(d.name, f.name) for d in folders for f in sorted(d.iterdir()) if f.suffix == suffix]


def class_folders(root: Path, split: str, key: str) -> Examples:
    """A folder of class folders in which class numbers follow the alphabet."""
    pairs = classes(root)
    number = {name: i for i, name in enumerate(sorted({c for c, _ in pairs}))}
    names = [f"{c}/{f}" for c, f in pairs]
    keys = [key.format(c=c, f=f) for c, f in pairs]
    return files(root, names, keys, lambda i: number[pairs[i][0]])


def eurosat(root: Path, split: str, task: str) -> Examples:
    return class_folders(find(root, "eurosat"), split, "{c}_{f}")


def resisc45(root: Path, split: str, task: str) -> Examples:
    return class_folders(find(root, "resisc45"), split, "{c}_{f}")


def caltech101(root: Path, split: str, task: str) -> Examples:
    """Own split: TFDS draws 30 images per class from directory listings in whatever order the file
    system gives them. Here names are sorted first; the seed and the number are the same.
    """
    folder = find(root, "caltech101") / "101_ObjectCategories"
    members: dict[str, list[str]] = {}
    for name, file in classes(folder):
        members.setdefault(name, []).append(file)
    number = {name: i for i, name in enumerate(sorted(members, key=str.lower))}
    draw = np.random.RandomState(1234)
    names = []
    for name in sorted(members, key=str.lower):
        train = set(draw.choice(members[name], min(30, len(members[name])), replace=False))
        names += [f"{name}/{f}" for f in members[name] if (f in train) == (split == "train")]
    return files(folder, names, names, lambda i: number[names[i].split("/")[0]])


def cifar100(root: Path, split: str, task: str) -> Examples:
    images, targets = cifar.arrays(root, "cifar100", split)
    return Examples(range(len(targets)), targets.__getitem__, lambda rows: Rows(images[list(rows)]))


def svhn(root: Path, split: str, task: str) -> Examples:
    path = find(root, "svhn") / f"{split}_32x32.mat"
    with formats.naming(path):
        content = formats.matlab(path)
        images, stored = content["X"], content["y"].reshape(-1)
    return Examples(
        range(len(stored)),
        lambda i: labels.svhn_digit(int(stored[i])),
        lambda rows: Rows(np.ascontiguousarray(images[..., list(rows)].transpose(3, 0, 1, 2))),
    )


def dtd(root: Path, split: str, task: str) -> Examples:
    folder = find(root, "dtd")
    name = {"train": "train1", "validation": "val1", "test": "test1"}[split]
    keys = (folder / "labels" / f"{name}.txt").read_text().split()
    attributes = sorted(p.name for p in (folder / "images").iterdir() if p.is_dir())
    return files(folder / "images", keys, keys, lambda i: attributes.index(keys[i].split("/")[0]))


def flowers102(root: Path, split: str, task: str) -> Examples:
    folder = find(root, "flowers102")
    field = {"train": "trnid", "validation": "valid", "test": "tstid"}[split]
    numbers = formats.matlab(folder / "setid.mat")[field].reshape(-1)
    targets = formats.matlab(folder / "imagelabels.mat")["labels"].reshape(-1)
    keys = [f"image_{n:05d}.jpg" for n in numbers]
    return files(folder / "jpg", keys, keys, lambda i: int(targets[numbers[i] - 1]) - 1)


def pets(root: Path, split: str, task: str) -> Examples:
    folder = find(root, "pets")
    path = folder / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
    rows = [x.split() for x in path.read_text().splitlines() if x.strip() and x[0] != "#"]
    keys = [f"{row[0]}.jpg" for row in rows]
    return files(folder / "images", keys, keys, lambda i: int(rows[i][1]) - 1)


def sun397(root: Path, split: str, task: str) -> Examples:
    """The partition and the class list ship with tensorflow_datasets, which is not imported."""
    folder = find(root, "sun397")
    package = find_spec("tensorflow_datasets")
    if package is None:
        raise ModuleNotFoundError(
            "sun397: its partition lists ship with tensorflow-datasets, which is not installed. "
            "Run pip install tensorflow-datasets (TensorFlow itself is not needed)."
        )
    lists = Path(package.origin).parent / "image_classification"
    short = {"train": "tr", "validation": "va", "test": "te"}[split]
    keys = (lists / f"sun397_tfds_{short}.txt").read_text().split()
    names = {name: i for i, name in enumerate((lists / "sun397_labels.txt").read_text().split())}

    def pick(rows: Sequence[int]) -> Open:
        chosen = [keys[i][1:] for i in rows]
        require(folder, chosen, "sun397")
        return Shrunk(folder, chosen, pixels=120_000)

    return Examples(keys, lambda i: names[keys[i].rpartition("/")[0]], pick)


def patch_camelyon(root: Path, split: str, task: str) -> Examples:
    prefix = "valid" if split == "validation" else split
    stem = str(find(root, "patch_camelyon") / f"camelyonpatch_level_2_split_{prefix}")
    for part in "xy":
        if not Path(f"{stem}_{part}.h5").exists():
            raise FileNotFoundError(f"{stem}_{part}.h5 is not there; gunzip the archive's file.")
    targets = formats.hdf5(f"{stem}_y.h5", "y").reshape(-1)
    keys = [f"{prefix}_{i}" for i in range(len(targets))]
    return Examples(
        keys, lambda i: int(targets[i]), lambda rows: formats.Hdf5(f"{stem}_x.h5", "x", list(rows))
    )


def retinopathy(root: Path, split: str, task: str) -> Examples:
    folder = find(root, "retinopathy")
    usage = {"train": None, "validation": "Public", "test": "Private"}[split]
    path = folder / ("retinopathy_solution.csv" if usage else "trainLabels.csv")
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; it is the public solution of the contest.")
    with formats.naming(path), path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if usage is None or r["Usage"] == usage]
        keys, levels = [row["image"] for row in rows], [int(row["level"]) for row in rows]
    images = folder / ("test" if usage else "train")

    def pick(chosen: Sequence[int]) -> Open:
        names = [f"{keys[i]}.jpeg" for i in chosen]
        require(images, names, "retinopathy")
        return Retina(images, names)

    return Examples(keys, levels.__getitem__, pick)


def clevr(root: Path, split: str, task: str) -> Examples:
    folder = find(root, "clevr")
    name = {"train": "train", "validation": "val"}[split]
    label = {"clevr_count": labels.clevr_count, "clevr_distance": labels.clevr_distance}[task]
    path = folder / "scenes" / f"CLEVR_{name}_scenes.json"
    with formats.naming(path):
        targets = {scene["image_filename"]: label(scene) for scene in formats.scenes(path)}
    keys = sorted(targets)
    return files(folder / "images" / name, keys, keys, lambda i: targets[keys[i]])


def dmlab(root: Path, split: str, task: str) -> Examples:
    folder = find(root, "dmlab")
    shards = sorted(folder.glob(f"dmlab-{split}.tfrecord*"))
    if not shards:
        raise FileNotFoundError(
            f"{folder} has no dmlab-{split}.tfrecord file. Complete the archive."
        )
    records = formats.Records.of(shards)
    features = [records.features(i) for i in range(len(records))]
    keys = [f["filename"].bytes_list.value[0].decode() for f in features]
    targets = [f["label"].int64_list.value[0] for f in features]
    return Examples(keys, targets.__getitem__, records.take)


def kitti(root: Path, split: str, task: str) -> Examples:
    folder = find(root, "kitti")
    mapping = next((p for p in (folder / "mapping", folder / "devkit/mapping") if p.is_dir()), None)
    if mapping is None:
        raise FileNotFoundError(
            f"{folder / 'mapping'} is not there; it comes with KITTI's object development kit and "
            "says which video each image belongs to."
        )
    with formats.naming(mapping):
        lists = [(mapping / f"train_{name}.txt").read_text() for name in ("rand", "mapping")]
        numbers = labels.kitti_splits(*lists)[split]
    keys = [f"{n:06d}.png" for n in numbers]

    def label(i: int) -> int:
        path = folder / "training/label_2" / f"{numbers[i]:06d}.txt"
        with formats.naming(path):
            lines = path.read_text().splitlines()
            return labels.kitti_distance(labels.kitti_vehicles(lines))

    return files(folder / "training/image_2", keys, keys, label)


def dsprites(root: Path, split: str, task: str) -> Examples:
    images = formats.Npz(find(root, "dsprites") / ARCHIVES["dsprites"][1], "imgs")
    return Examples(
        range(images.shape[0]), getattr(labels, task), lambda rows: Rows(images.take(rows) * 255)
    )


def smallnorb(root: Path, split: str, task: str) -> Examples:
    toys = "46789x9x18x6x2x96x96-training" if split == "train" else "01235x9x18x6x2x96x96-testing"
    stem = find(root, "smallnorb") / f"smallnorb-5x{toys}"
    images = formats.norb_matrix(Path(f"{stem}-dat.mat"))  # (N, 2, 96, 96): left and right camera
    info = formats.norb_matrix(Path(f"{stem}-info.mat"))  # instance, elevation, azimuth, lighting
    if task == "smallnorb_azimuth":
        label = lambda i: labels.smallnorb_azimuth(int(info[i, 2]))  # noqa: E731
    else:
        label = lambda i: int(info[i, 1])  # noqa: E731
    return Examples(range(len(info)), label, lambda rows: Rows(images[list(rows), 0]))
