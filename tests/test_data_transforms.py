"""Presets against stated values, against Pillow and against torchvision's and timm's
distributions.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import data
from data import Images, Manifest, Preset, Rows, View
from data.transforms import DRAWS, ERASE, erase, legacy_bilinear, random_box

PRESETS = sorted((Path(__file__).parent.parent / "configs" / "preset").glob("*.yaml"))


def pictures(count, height=40, width=60, seed=0, ragged=False):
    """Smooth random pictures; with `ragged`, of different heights."""
    rng = np.random.default_rng(seed)
    arrays = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        size = (width, height + (i % 5 if ragged else 0))
        arrays.append(np.asarray(small.resize(size, Image.Resampling.BICUBIC)))
    ids = tuple(map(str, range(count)))
    manifest = Manifest("fake", "train800", ids, np.arange(count) % 3, 3, "fake", "native")
    return Images(manifest, arrays.__getitem__ if ragged else Rows(np.stack(arrays)))


def load(images, preset, **changes):
    options = {"image_size": 28, "mean": [0.5] * 3, "std": [0.5] * 3, "train": True}
    return data.load(images, preset, **{**options, "batch_size": 16, **changes})


def levels(batch, mean=0.5, std=0.5):
    """Normalised inputs back to grey levels 0..255."""
    return (batch * std + mean) * 255


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_serves_its_size_and_streams_the_same(path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 8)
    monkeypatch.setattr(data, "FEW", 10)  # more are decoded by processes, where there are any
    preset = Preset(**OmegaConf.load(path))
    assert preset.name == path.stem
    images = pictures(20, ragged=True)
    for train in (True, False):
        ways = ({}, {"workers": 2}, {"cache_bytes": 0})
        loaders = [load(images, preset, train=train, task="dtd", **way) for way in ways]
        cached = loaders[0]
        for (x, y), *others in zip(*(loader.epoch(1) for loader in loaders), strict=True):
            assert x.shape == (len(y), 3, 28, 28)
            for x2, y2 in others:
                assert torch.equal(x, x2) and torch.equal(y, y2)
        first, again, other = (next(cached.epoch(e))[0] for e in (0, 0, 1))
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (not train)


@pytest.mark.parametrize("stays", [True, False])
def test_a_process_that_fails_says_why_in_a_line(monkeypatch, stays):
    monkeypatch.setattr(data, "FEW", 10)
    good = pictures(20)

    def damaged(i: int):
        if i == 13:
            raise ValueError("Image '13' cannot be read: truncated")
        return good.open(i)

    images = Images(good.manifest, damaged)
    with pytest.raises(ValueError, match=r"^Image '13' cannot be read: truncated$"):
        list(load(images, Preset("x"), workers=1, cache_bytes=2**30 * stays).epoch())


def test_a_gpu_with_room_keeps_more(monkeypatch):
    images = pictures(20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 800))
    loader = load(images, Preset("x"), device="cuda")
    assert loader._budget() == 100
    assert load(images, Preset("x"), device="cuda", cache_bytes=7)._budget() == 7
    assert load(images, Preset("x"))._budget() == 2**31


def test_legacy_bilinear_has_the_values_of_its_definition():
    """Worked out by hand: output j reads source j * in / out; no shift, no antialias."""

    def row(values, size):
        image = np.array(values, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
        return legacy_bilinear(image, 1, size)[0, 0].tolist()

    assert row([0, 100], 4) == [0, 50, 100, 100]  # sources 0, 0.5, 1, 1.5: the last one repeats
    assert row([10, 20, 30, 90], 2) == [10, 30]  # sources 0 and 2: the rest is never read
    assert row([10, 20, 40], 2) == [10, 30]  # sources 0 and 1.5
    assert row([7, 9], 2) == [7, 9]
    # 1/7 is no dyadic number: position and blend are rounded to float32 at every step
    step = np.float32(2) / np.float32(14)
    expected = [float(np.float32(255) * (np.float32(j) * step)) for j in range(7)]
    assert row([0, 255], 14)[:7] == expected
    square = np.array([[0, 100], [200, 60]], dtype=np.uint8)[..., None].repeat(3, axis=2)
    assert legacy_bilinear(square, 4, 4)[1].tolist() == [
        [0, 50, 100, 100],
        [100, 90, 80, 80],
        [200, 130, 60, 60],
        [200, 130, 60, 60],
    ]
    wide = np.arange(12, dtype=np.uint8).reshape(2, 6)[..., None].repeat(3, axis=2)
    assert legacy_bilinear(wide, 1, 3)[0].tolist() == [[0, 2, 4]]


def test_legacy_bilinear_is_tensorflows_bit_for_bit():
    """sha256 of tf.compat.v1.image.resize(picture, (224, 224)), channels first; TensorFlow
    2.21.0.
    """
    y, x, c = np.mgrid[:37, :53, :3]
    picture = ((x * x * 7 + y * 13 * x + c * 91 + y * y) % 256).astype(np.uint8)
    digest = hashlib.sha256(legacy_bilinear(picture, 224, 224).numpy().tobytes()).hexdigest()
    assert digest == "6edbc3f0560a47ef23cdacfa9c0124323c000fdcfdfabbd1fce261f4bd03c029"


def test_legacy_bilinear_reaches_the_network_unrounded():
    preset = Preset("p", {"kernel": "legacy_bilinear"}, {"kernel": "legacy_bilinear"})
    images = pictures(3)
    x, _ = next(load(images, preset, train=False).epoch())
    expected = (legacy_bilinear(images.image(1), 28, 28) / 255 - 0.5) / 0.5
    assert torch.equal(x[1], expected)
    assert (levels(x) - levels(x).round()).abs().max() > 0.2


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_short_side_and_centre_crop_are_torchvisions(kernel):
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(kernel)
    reference = v2.Compose([v2.Resize(32, mode), v2.CenterCrop(28)])
    view = {"resize": "short", "size": 256, "kernel": kernel, "crop": "centre"}
    for height, width in ((40, 61), (61, 40), (33, 33), (20, 90)):
        images = pictures(2, height, width)
        expected = np.asarray(reference(Image.fromarray(images.image(1))))
        x = View(**view).fixed(images.image(1), 28)
        assert x.dtype == torch.uint8
        assert np.array_equal(x.numpy().transpose(1, 2, 0), expected)


def test_random_crops_are_windows_and_uniform():
    preset = Preset("p", {"size": 256, "kernel": "bilinear", "crop": "random"}, {}, flip=0.5)
    images = pictures(64)
    loader = load(images, preset, batch_size=64)
    whole = [
        View(size=256, kernel="bilinear", crop="random").fixed(images.image(i), 28)
        for i in range(64)
    ]
    corners, flips = [], []
    for e in range(10):
        x, _ = next(loader.epoch(e))
        for i, window in zip(loader.order(e), levels(x).round().to(torch.uint8)):
            windows = whole[i].unfold(1, 28, 1).unfold(2, 28, 1)  # (3, 5, 5, 28, 28)
            places = [
                (int(t), int(left), flip)
                for flip, w in ((0, window), (1, window.flip(-1)))
                for t, left in (windows == w[:, None, None]).all(-1).all(-1).all(0).nonzero()
            ]
            assert len(places) == 1
            corners.append(places[0][:2])
            flips.append(places[0][2])
    table = np.zeros((5, 5))
    np.add.at(table, tuple(np.array(corners).T), 1)
    expected = 640 / 25
    assert ((table - expected) ** 2 / expected).sum() < 52  # chi-square, 24 degrees, p = 0.001
    assert 0.45 < np.mean(flips) < 0.55


def test_flips_follow_preset_task_and_override():
    rlrr = Preset(**OmegaConf.load(next(p for p in PRESETS if p.stem == "vtab_rlrr")))
    assert sum(rlrr.flips(t) == 0.5 for t in rlrr.flip_tasks) == 10
    images = pictures(64)
    cases = (("dtd", None, 0.5), ("dtd", False, 0), ("svhn", None, 0), ("svhn", True, 0.5))
    for task, flip, rate in cases:
        loader = load(images, rlrr, batch_size=64, task=task, flip=flip)
        straight = load(images, rlrr, train=False, batch_size=64)
        plain = next(straight.epoch())[0][torch.from_numpy(loader.order(5))]
        x, _ = next(loader.epoch(5))
        mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x, plain)]
        same = [torch.equal(a, b) for a, b in zip(x, plain)]
        assert all(m != s for m, s in zip(mirrored, same))
        assert abs(np.mean(mirrored) - rate) < 0.2
        assert loader.augments == (rate > 0)
        assert not load(images, rlrr, train=False, task=task, flip=flip).augments


def test_random_boxes_have_torchvisions_distribution():
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    rng, picture = np.random.default_rng(0), torch.zeros(3, 60, 100)
    torch.manual_seed(0)
    draws = rng.random((4000, DRAWS))
    ours = np.array([random_box(60, 100, u, scale, ratio) for u in draws], dtype=float)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(scale), list(ratio)) for _ in draws],
        dtype=float,
    )
    for statistic in (np.mean, np.std):
        assert np.allclose(statistic(ours, axis=0), statistic(theirs, axis=0), rtol=0.06, atol=0.4)
    assert (ours[:, 0] + ours[:, 2] <= 60).all()
    assert (ours[:, 1] + ours[:, 3] <= 100).all()
    assert random_box(10, 300, np.full(DRAWS, 0.999), scale, ratio) == (0, 143, 10, 13)  # fallback


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_random_resized_crops_are_pillows_within_a_level(kernel):
    view = View(resize="random", kernel=kernel)
    picture, off = pictures(1, 90, 130).image(0), []
    for u in np.random.default_rng(1).random((20, DRAWS)):
        top, left, h, w = random_box(90, 130, u, view.scale, view.ratio)
        box = (left, top, left + w, top + h)
        resample = Image.Resampling[kernel.upper()]
        expected = np.asarray(Image.fromarray(picture).crop(box).resize((28, 28), resample))
        x = view.vary(view.fixed(picture, 28), u, 28).numpy().transpose(1, 2, 0)
        off.append(np.abs(x.astype(int) - expected))
    assert np.max(off) <= 2 and np.mean(np.array(off) > 1) < 1e-4  # before Pillow 13 one is


def test_erasing_replaces_a_box_by_noise():
    u = np.random.default_rng(3).random((400, DRAWS))
    x = erase(torch.full((400, 3, 32, 32), 7.0), u, 0.25)
    changed = (x != 7).all(dim=1)
    hit = changed.flatten(1).any(dim=1)
    assert hit.tolist() == (u[:, ERASE] < 0.25).tolist()
    area = changed[hit].float().mean(dim=(1, 2))
    assert area.min() > 0.01
    assert area.max() < 0.36
    for box in changed[hit]:  # a full rectangle
        assert box.any(0).sum() * box.any(1).sum() == box.sum()
    noise = x[changed[:, None].expand_as(x)]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_statistics():
    own = ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert Preset("p").statistics(*own) == (tuple(own[0]), tuple(own[1]))
    assert Preset("p", mean=None, std=None).statistics(*own) == ((0, 0, 0), (1, 1, 1))
    fixed = Preset("p", mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])
    assert fixed.statistics(*own) == ((0.5,) * 3, (0.2,) * 3)
    with pytest.raises(ValueError, match="three channel statistics"):
        Preset("p", mean=[0.5]).statistics(*own)


def test_presets_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="Unknown kernel 'cubic'"):
        View(kernel="cubic")
    with pytest.raises(ValueError, match="needs crop"):
        View(resize="short", size=256)
    with pytest.raises(ValueError, match="does not go with resize 'random'"):
        View(resize="random", kernel="legacy_bilinear")
    with pytest.raises(ValueError, match="would evaluate on random crops"):
        Preset("p", eval={"size": 256, "crop": "random"})
    with pytest.raises(ValueError, match="fewer than one batch"):
        load(pictures(3), Preset("p"), drop_last=True)
