"""The original archives beside what TensorFlow Datasets itself makes of them: the same images,
labels and order, and a folder that we read without TensorFlow.

TFDS's own builders run on archives written by hand, through a download manager that hands them
over. Takes TensorFlow: `pip install tensorflow-cpu importlib_resources`, then
`pytest -m full tests/test_data_tfds_truth.py`. Left out: Caltech101, whose members TFDS draws from
unsorted listings; Sun397, Retinopathy, KITTI and dSprites, whose builders want whole archives.
"""

import struct
from pathlib import Path
from unittest import mock

import archives_by_hand as by_hand
import numpy as np
import pytest
from test_data_raw import read, shrink

from data.tfds import BUILDERS
from data.vtab import TASKS

pytestmark = pytest.mark.full
pytest.importorskip("tensorflow", reason="only where TensorFlow is installed")

# What of an archive a builder's download is, by a part of its address; below the folder `raw`.
PARTS = {
    by_hand.cifar100_binary: {"cifar-100": ""},
    by_hand.svhn: {
        "train_32": "svhn/train_32x32.mat",
        "test_32": "svhn/test_32x32.mat",
        "extra_32": "svhn/test_32x32.mat",  # a split of its own that VTAB does not use
    },
    by_hand.dtd: {"dtd": ""},
    by_hand.flowers102: {
        "102flowers": "flowers-102",
        "imagelabels": "flowers-102/imagelabels.mat",
        "setid": "flowers-102/setid.mat",
    },
    by_hand.pets: {"images": "oxford-iiit-pet", "annotations": "oxford-iiit-pet"},
    by_hand.eurosat: {"EuroSAT": ""},
    by_hand.resisc45: {"": ""},
    by_hand.clevr: {"CLEVR": ""},
    by_hand.smallnorb: {
        f"{kind}-{part}": f"smallnorb/*{kind}-{part}*"
        for kind in ("training", "testing")
        for part in ("dat", "cat", "info")
    },
    by_hand.patch_camelyon: {
        f"{split}_{part}": f"pcam/*split_{split}_{part}.h5"
        for split in ("train", "valid", "test")
        for part in "xy"
    },
}

FEW = (by_hand.dtd, by_hand.eurosat, by_hand.resisc45)


def complete(make, folder: Path) -> None:
    """What TFDS reads beside images and labels, and we do not."""
    if make is by_hand.pets:
        notes = folder / "oxford-iiit-pet/annotations"
        for image in (folder / "oxford-iiit-pet/images").iterdir():
            by_hand.save(notes / f"trimaps/{image.stem}.png", 1, mode="L")
        lines = (notes / "test.txt").read_text().splitlines(keepends=True)
        (notes / "test.txt").write_text("".join(lines[1:]))  # a heading that the real file lacks
    if make is by_hand.cifar100_binary:
        for kind, count in (("fine", 100), ("coarse", 20)):
            names = "\n".join(f"{kind}{i}" for i in range(count))
            (folder / f"cifar-100-binary/{kind}_label_names.txt").write_text(names)
    if make is by_hand.clevr:
        (folder / "CLEVR_v1.0/questions").mkdir()
        by_hand.save(folder / "CLEVR_v1.0/images/test/CLEVR_test_000000.png", 0)
        for split in ("train", "val", "test"):
            path = folder / f"CLEVR_v1.0/questions/CLEVR_{split}_questions.json"
            path.write_text('{"questions": []}')
    if make is by_hand.smallnorb:
        for path in (folder / "smallnorb").glob("*-dat.mat"):
            head = struct.pack("<5i", 507333716, 1, 8, 1, 1)  # categories of the eight toys
            path.with_name(path.name.replace("-dat", "-cat")).write_bytes(head + bytes(4 * 8))


def prepare(archive: str, folder: Path, parts: dict[str, str], into: Path) -> None:
    """A TFDS folder made by TFDS."""
    import tensorflow_datasets

    def there(wanted):
        if isinstance(wanted, dict):
            return {key: there(value) for key, value in wanted.items()}
        wanted = str(getattr(wanted, "url", wanted))
        found = [path for name, path in parts.items() if name in wanted]
        return str(next(folder.glob(found[0])) if found and found[0] else folder)

    manager = mock.MagicMock()
    for name in ("download", "extract", "download_and_extract"):
        setattr(manager, name, mock.Mock(side_effect=there))
    manager.manual_dir, manager.downloaded_size = str(folder), 0
    builder = tensorflow_datasets.builder(BUILDERS[archive][0], data_dir=into)
    config = tensorflow_datasets.download.DownloadConfig(verify_ssl=False)
    with mock.patch.object(builder, "_make_download_manager", return_value=manager):
        builder.download_and_prepare(download_config=config)


CASES = [
    (make, task)
    for make in PARTS
    for task in TASKS
    if TASKS[task].archive == make.__name__.removesuffix("_binary")
]


@pytest.mark.parametrize(("make", "task"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_tfds_makes_the_same_of_an_archive(make, task, tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    found = make(tmp_path / "raw")
    complete(make, tmp_path / "raw")
    prepare(TASKS[task].archive, tmp_path / "raw", PARTS[make], tmp_path / "tfds")
    shrink(monkeypatch, task, found)
    for split in ("train800", "val200", "test", "train800val200"):
        ours, theirs = (read(tmp_path, split, task, source=s) for s in ("raw", "tfds"))
        assert len(ours) == len(theirs) > 1
        pairs = set(zip(ours.manifest.labels.tolist(), theirs.manifest.labels.tolist()))
        if make in FEW:  # which has three of its classes: numbered without gaps by us
            ranks = [sorted(of) for of in zip(*pairs, strict=True)]
            assert all(len(set(of)) == len(pairs) for of in ranks), pairs
            assert sorted(pairs) == list(zip(*ranks, strict=True)), "another order of classes"
        else:
            assert all(one == other for one, other in pairs), pairs
        for i in range(len(ours)):
            gap = np.abs(ours.image(i).astype(int) - theirs.image(i).astype(int)).max()
            assert gap <= 1, (split, ours.manifest.ids[i])  # JPEG decoders differ by a level
