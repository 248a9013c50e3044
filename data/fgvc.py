"""The five fine-grained sets (FGVC) in VPT's layout, or as their makers distribute them.

json      VPT's train.json, val.json and test.json: {image path: class id}. Each file of VPT numbers
          its own classes, which shifts every label behind a class that a file lacks; here one map
          is made from the three files together.
official  the makers' lists. VPT's validation images are not published in a form that still can be
          had, so the official training images are divided by `own_split`.
auto      json where train.json is present, official otherwise. The manifest says which.

Splits: train, val, train+val (train followed by val) and test.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Images, join, store
from data.formats import matlab, naming
from data.manifest import Manifest, hash_order
from data.pictures import Files, missing, require

Listing = dict[str, list[tuple[str, str]]]  # split -> (path below the dataset's folder, class)


@dataclass(frozen=True)
class Set:
    """folders: its names, VPT's first. images: where VPT's paths start. official: list reader."""

    folders: tuple[str, ...]
    images: str
    official: Callable[[Path], Listing]
    proof: str
    origin: str


def lines(path: Path) -> list[list[str]]:
    """Fields of every line of a text file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there. Unpack the archive again.")
    return [line.split() for line in path.read_text().splitlines() if line.strip()]


def birds(folder: Path) -> Listing:
    """CUB-200-2011 and NABirds: images.txt, image_class_labels.txt, train_test_split.txt."""
    names = {row[0]: row[1] for row in lines(folder / "images.txt")}
    labels = {row[0]: row[1] for row in lines(folder / "image_class_labels.txt")}
    found: Listing = {"train": [], "test": []}
    for number, train in lines(folder / "train_test_split.txt"):
        if number not in names or number not in labels:
            raise ValueError(f"{folder}: image {number} is in train_test_split.txt only.")
        split = "train" if train == "1" else "test"
        found[split].append((f"images/{names[number]}", labels[number]))
    return found


def flowers(folder: Path) -> Listing:
    labels = matlab(folder / "imagelabels.mat")["labels"].reshape(-1)
    splits = matlab(folder / "setid.mat")
    fields = {"train": "trnid", "val": "valid", "test": "tstid"}
    return {
        split: [(f"jpg/image_{n:05d}.jpg", str(labels[n - 1])) for n in splits[field].reshape(-1)]
        for split, field in fields.items()
    }


def dogs(folder: Path) -> Listing:
    found = {}
    for split in ("train", "test"):
        path = next((p for p in folder.glob(f"**/{split}_list.mat")), folder / f"{split}_list.mat")
        content = matlab(path)
        names = [str(cell.item()) for cell in content["file_list"].reshape(-1)]
        labels = content["labels"].reshape(-1)
        found[split] = [(f"Images/{n}", str(y)) for n, y in zip(names, labels)]
    return found


def cars(folder: Path) -> Listing:
    """The combined archive (cars_annos.mat, car_ims/), or the separate one (devkit/, cars_train/,
    cars_test/). Their numbers of images differ and must not be translated by dropping the folder.
    """

    def text(cell: np.ndarray) -> str:
        return str(np.asarray(cell).reshape(-1)[0])

    if (folder / "cars_annos.mat").exists():
        found: Listing = {"train": [], "test": []}
        for row in matlab(folder / "cars_annos.mat")["annotations"].reshape(-1):
            split = "test" if text(row["test"]) == "1" else "train"
            found[split].append((text(row["relative_im_path"]), text(row["class"])))
        return found
    found = {}
    tables = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, table in tables.items():
        path = folder / table
        path = path if path.exists() else folder / "devkit" / path.name
        nested = folder / f"cars_{split}" / f"cars_{split}"  # as in some mirrors
        place = f"cars_{split}/cars_{split}" if nested.is_dir() else f"cars_{split}"
        rows = matlab(path)["annotations"].reshape(-1)
        found[split] = [(f"{place}/{text(row['fname'])}", text(row["class"])) for row in rows]
    return found


