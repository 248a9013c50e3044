"""The store: every image of a split in one file, encoded once, with hashes to check it against.

    data_root/store/<suite>/<task>/<source>-<format>/
        <split>.bin    the encoded pictures, one after another
        <split>.tsv    id, label, offset, length and CRC-32 of each
        <split>.json   written last: counts and sha256 of both; a split without it is not there

One file instead of tens of thousands is quicker to copy and to open; the formats are PNG (lossless)
and "jpeg75" (Pillow's default JPEG: quality 75, chroma halved), which is what the community folder
of VTAB-1k went through.
"""

import errno
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from data import Images, join
from data.manifest import Manifest, replacing
from data.pictures import decode
from peft.record import sha256

FORMATS = ("png", "jpeg75")
UNIONS = {"train800val200": ("train800", "val200"), "train+val": ("train", "val")}
CHUNK = 64  # pictures encoded at a time, and lost at most by an interruption


def encode(image: np.ndarray, form: str) -> bytes:
    """(H, W, 3) uint8 as PNG or as Pillow's default JPEG; grey pictures as one channel in PNG."""
    file = io.BytesIO()
    if form == "png" and (image == image[..., :1]).all():
        image = image[..., 0]  # exact, and a third of the work
    Image.fromarray(image).save(
        file, **{"png": {"format": "PNG"}, "jpeg75": {"format": "JPEG"}}[form]
    )
    return file.getvalue()


@dataclass(frozen=True, eq=False)
class Stored:
    """An `Images.open` over a store's file."""

    path: Path
    ids: tuple[str, ...]
    places: np.ndarray  # (N, 3) offset, length, CRC-32

    def __call__(self, i: int) -> np.ndarray:
        offset, length, crc = self.places[i].tolist()
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        if zlib.crc32(content) != crc:
            raise ValueError(
                f"{self.path}: '{self.ids[i]}' is damaged. Delete the file, export again."
            )
        return decode(content, f"{self.ids[i]} in {self.path}")


def rows_of(text: str) -> list[list[str]]:
    """The complete lines of a .tsv; an interrupted one may end in half a line."""
    return [line.split("\t") for line in text[: text.rfind("\n") + 1].splitlines()]


def export(
    images: Images, folder: Path, form: str, progress: Callable[[Iterable], Iterable] = iter
) -> bool:
    """Writes one split to `folder`, going on where an interrupted export stopped.

    progress: wraps the iterable of chunks (for a progress bar). Returns False if all was there.
    Raises ValueError for an unknown format, OSError if the disk cannot hold it.
    """
    manifest = images.manifest
    if form not in FORMATS:
        raise ValueError(f"A store has no pixels '{form}'; there are {', '.join(FORMATS)}.")
    if form == "jpeg75" and manifest.pixels == "jpeg75":
        raise ValueError(
            f"{manifest.dataset}: source '{manifest.source}' went through JPEG already, and would "
            "so twice. Export it as png (which keeps its pixels), or start from raw or tfds."
        )
    stem = folder / manifest.split
    final = stem.with_suffix(".json")
    if final.exists():
        if json.loads(final.read_text())["manifest_sha256"] != manifest.digest:
            raise ValueError(f"{final} is of other images. Move {folder} away to export again.")
        return False
    folder.mkdir(parents=True, exist_ok=True)
    pictures, table = stem.with_suffix(".bin.part"), stem.with_suffix(".tsv.part")
    done = _resume(pictures, table, manifest)
    _check_space(images, done, folder, form)
    try:
        _append(images, form, done, pictures, table, progress)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"{folder}: the disk is full. What is exported stays valid: make room and run the same "
            "command again, it goes on from there."
        ) from error
    description = {
        "dataset": manifest.dataset,
        "split": manifest.split,
        "images": len(manifest),
        "num_classes": manifest.num_classes,
        "source": manifest.source,
        "pixels": "jpeg75" if form == "jpeg75" else manifest.pixels,
        "manifest_sha256": manifest.digest,
        "bin_sha256": sha256(pictures),
        "tsv_sha256": sha256(table),
        "bytes": pictures.stat().st_size,
    }
    os.replace(pictures, stem.with_suffix(".bin"))
    os.replace(table, stem.with_suffix(".tsv"))
    with replacing(final) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n")
    return True


