"""The mini suite: its pictures, labels and splits are the same everywhere, and the loader serves
them as promised.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import data
from data import Manifest, Preset, hash_order, mini

CONFIGS = Path(__file__).parent.parent / "configs"
# First 16 hex digits of sha256: the manifest of each split, then all pixels of train800val200
# and of test.
DIGESTS = {
    "digits": "d279323e8611f21f 8664e9af0f6980ef 8e6ed1a31307b078 8991bd3ed6f9236a "
    "f9d2435ae1361997 1ef006c3030dc9ed",
    "textures": "0e14f31e4b1c450a a847c300a4cfbec0 76e6220ae8bd8fa2 cc9ca42ed7179ddd "
    "6254bb4cd5558782 bb37912ea2be3540",
    "dsprites_location": "cd44fc5dff38ff4e d60795119e025f0a ddb34d81d3073a1d 5e8beee80c82c74e "
    "f2efc5124e05358c c26e359633a13426",
    "dsprites_orientation": "43049a691f1f622b 4594319ba903b0d0 7216f15f75059f98 0c6122a9102ca1c3 "
    "f2efc5124e05358c c26e359633a13426",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def read(task, split, root):
    config = OmegaConf.load(CONFIGS / "dataset" / "mini" / f"{task}.yaml")
    return config, instantiate(config.reader)(split=split, data_root=root)


def preset(name="mini", **changes):
    return Preset(**{**OmegaConf.load(CONFIGS / "preset" / f"{name}.yaml"), **changes})


def loader(images, recipe, **changes):
    options = {"image_size": 28, "mean": [0.5] * 3, "std": [0.25] * 3, "train": True}
    return data.load(images, recipe, **{**options, "batch_size": 32, **changes})


@pytest.mark.parametrize("task", DIGESTS)
def test_splits_labels_and_pixels(task, root):
    config = OmegaConf.load(CONFIGS / "dataset" / "mini" / f"{task}.yaml")
    found = []
    for split, count in config.splits.items():
        _, images = read(task, split, root)
        assert len(images) == count
        assert images.manifest.num_classes == config.num_classes
        assert images.manifest.dataset == config.name == task
        found.append(images.manifest.digest[:16])
    for split in ("train800val200", "test"):
        _, images = read(task, split, root)
        pixels = b"".join(images.image(i).tobytes() for i in range(len(images)))
        found.append(hashlib.sha256(pixels).hexdigest()[:16])
    assert " ".join(found) == DIGESTS[task]


@pytest.mark.parametrize("task", DIGESTS)
def test_splits_are_disjoint_and_the_union_is_in_order(task, root):
    ids = {split: read(task, split, root)[1].manifest.ids for split in (*mini.SPLITS, "test")}
    assert ids["train800val200"] == ids["train800"] + ids["val200"]
    assert len(set(ids["train800val200"] + ids["test"])) == 1000 + len(ids["test"])


def test_texture_areas_do_not_touch(root):
    spans = {}
    for split in ("train800", "val200", "test"):
        for name in read("textures", split, root)[1].manifest.ids:
            picture, corner = name.split("@")
            x = int(corner.split(",")[0])
            low, high = spans.setdefault(picture, {}).get(split, (x, x + mini.PATCH))
            spans[picture][split] = min(low, x), max(high, x + mini.PATCH)
    assert len(spans) == 14
    for span in spans.values():
        assert span["train800"][1] <= span["val200"][0]
        assert span["val200"][1] <= span["test"][0]


def test_dsprites_rows_are_those_of_vtab(root):
    rows = mini.dsprites_rows()
    assert rows[:5] == (16399, 634903, 206287, 470425, 352707)
    assert (rows[799], rows[999]) == (86528, 245125)
    assert rows[800:805] == (220697, 85843, 84902, 106270, 175044)
    assert rows[1000:1003] == (493443, 195884, 225768)
    joined = "\n".join(map(str, rows[:800])).encode()
    assert hashlib.sha256(joined).hexdigest()[:16] == "54130b46ffd22579"
    for task, low, high in (("dsprites_location", 42, 62), ("dsprites_orientation", 35, 67)):
        counts = np.bincount(read(task, "train800", root)[1].manifest.labels)
        assert (counts.min(), counts.max()) == (low, high)


def test_sprite_geometry():
    def row(shape, scale, turn, x, y):
        return int(np.ravel_multi_index((shape, scale, turn, x, y), (3, 6, 40, 32, 32)))

    square = mini.sprite(row(0, 5, 0, 0, 31)) > 0  # half side 9.6 around (16, 48)
    y, x = np.nonzero(square)
    assert (x.min(), x.max(), y.min(), y.max()) == (6, 25, 38, 57)
    for shape in range(3):
        first, last = (mini.sprite(row(shape, 3, turn, 9, 20)) for turn in (0, 39))
        assert (first == last).mean() > 0.999  # 0 and 2 pi are the same angle
    ellipse = mini.sprite(row(1, 5, 5, 16, 16)) > 0  # turned by 46 degrees, counter-clockwise
    y, x = np.nonzero(ellipse)
    assert np.corrcoef(x, -y)[0, 1] > 0.3
    areas = [(mini.sprite(row(2, scale, 0, 16, 16)) > 0).sum() for scale in range(6)]
    assert areas == sorted(areas)


def test_cache_is_remade_when_damaged_and_dispensable(tmp_path):
    first = mini.read("test", task="digits", data_root=tmp_path)
    (file,) = (tmp_path / "mini").iterdir()  # nothing half-written beside it
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert (
        mini.read("test", task="digits", data_root=tmp_path).manifest.digest
        == first.manifest.digest
    )
    assert file.stat().st_size == len(content)
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made here")
    again = mini.read("test", task="digits", data_root=blocked)
    assert (again.image(3) == first.image(3)).all()


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no task 'digit'; there are digits, textures"):
        mini.read("test", task="digit", data_root=tmp_path)
    with pytest.raises(ValueError, match="no split 'val'"):
        mini.read("val", task="digits", data_root=tmp_path)


def test_manifest_refuses_what_cannot_be_right():
    def manifest(ids, labels):
        return Manifest("pets", "test", ids, np.array(labels), 3, "folder", "jpeg75")

    assert len(manifest(("a", "b"), [0, 2])) == 2
    with pytest.raises(ValueError, match="label 3 of 'b' is outside 0"):
        manifest(("a", "b"), [0, 3])
    with pytest.raises(ValueError, match="'a' is listed twice"):
        manifest(("a", "b", "a"), [0, 1, 0])
    with pytest.raises(ValueError, match="2 ids but 1 labels"):
        manifest(("a", "b"), [0])
    with pytest.raises(ValueError, match="no image at all"):
        manifest((), [])


def test_hash_order_equals_the_documented_one():
    assert hash_order("train", range(50000))[:6] == [16399, 1680, 47917, 17307, 27051, 48736]
    assert hash_order("test", ["a\\b", "c"]) == hash_order("test", ["a/b", "c"])


def test_loader_serves_every_image_once_an_epoch(root):
    _, images = read("digits", "train800", root)
    train = loader(images, preset(), batch_size=96)
    labels = torch.cat([y for _, y in train.epoch(0)])
    assert len(train) == 9
    assert sorted(labels.tolist()) == sorted(images.manifest.labels.tolist())
    assert labels.tolist() != torch.cat([y for _, y in train.epoch(1)]).tolist()
    assert not train.augments
    dropped = loader(images, preset(), batch_size=96, drop_last=True)
    assert [len(y) for _, y in dropped.epoch(0)] == [96] * 8 == [96] * len(dropped)
    fixed = loader(images, preset(), train=False)
    assert torch.cat([y for _, y in fixed.epoch()]).tolist() == images.manifest.labels.tolist()


@pytest.mark.parametrize("flip", [None, True])
def test_resumed_streamed_and_worker_batches_are_the_same(flip, root):
    _, images = read("textures", "val200", root)
    cached = loader(images, preset(), flip=flip)
    whole = list(cached.epoch(3))
    assert cached.augments == bool(flip)
    for other in (
        cached.epoch(3, start=4),
        loader(images, preset(), flip=flip, cache_bytes=0).epoch(3, start=4),
        loader(images, preset(), flip=flip, cache_bytes=0, workers=2).epoch(3, start=4),
    ):
        for (x, y), (x2, y2) in zip(whole[4:], other, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


def test_inputs_are_resized_by_pillow_and_normalised(root):
    from PIL import Image

    _, images = read("textures", "test", root)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    x, _ = next(loader(images, preset(), train=False, mean=mean, std=std).epoch())
    assert x.dtype == torch.float32
    assert x.shape == (32, 3, 28, 28)
    picture = Image.fromarray(images.image(5)).resize((28, 28), Image.Resampling.BICUBIC)
    expected = (np.asarray(picture) / 255 - mean) / std
    assert np.allclose(x[5].numpy().transpose(1, 2, 0), expected, atol=1e-6)


def test_fake_has_the_counts_of_its_yaml_and_can_be_learnt(root):
    config = OmegaConf.load(CONFIGS / "dataset" / "fake.yaml")
    config.num_classes, config.splits.test = 5, 40
    splits = {s: instantiate(config.reader)(split=s, data_root=root) for s in config.splits}
    assert {s: len(images) for s, images in splits.items()} == dict(config.splits)
    train, test = (
        np.stack([splits[s].image(i) for i in range(len(splits[s]))]).astype(float)
        for s in ("train800", "test")
    )
    labels = splits["train800"].manifest.labels
    means = np.stack([train[labels == c].mean(axis=0) for c in range(5)])
    nearest = ((test[:, None] - means[None]) ** 2).sum(axis=(2, 3, 4)).argmin(axis=1)
    assert (nearest == splits["test"].manifest.labels).mean() > 0.95
    assert not (splits["test"].image(0) == splits["train800"].image(0)).all()
    with pytest.raises(ValueError, match="no split 'val'; there are train800"):
        instantiate(config.reader)(split="val", data_root=root)
