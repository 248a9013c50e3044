"""Which images belong to a split, and in which order: the one format that every reader produces.

The VTAB-1k subset is defined by the example order of TensorFlow Datasets (TFDS), which is a pure
function of a split's name and each example's key: examples are sorted by the MD5 of `split + key`.
`hash_order` states that rule, so the exact train800 / val200 / test rows follow from the original
archives without TFDS or TensorFlow.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


def hash_order(split: str, keys: Iterable[str | int]) -> list[int]:
    """Positions of `keys` in TFDS order: ascending MD5 of the split's name followed by the key.

    Source: `tensorflow_datasets/core/{hashing,shuffle}.py`; the salt is the split name ("train",
    "validation", "test"), integer keys are written in decimal, and backslashes of Windows paths
    become slashes.
    """
    salt = split.encode()
    digests = [hashlib.md5(salt + str(key).replace("\\", "/").encode()).digest() for key in keys]
    return sorted(range(len(digests)), key=digests.__getitem__)


@dataclass(frozen=True, eq=False)
class Manifest:
    """The images of one split: their ids and labels, and where the pixels come from.

    ids: unique names, one per image, in the order of the split.
    labels: int64 (N,), 0-based, below `num_classes`.
    source: who delivered the images ("mini", "folder", "raw", "tfds", "json", "official", "fake");
        with "-own" where the published split cannot be rebuilt and ours stands in for it.
    pixels: what happened to them on the way ("native", "png", "jpeg75", "rendered").
    Raises ValueError for labels out of range, repeated ids, or lists of unequal length.
    """

    dataset: str
    split: str
    ids: tuple[str, ...]
    labels: np.ndarray
    num_classes: int
    source: str
    pixels: str

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels, dtype=np.int64)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "ids", tuple(self.ids))
        where = f"{self.dataset}/{self.split} (source {self.source})"
        if len(self.ids) != len(labels):
            raise ValueError(
                f"{where}: {len(self.ids)} ids but {len(labels)} labels; "
                "each image needs exactly one."
            )
        if not len(labels):
            raise ValueError(f"{where} holds no image at all; check that its files are complete.")
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(wrong):
            raise ValueError(
                f"{where}: label {labels[wrong[0]]} of '{self.ids[wrong[0]]}' is outside "
                f"0..{self.num_classes - 1} ({len(wrong)} such labels). The list belongs to "
                "another dataset or counts its classes from 1."
            )
        if len(set(self.ids)) != len(self.ids):
            seen: set[str] = set()
            twice = next(i for i in self.ids if i in seen or seen.add(i))
            raise ValueError(
                f"{where}: '{twice}' is listed twice "
                f"({len(self.ids) - len(set(self.ids))} repeated ids). "
                "Every image may occur once in a split; restore the original list."
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> str:
        """One line per image: id, tab, label. What `digest` hashes and a store writes."""
        return "".join(f"{i}\t{label}\n" for i, label in zip(self.ids, self.labels, strict=True))

    @property
    def digest(self) -> str:
        """sha256 of `text`, hexadecimal: equal digests mean the same images with the same labels in
        the same order.
        """
        return hashlib.sha256(self.text.encode()).hexdigest()

    def take(self, rows: Sequence[int], split: str | None = None) -> "Manifest":
        """The images at `rows`, in that order, under another split name if one is given."""
        ids = tuple(self.ids[i] for i in rows)
        return replace(
            self, ids=ids, labels=self.labels[np.asarray(rows)], split=split or self.split
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes its place when the block ends well, else
    it vanishes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