def _append(
    images: Images, form: str, done: int, pictures: Path, table: Path, progress: Callable
) -> None:
    """Adds the pictures from `done` on, chunk by chunk, and a line for each."""
    manifest = images.manifest
    with (
        pictures.open("ab") as binary,
        table.open("a", newline="\n") as lines,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        offset = binary.tell()
        for first in progress(range(done, len(images), CHUNK)):
            rows = range(first, min(first + CHUNK, len(images)))
            for i, content in zip(rows, pool.map(lambda i: encode(images.image(i), form), rows)):
                binary.write(content)
                place = f"{offset}\t{len(content)}\t{zlib.crc32(content)}"
                lines.write(f"{manifest.ids[i]}\t{manifest.labels[i]}\t{place}\n")
                offset += len(content)
            binary.flush()  # pictures before the lines that speak of them
            lines.flush()


def _resume(pictures: Path, table: Path, manifest: Manifest) -> int:
    """Cuts half-written files back to their last whole picture; returns how many there are."""
    if not pictures.exists() or not table.exists():
        pictures.unlink(missing_ok=True)
        table.unlink(missing_ok=True)
        return 0
    rows, size = rows_of(table.read_text()), pictures.stat().st_size
    whole = [r for r in rows if int(r[2]) + int(r[3]) <= size]
    expected = [[i, str(y)] for i, y in islice(zip(manifest.ids, manifest.labels), len(whole))]
    if [r[:2] for r in whole] != expected:
        raise ValueError(f"{table} was begun with other images. Delete it and export again.")
    os.truncate(pictures, int(whole[-1][2]) + int(whole[-1][3]) if whole else 0)
    with replacing(table) as temporary:
        temporary.write_text("".join("\t".join(r) + "\n" for r in whole))
    return len(whole)


def _check_space(images: Images, done: int, folder: Path, form: str) -> None:
    """Judges by a few pictures whether the rest fits on the disk, before anything is written."""
    some = (
        np.unique(np.linspace(done, len(images) - 1, 8).astype(int)) if done < len(images) else []
    )
    sizes = [len(encode(images.image(int(i)), form)) for i in some]
    needed = int(1.1 * np.mean(sizes) * (len(images) - done)) if sizes else 0
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. Make "
            "room, or choose another data_root; nothing was written."
        )


def find(data_root: Path, suite: str, task: str, variant: str = "") -> Path:
    """The folder of a task's only export, or of the named one ("raw-png")."""
    folder = data_root / "store" / suite / task
    found = sorted(p for p in folder.glob(variant or "*-*") if any(p.glob("*.json")))
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(f"store/{p.name}" for p in found)
        raise ValueError(f"{task}: the store has several exports. Choose dataset.source={names}.")
    if half := sorted(folder.glob("*/*.part")):
        raise ValueError(
            f"{task}: the export to {half[0].parent} was interrupted. Run it again: it goes on "
            "where it stopped."
        )
    raise FileNotFoundError(
        f"{task}: no finished export in {folder}. Make one: "
        f"python -m scripts.prepare dataset={suite}/{task} source=raw pixels=png."
    )


def read(
    data_root: Path, split: str, suite: str, task: str, num_classes: int, source: str = "store"
) -> Images:
    """One split; `source` is "store", or "store/raw-png" where there are several exports.

    Unions are put together from their parts. The manifest's source is the one exported from.
    """
    folder = find(data_root, suite, task, source.partition("/")[2])
    return join(split, [_read(folder, part, num_classes) for part in UNIONS.get(split, (split,))])


def _read(folder: Path, split: str, num_classes: int) -> Images:
    stem = folder / split
    if not stem.with_suffix(".json").exists():
        raise FileNotFoundError(
            f"{folder} has no finished '{split}'. Its export was interrupted: run it again, it "
            "goes on where it stopped."
        )
    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        size = stem.with_suffix(".bin").stat().st_size
        whole = (size, sha256(stem.with_suffix(".tsv"))) == (about["bytes"], about["tsv_sha256"])
    except (OSError, KeyError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{stem}.* do not belong together. Delete the three files, export again.")
    rows = rows_of(stem.with_suffix(".tsv").read_text())
    ids, labels = tuple(r[0] for r in rows), np.array([int(r[1]) for r in rows])
    manifest = Manifest(
        about["dataset"], split, ids, labels, num_classes, about["source"], about["pixels"]
    )
    places = np.array([[int(x) for x in r[2:]] for r in rows], dtype=np.int64)
    return Images(manifest, Stored(stem.with_suffix(".bin"), ids, places))


def verify(folder: Path, split: str) -> None:
    """Compares a split's files with their sha256; raises ValueError naming the one that differs."""
    about = json.loads((folder / f"{split}.json").read_text())
    for kind in ("bin", "tsv"):
        if sha256(folder / f"{split}.{kind}") != about[f"{kind}_sha256"]:
            raise ValueError(f"{folder / split}.{kind} has changed since its export. Export again.")
