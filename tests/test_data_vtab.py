"""VTAB-1k: the catalogue's numbers, and the community folder written by hand."""

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from data import vtab
from data.vtab import TASKS

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "dataset" / "vtab").glob("*.yaml"))
TEST_IMAGES = {
    "cifar100": 10_000, "caltech101": 6_084, "dtd": 1_880, "flowers102": 6_149, "pets": 3_669,
    "svhn": 26_032, "sun397": 21_750, "patch_camelyon": 32_768, "eurosat": 5_400,
    "resisc45": 6_300, "retinopathy": 42_670, "clevr_count": 15_000, "clevr_distance": 15_000,
    "dmlab": 22_735, "kitti_distance": 711, "dsprites_location": 73_728,
    "dsprites_orientation": 73_728, "smallnorb_azimuth": 12_150, "smallnorb_elevation": 12_150,
}  # fmt: skip
SPLITS = {"train800": 3, "val200": 2, "train800val200": 5, "test": 4}


def test_the_catalogue_is_complete():
    yamls = {path.stem: OmegaConf.load(path) for path in CONFIGS}
    assert set(yamls) == set(TASKS) == set(TEST_IMAGES)
    assert sum(c.splits.test for c in yamls.values()) == 387_904  # lines of the 19 test lists
    assert [sum(c.group == g for c in yamls.values()) for g in ("natural", "specialized")] == [7, 4]
    assert sum(c.num_classes for c in yamls.values()) == 940


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_yaml_and_slices_agree(path):
    config, task = OmegaConf.load(path), TASKS[path.stem]
    assert config.name == config.reader.task == path.stem
    for split in ("train800", "val200", "test"):
        salt, start, stop = getattr(task, split)
        assert stop - start == config.splits[split]
        assert 0 <= start < stop <= task.sizes[salt]
    assert config.splits.train800val200 == 1000
    assert config.splits.test == TEST_IMAGES[path.stem]


def community(root, folder, labels=(0, 1, 1)):
    """A folder as NOAH's exporter writes it, with small JPEGs; returns its path."""
    for split, count in SPLITS.items():
        lines = []
        for i in range(count):
            name = f"images/{split}/{i:06d}.jpg"
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            grey = Image.new("L" if i == 1 else "RGB", (12, 8), 40 * i)
            grey.save(root / folder / name)
            lines.append(f"{name} {labels[i % len(labels)]}\n")
        (root / folder / f"{split}.txt").write_text("".join(lines))
    return root / folder


def read(root, split="test", task="dtd", **changes):
    options = {"task": task, "num_classes": 3, "splits": SPLITS, "data_root": root}
    return vtab.read(split, **{**options, **changes})


@pytest.mark.parametrize("place", ["vtab-1k", "vtab-1k/vtab-1k", "."])
@pytest.mark.parametrize("task", ["cifar100", "pets", "dsprites_location"])
def test_folder_is_found_under_any_name(task, place, tmp_path):
    for folder in TASKS[task].folders:
        root = tmp_path / folder
        community(root / place, folder)
        for split, count in SPLITS.items():
            images = read(root, split, task)
            assert len(images) == count
            assert images.manifest.labels.tolist() == [0, 1, 1, 0, 1][:count]
            assert images.manifest.ids[0] == f"images/{split}/000000.jpg"
            assert images.manifest.source == "folder"
        assert images.image(1).shape == (8, 12, 3)  # a grey file, as RGB
        assert np.ptp(images.image(1), axis=2).max() == 0


def test_yaml_reads_the_folder(tmp_path):
    community(tmp_path / "vtab-1k", "dtd")
    config = OmegaConf.load(next(p for p in CONFIGS if p.stem == "dtd"))
    config.splits = SPLITS
    assert len(instantiate(config.reader)(split="val200", data_root=tmp_path)) == 2
    config.source = "zip"
    with pytest.raises(ValueError, match=r"no source 'zip'"):
        instantiate(config.reader)(split="val200", data_root=tmp_path)


