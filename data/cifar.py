"""CIFAR-10 and CIFAR-100 in full, from the binary or the Python archive; neither is unpickled.

Splits: val is the last 5,000 training images in hash order, train the 45,000 before them (VTAB-1k's
train800 and val200 begin these two), train+val the official 50,000 and test the official 10,000.
"""

import os
import pickletools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data import Images, Rows
from data.manifest import Manifest, hash_order

# Files of the official splits, bytes before each picture in the binary archive, and the key of the
# labels in the Python one. The last label byte counts: CIFAR-100 stores the coarse one first.
LAYOUTS = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], 1, "labels"),
    "cifar100": (["train"], ["test"], 2, "fine_labels"),
}
FOLDERS = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}
INTEGERS = ("BININT1", "BININT2", "BININT", "INT")


def read(
    split: str,
    *,
    task: str,
    num_classes: int,
    splits: Mapping[str, int],
    data_root: str | os.PathLike,
) -> Images:
    """One split of `cifar10` or `cifar100`, kept in memory (150 MB)."""
    if split not in splits:
        raise ValueError(f"{task} has no split '{split}'; there are {', '.join(splits)}.")
    official = "test" if split == "test" else "train"
    images, labels = arrays(Path(data_root).expanduser() / "raw", task, official)
    expected = splits["test" if official == "test" else "train+val"]
    if len(labels) != expected:
        raise ValueError(f"{task}: the {official} files hold {len(labels)} images, not {expected}.")
    if official == "train":
        cut = {"train": slice(splits["train"]), "val": slice(splits["train"], None)}
        order = hash_order("train", range(len(labels)))[cut.get(split, slice(None))]
        images, labels = images[order], labels[order]
    else:
        order = range(len(labels))
    ids = tuple(f"{official}/{i}" for i in order)
    return Images(Manifest(task, split, ids, labels, num_classes, "raw", "native"), Rows(images))


def arrays(root: Path, task: str, official: str) -> tuple[np.ndarray, np.ndarray]:
    """All images (N, 32, 32, 3) uint8 and labels (N,) of an official split, in file order."""
    train, test, header, key = LAYOUTS[task]
    names = test if official == "test" else train
    folder = find(root, task)
    if folder.name == FOLDERS[task][0]:
        parts = [_binary(folder / f"{name}.bin", header) for name in names]
    else:
        parts = [_python(folder / name, key) for name in names]
    images = np.concatenate([p for p, _ in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.concatenate([labels for _, labels in parts]).astype(np.int64)


def find(root: Path, task: str) -> Path:
    """The folder of the binary or, without it, of the Python archive."""
    folders = [root / folder for folder in FOLDERS[task]]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"{task}: neither {folders[0]} nor {folders[1]} is there. Download an archive from "
        "https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there."
    )


def _bytes(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there. Unpack the CIFAR archive again.")
    return path.read_bytes()


def _binary(path: Path, header: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(_bytes(path), dtype=np.uint8)
    if not rows.size or rows.size % (header + 3072):
        raise ValueError(
            f"{path} has {rows.size} bytes, no multiple of {header + 3072}. It is cut short or of "
            "the other CIFAR; unpack the archive again."
        )
    rows = rows.reshape(-1, header + 3072)
    return rows[:, header:], rows[:, header - 1]


def _python(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the one long string and the labels off the opcodes of a pickle, running none of
    them.
    """
    pixels, labels, current = b"", [], ""
    try:
        for opcode, argument, _ in pickletools.genops(_bytes(path)):
            if isinstance(argument, str | bytes):
                text = argument if isinstance(argument, bytes) else argument.encode("latin-1")
                if len(text) > 3071:
                    pixels = text
                elif text in (b"data", b"labels", b"fine_labels", b"coarse_labels", b"filenames"):
                    current = text.decode()
            elif opcode.name in INTEGERS and current == key:
                labels.append(argument)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Unpack the CIFAR archive again.") from error
    if not labels or len(pixels) != 3072 * len(labels):
        raise ValueError(
            f"{path} holds {len(pixels)} bytes of pixels and {len(labels)} '{key}'; they do not "
            "match. Unpack the CIFAR archive again."
        )
    return np.frombuffer(pixels, dtype=np.uint8), np.array(labels)