SETS = {
    "cub200": Set(
        ("CUB_200_2011", "CUB", "cub"), "images", birds, "images.txt",
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
    ),
    "nabirds": Set(
        ("nabirds", "NABirds"), "images", birds, "images.txt", "https://dl.allaboutbirds.org/nabirds"
    ),
    "oxford_flowers": Set(
        ("OxfordFlowers", "OxfordFlower", "oxfordflower", "flowers-102"), ".", flowers, "setid.mat",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "stanford_dogs": Set(
        ("StanfordDogs", "stanforddogs", "stanford_dogs"), "Images", dogs, "Images",
        "http://vision.stanford.edu/aditya86/ImageNetDogs/",
    ),
    "stanford_cars": Set(
        ("StanfordCars", "stanfordcars", "stanford_cars"), ".", cars, ".",
        "a mirror: the original host (ai.stanford.edu/~jkrause/cars) is offline",
    ),
}  # fmt: skip


def read(
    split: str,
    *,
    task: str,
    num_classes: int,
    splits: Mapping[str, int],
    data_root: str | os.PathLike,
    source: str = "auto",
) -> Images:
    """One split of an FGVC set. `splits` states how many images each split has."""
    if split not in splits:
        raise ValueError(f"{task} has no split '{split}'; there are {', '.join(splits)}.")
    root = Path(data_root).expanduser()
    if source.partition("/")[0] == "store":
        images = store.read(root, split, "fgvc", task, num_classes, source)
        if len(images) != splits[split]:
            raise ValueError(f"{task}: the store has {len(images)} images in its split '{split}'.")
        return images
    if source == "auto":
        folder = find(root, task)
        source = "json" if (folder / "train.json").exists() else "official"
    elif source in ("json", "official"):
        folder = find(root, task, "train.json" if source == "json" else SETS[task].proof)
    else:
        raise ValueError(f"FGVC has no source '{source}'; there are auto, json, official, store.")
    if source == "json":
        listing = read_json(folder, SETS[task].images)
    else:
        with naming(folder):
            listing = SETS[task].official(folder)
        if "val" not in listing:
            listing["train"], listing["val"] = own_split(listing["train"])
            source = "official-own"
    number = class_numbers(task, listing, num_classes)
    parts = []
    for part in ("train", "val") if split == "train+val" else (split,):
        names, labels = zip(*listing[part])
        if len(names) != splits[part]:
            raise ValueError(
                f"{task}: {folder} has {len(names)} images in its split '{part}' ({source}); "
                f"expected {splits[part]}. Complete the archive or the split files."
            )
        require(folder, names, task)
        numbers = np.array([number[label] for label in labels])
        manifest = Manifest(task, part, names, numbers, num_classes, source, "native")
        parts.append(Images(manifest, Files(folder, names)))
    return join(split, parts)


def find(data_root: Path, task: str, proof: str | None = None) -> Path:
    """The set's folder under any of its names, in data_root/fgvc or data_root: where `proof` is
    there, or (None) VPT's json files, or else the official archive.

    Raises ValueError if several folders hold the same layout: they need not have the same splits.
    """
    names = [root / name for root in (data_root / "fgvc", data_root) for name in SETS[task].folders]
    for file in ("train.json", SETS[task].proof) if proof is None else (proof,):
        found: list[Path] = []
        for folder in names:  # CUB and cub are one folder where the disk ignores case
            if (folder / file).exists() and not any(folder.samefile(other) for other in found):
                found.append(folder)
        if len(found) > 1:
            both = " and ".join(map(str, found))
            raise ValueError(
                f"{task}: {both} both hold {'it' if file == '.' else file}. Move away the one that "
                "is not meant, or name another data_root."
            )
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{task}: not found; expected {data_root / 'fgvc' / SETS[task].folders[0]} with the "
        f"original archive ({SETS[task].origin}) and, if you have them, VPT's three json files."
    )