def test_caltech_may_have_one_image_more(tmp_path):
    folder = community(tmp_path, "caltech101")
    splits = {**SPLITS, "test": 6_084}
    for i in range(6_086):
        (folder / f"images/test/{i:06d}.jpg").touch()
    for count, good in ((6_084, True), (6_085, True), (6_083, False), (6_086, False)):
        lines = [f"images/test/{i:06d}.jpg {i % 3}\n" for i in range(count)]
        (folder / "test.txt").write_text("".join(lines))
        if good:
            assert len(read(tmp_path, task="caltech101", splits=splits)) == count
        else:
            with pytest.raises(ValueError, match=r"expected 6084"):
                read(tmp_path, task="caltech101", splits=splits)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/test/000000.jpg", r"test.txt, line 5: expected 'path label'"),
        ("images/test/000000.jpg one", r"line 5: expected 'path label'"),
        ("images/my cat.jpg 1", r"line 5: expected 'path label'"),
        ("images/test/000009.jpg 3", r"line 5: label 3 is not below 3"),
        ("../../etc/passwd 1", r"line 5: '../../etc/passwd' points out of"),
        ("/etc/passwd 1", r"line 5: '/etc/passwd' points out of"),
        ("images/test/000009.jpg 1", r"has 5 lines; expected 4"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    folder = community(tmp_path, "dtd")
    with (folder / "test.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_repeated_and_missing_files_are_named(tmp_path):
    folder = community(tmp_path, "dtd")
    lines = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join([*lines[:3], lines[0]]))
    with pytest.raises(ValueError, match=r"'images/test/000000.jpg' is listed twice"):
        read(tmp_path)
    (folder / "images/val200/000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .* images/val200/000001.jpg"):
        read(tmp_path, "val200")
    (folder / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val200.txt is not there"):
        read(tmp_path, "val200")


def test_absent_and_doubled_folders(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected .*vtab-1k/oxford_iiit_pet with train800"
    ):
        read(tmp_path, task="pets")
    community(tmp_path / "vtab-1k", "oxford_iiit_pet")
    community(tmp_path / "vtab-1k" / "vtab-1k", "pets")
    with pytest.raises(ValueError, match=r"two copies of the community archive"):
        read(tmp_path, task="pets")
    with pytest.raises(ValueError, match=r"no split 'val'; there are train800"):
        read(tmp_path, "val")


def save(path, kind):
    gradient = np.linspace(0, 255, 8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    image = Image.fromarray(gradient)
    if kind == "cmyk":
        image.convert("CMYK").save(path, "JPEG")
    elif kind == "alpha":
        image.putalpha(Image.new("L", image.size, 100))
        image.save(path, "PNG")
    elif kind == "palette":
        image.quantize(8).save(path, "PNG", transparency=bytes(range(8)))
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, "JPEG", exif=exif, quality=95)
    elif kind == "grey":
        image.convert("L").save(path, "JPEG")
    elif kind == "deep":
        Image.fromarray(np.full((8, 12), 40_000, dtype=np.uint16)).save(path, "PNG")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("cut.jpg", "cut.png"):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, "JPEG" if kind == "cut.jpg" else "PNG")
        path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("kind", ["cmyk", "alpha", "palette", "rotated", "grey"])
def test_odd_pictures_become_rgb(kind, tmp_path):
    folder = community(tmp_path, "dtd")
    save(folder / "images/test/000002.jpg", kind)
    image = read(tmp_path).image(2)
    assert (image.shape, image.dtype) == ((8, 12, 3), np.uint8)  # an EXIF turn is not applied
    if kind == "alpha":  # alpha is dropped, not blended with black
        assert image.max() == 255


@pytest.mark.parametrize("kind", ["deep", "text", "empty", "cut.jpg", "cut.png"])
def test_damaged_pictures_are_named(kind, tmp_path):
    folder = community(tmp_path, "dtd")
    save(folder / "images/test/000002.jpg", kind)
    with pytest.raises(ValueError, match=r"'images/test/000002.jpg' cannot be read"):
        read(tmp_path).image(2)