def class_numbers(task: str, listing: Listing, num_classes: int) -> dict[str, int]:
    """Class id -> 0, 1, ... in ascending order of the ids of all splits together.

    Raises ValueError if the classes are not `num_classes`, if one has no training image, or if an
    image is in two splits.
    """
    found = {label for rows in listing.values() for _, label in rows}
    if len(found) != num_classes:
        raise ValueError(
            f"{task}: the splits name {len(found)} classes; expected {num_classes}. The lists are "
            "incomplete or of another data set."
        )
    if absent := found - {label for _, label in listing["train"]}:
        first = ", ".join(sorted(absent)[:5])
        raise ValueError(
            f"{task}: {len(absent)} classes have no training image; the first: {first}."
        )
    seen: dict[str, str] = {}
    for split, rows in listing.items():
        for name, _ in rows:
            if seen.setdefault(name, split) != split:
                raise ValueError(f"{task}: '{name}' is in the splits '{seen[name]}' and '{split}'.")
    return {label: i for i, label in enumerate(sorted(found, key=int))}


def own_split(rows: list[tuple[str, str]]) -> tuple[list, list]:
    """Divides training images into (train, val) with ceil(N / 10) for val, as VPT's sizes imply.

    Every class gives a tenth, rounded down; the classes with the largest remainders give one more.
    Within a class, images go by their hash order under the salt "val"; so do classes of equal
    remainders. Nothing is drawn, so the split is the same everywhere.
    """
    members: dict[str, list[int]] = {}
    for i in hash_order("val", [name for name, _ in rows]):
        members.setdefault(rows[i][1], []).append(i)
    classes = [sorted(members)[i] for i in hash_order("val", sorted(members))]
    classes.sort(key=lambda c: -(len(members[c]) % 10))  # stable
    extra = -(-len(rows) // 10) - sum(len(m) // 10 for m in members.values())
    quota = {c: len(members[c]) // 10 + (k < extra) for k, c in enumerate(classes)}
    chosen = {i for c in classes for i in members[c][: quota[c]]}
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


def read_json(folder: Path, images: str) -> Listing:
    """VPT's three files, with each key resolved to a file below `folder`."""
    listing: Listing = {}
    for split in ("train", "val", "test"):
        path = folder / f"{split}.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; VPT's layout needs all three files.")
        try:
            pairs = json.loads(path.read_text(), object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        if not isinstance(pairs, list):
            raise ValueError(f"{path}: expected {{path: class id}}, found {pairs!r:.60}.")
        for row in pairs:
            if not isinstance(row, tuple) or type(row[1]) is not int:
                raise ValueError(f"{path}: expected {{path: class id}}, found {row!r}.")
        if len({key for key, _ in pairs}) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{path}: '{twice}' is listed twice.")
        listing[split] = [(key, str(label)) for key, label in pairs]
    keys = [key for rows in listing.values() for key, _ in rows]
    names = dict(zip(keys, resolve(folder, images, keys)))
    return {split: [(names[key], y) for key, y in rows] for split, rows in listing.items()}


def resolve(folder: Path, images: str, keys: list[str]) -> list[str]:
    """Paths below `folder` for VPT's keys: below the image root, below the folder, or, for what is
    in neither place, the only file of that name. Raises FileNotFoundError for the rest.
    """
    outside = [key for key in keys if key.startswith("/") or ".." in key.split("/")]
    if outside:
        raise ValueError(f"{folder}: '{outside[0]}' points out of the dataset's folder.")
    names = [key if images == "." else f"{images}/{key}" for key in keys]
    for i in missing(folder, names):
        names[i] = keys[i]
    if lost := missing(folder, names):
        by_name: dict[str, list[str]] = {}
        for path in folder.rglob("*.*"):
            by_name.setdefault(path.name, []).append(path.relative_to(folder).as_posix())
        for i in lost:
            candidates = by_name.get(Path(names[i]).name, [])
            names[i] = candidates[0] if len(candidates) == 1 else names[i]
    require(folder, names, folder.name)
    return names
