"""The original archives: label maps on hand-written scenes and lines, published ids, every
format.
"""

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import archives_by_hand as by_hand
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from data import formats, hash_order, labels, raw, retina, vtab
from data.vtab import TASKS

CONFIGS = Path(__file__).parent.parent / "configs" / "dataset" / "vtab"
EUROSAT = {
    "AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500,
    "Industrial": 2500, "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500,
    "SeaLake": 3000,
}  # fmt: skip
RESISC45 = """  airplane airport baseball_diamond basketball_court beach bridge chaparral church
    circular_farmland cloud commercial_area dense_residential desert forest freeway
    golf_course ground_track_field harbor industrial_area intersection island lake meadow
    medium_residential mobile_home_park mountain overpass palace parking_lot railway
    railway_station rectangular_farmland river roundabout runway sea_ice ship snowberg
    sparse_residential stadium storage_tank tennis_court terrace thermal_power_station
    wetland""".split()  # noqa: SIM905


def clevr(kind, count):
    return [f"CLEVR_{kind}_{i:06d}.png" for i in range(count)]


KEYS = {
    "cifar100": lambda salt: range({"train": 50_000}[salt]),
    "svhn": lambda salt: range({"train": 73_257}[salt]),
    "smallnorb_azimuth": lambda salt: range(24_300),
    "clevr_count": lambda salt: clevr("train", 70_000),
    "patch_camelyon": lambda salt: [
        f"{'valid' if salt == 'validation' else salt}_{i}"
        for i in range({"train": 262_144, "validation": 32_768}[salt])
    ],
    "eurosat": lambda salt: [
        f"{c}_{c}_{i}.jpg" for c, n in EUROSAT.items() for i in range(1, n + 1)
    ],
    "resisc45": lambda salt: [f"{c}_{c}_{i:03d}.jpg" for c in RESISC45 for i in range(1, 701)],
}  # fmt: skip
# The first ids of train800 and its last, then the first of val200 and its last (where published).
PUBLISHED = {
    "cifar100": (
        "16399 1680 47917 17307 27051", "45288", "13431 9237 17462 32685 9518", "1434"
    ),
    "svhn": ("16399 1680 47917 17307 27051", "39678", "21145 64736 23870 1919 26393", "61722"),
    "smallnorb_azimuth": (
        "16399 1680 17307 1456 19135", "19374", "23018 16932 19084 9933 24157", "7409"
    ),
    "clevr_count": (
        "043876 033421 062025 021419 004851", "047592",
        "035084 029360 004525 024831 021255", "047496",
    ),
    "patch_camelyon": (
        "train_251464 train_132287 train_133786 train_86259 train_230288", "train_109410",
        "valid_3270 valid_10310 valid_20603 valid_11608 valid_13337", "valid_23465",
    ),
    "eurosat": (
        "Forest_687 Residential_188 HerbaceousVegetation_1056 Residential_1762 Forest_943",
        "HerbaceousVegetation_1371", "SeaLake_804 Forest_1554 River_2237", None,
    ),
    "resisc45": (
        "dense_residential_068 palace_207 golf_course_450 tennis_court_572 runway_596",
        "mobile_home_park_476", "cloud_238 roundabout_303", None,
    ),
}  # fmt: skip
SHA256 = {
    ("cifar100", "train800"): "5b25ee0661c3bc4a",
    ("cifar100", "val200"): "93377e439662509b",
    ("svhn", "train800"): "901fe4f6d4f65bc8",
    ("svhn", "val200"): "36ae944d2e322a4f",
}


def doubled(names):
    """Forest_687 -> the key Forest_Forest_687.jpg."""
    return [f"{name.rpartition('_')[0]}_{name}.jpg" for name in names.split()]


NAMES = {
    "eurosat": doubled,
    "resisc45": doubled,
    "clevr_count": lambda names: [f"CLEVR_train_{name}.png" for name in names.split()],
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_ids(task):
    first, last, val_first, val_last = PUBLISHED[task]
    for split, head, tail in (("train800", first, last), ("val200", val_first, val_last)):
        salt, start, stop = getattr(TASKS[task], split)
        keys = KEYS[task](salt)
        assert len(keys) == TASKS[task].sizes[salt]
        ids = [str(keys[i]) for i in hash_order(salt, keys)[start:stop]]
        names = NAMES.get(task, str.split)
        head, tail = names(head), names(tail or "")
        assert ids[: len(head)] == head
        assert ids[-1:] == tail or not tail
        if (task, split) in SHA256:
            joined = hashlib.sha256("\n".join(ids).encode()).hexdigest()
            assert joined.startswith(SHA256[task, split])


def test_published_ids_of_sun397_and_its_lists(tmp_path):
    (tmp_path / "SUN397" / "a" / "abbey").mkdir(parents=True)
    starts = {
        "train": ["/r/rope_bridge/sun_biqflnsoednmhvce.jpg", "/t/tower/sun_avxiyhlcnzjayhrk.jpg"],
        "validation": ["/b/boathouse/sun_armmkazxnlvxglwr.jpg"],
    }
    for salt, size in TASKS["sun397"].sizes.items():
        examples = raw.sun397(tmp_path, salt, "sun397")
        assert len(examples.keys) == size
        order = hash_order(salt, examples.keys)
        first = starts.get(salt, [])
        assert [examples.keys[i] for i in order[: len(first)]] == first
        if salt == "train":
            found = {examples.label(i) for i in order[:800]}
            assert len(found) == 309  # of 397: train800 is not stratified
            skipped = examples.keys.index("/t/track/outdoor/sun_aophkoiosslinihb.jpg")
            assert order.index(skipped) == 66_481  # unreadable, but in none of the slices
        assert examples.label(examples.keys.index(next(iter(sorted(examples.keys))))) == 0


def shrink(monkeypatch, task, found):
    """The task with slices that fit a small archive: 3 for training, 2 to validate, 2 to test."""
    full = TASKS[task]
    sizes = {salt: len(rows) for salt, rows in found.items()}
    cuts = {"train800": (full.train800[0], 0, 3)}
    for split, count in (("val200", 2), ("test", 2)):
        salt = getattr(full, split)[0]
        taken = [stop for s, _, stop in cuts.values() if s == salt]  # behind what is cut from it
        start = max(taken, default=0)
        cuts[split] = (salt, start, start + count)
    small = replace(full, sizes=sizes, also={}, **cuts)
    monkeypatch.setitem(vtab.TASKS, task, small)
    return small


def read(root, split, task, **changes):
    config = OmegaConf.load(CONFIGS / f"{task}.yaml")
    options = {"num_classes": config.num_classes, "splits": config.splits, "source": "raw"}
    return vtab.read(split, **{**options, "task": task, "data_root": root, **changes})


def in_order(salt, rows):
    """By the definition: MD5 of salt and key as one big-endian number, ascending."""
    text = [f"{salt}{key}".encode() for key, _, _ in rows]
    ranks = [int.from_bytes(hashlib.md5(t).digest(), "big") for t in text]
    return [row for _, row in sorted(zip(ranks, rows), key=lambda pair: pair[0])]


CASES = [
    (make, task)
    for make in by_hand.ARCHIVES
    for task in TASKS
    if TASKS[task].archive == make.__name__.removesuffix("_binary").removesuffix("_python")
]


@pytest.mark.parametrize(("make", "task"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_every_archive_gives_ids_labels_and_pixels_in_hash_order(make, task, tmp_path, monkeypatch):
    found = make(tmp_path / "raw")
    if task == "caltech101":  # an own draw: take the membership as it is, and check it
        found = {}
        for salt in ("train", "test"):
            keys = raw.caltech101(tmp_path / "raw", salt, task).keys
            rows = {key: row for row in make(tmp_path / "raw")["all"] for key in row[:1]}
            found[salt] = [rows[key] for key in keys]
        assert [len(found[s]) for s in ("train", "test")] == [90, 9]
        assert len({key for rows in found.values() for key, _, _ in rows}) == 99
    small = shrink(monkeypatch, task, found)
    for split in ("train800", "val200", "test"):
        salt, start, stop = getattr(small, split)
        images = pickle.loads(pickle.dumps(read(tmp_path, split, task)))  # as for a worker
        expected = in_order(salt, found[salt])[start:stop]
        ids = [key if isinstance(key, str) else f"{salt}/{key}" for key, _, _ in expected]
        assert images.manifest.ids == tuple(ids)
        assert images.manifest.labels.tolist() == [row[1][task] for row in expected]
        source = "raw-own" if task == "caltech101" else "raw"
        assert (images.manifest.source, images.manifest.pixels) == (source, "native")
        for i, (_, _, level) in enumerate(expected):
            if level is not None:
                assert np.abs(images.image(i).astype(int) - level).max() <= 1
    both = read(tmp_path, "train800val200", task)
    parts = [read(tmp_path, split, task) for split in ("train800", "val200")]
    assert both.manifest.ids == parts[0].manifest.ids + parts[1].manifest.ids
    assert (both.image(4) == parts[1].image(1)).all()


def test_an_archive_of_another_size_is_refused(tmp_path):
    by_hand.eurosat(tmp_path / "raw")
    with pytest.raises(ValueError, match=r"has 9 images in its split 'train'; expected 27000"):
        read(tmp_path, "test", "eurosat")


@pytest.mark.parametrize("task", TASKS)
def test_absent_archives_say_where_they_belong_and_come_from(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)raw/.*(https?://|authors)"):
        read(tmp_path, "test", task)


def test_clevr_labels():
    def scene(*depths):
        return by_hand.clevr_scene("x.png", depths)

    assert [labels.clevr_count(scene(*[9.0] * n)) for n in (3, 10)] == [0, 7]
    depths = (7.5, 8.0, 8.01, 8.5, 8.6, 9.0, 9.5, 9.9, 10.0, 10.1)
    found = [labels.clevr_distance(scene(d, 14.0, 12.0)) for d in depths]
    assert found == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5]


def test_kitti_labels():
    lines = [by_hand.KITTI_LINE.format("Car", 23.5), by_hand.KITTI_LINE.format("DontCare", -1000)]
    lines += [by_hand.KITTI_LINE.format("Van", 9.25), by_hand.KITTI_LINE.format("Cyclist", 1.0), ""]
    assert labels.kitti_vehicles(lines) == [23.5, 9.25]
    distances = ([5.0], [8.0], [8.1, 50.0], [20.0], [20.1], [998.0], [999.0], [])
    assert [labels.kitti_distance(d) for d in distances] == [0, 0, 1, 1, 2, 2, 2, 3]
    assert labels.kitti_distance([float(np.float32(8)) + 1e-9]) == 0  # compared in float32


def test_other_labels():
    def row(shape, scale, turn, x, y):
        return (((shape * 6 + scale) * 40 + turn) * 32 + x) * 32 + y

    assert [labels.dsprites_location(row(2, 3, 7, x, 31)) for x in (0, 1, 2, 31)] == [0, 0, 1, 15]
    turns = [labels.dsprites_orientation(row(1, 5, turn, 30, 2)) for turn in range(40)]
    assert turns[:8] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert np.bincount(turns).tolist() == [3, 2] * 8
    assert [labels.smallnorb_azimuth(a) for a in (0, 2, 34)] == [0, 1, 17]
    assert [labels.svhn_digit(d) for d in (1, 9, 10)] == [1, 9, 0]


@pytest.mark.parametrize(
    ("make", "task", "file", "message"),
    [
        (by_hand.svhn, "svhn", "svhn/train_32x32.mat", "train_32x32.mat is damaged"),
        (
            by_hand.smallnorb,
            "smallnorb_azimuth",
            "smallnorb/*training-dat.mat",
            r"has \d+ bytes instead",
        ),
        (by_hand.cifar100_binary, "cifar100", "cifar-100-binary/train.bin", "no multiple of 3074"),
        (by_hand.cifar100_python, "cifar100", "cifar-100-python/train", "cifar-100-python/train"),
        (
            by_hand.clevr,
            "clevr_count",
            "CLEVR_v1.0/scenes/CLEVR_train*",
            "scenes.json does not hold",
        ),
        (by_hand.dmlab, "dmlab", "dmlab/dmlab-train*1-of*", "cut short at byte"),
        (by_hand.dsprites, "dsprites_location", "dsprites*.npz", "npz is damaged"),
        (by_hand.patch_camelyon, "patch_camelyon", "pcam/*train_y.h5", "train_y.h5 is damaged"),
    ],
)
def test_files_cut_short_are_named(make, task, file, message, tmp_path, monkeypatch):
    shrink(monkeypatch, task, make(tmp_path / "raw"))
    (path,) = (tmp_path / "raw").glob(file)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "train800", task)


@pytest.mark.parametrize(
    ("make", "task", "file", "content"),
    [
        (by_hand.kitti, "kitti_distance", "kitti/training/label_2/*.txt", "Car 0.0 0\n"),
        (by_hand.kitti, "kitti_distance", "kitti/mapping/train_rand.txt", "1,2,3,999"),
        (
            by_hand.clevr,
            "clevr_count",
            "CLEVR_v1.0/scenes/*.json",
            '{"scenes": [{"image_index": 1}]}',
        ),
        (by_hand.retinopathy, "retinopathy", "diabetic*/*.csv", "image,grade\n10_left,1\n"),
        (by_hand.pets, "pets", "oxford*/annotations/*.txt", "Abyssinian_1\n"),
        (by_hand.dtd, "dtd", "dtd/labels/*.txt", "spiral/spiral_0001.jpg\n" * 6),
    ],
)
def test_files_of_other_content_are_named(make, task, file, content, tmp_path, monkeypatch):
    found = make(tmp_path / "raw")
    small = shrink(monkeypatch, task, found)
    for path in (tmp_path / "raw").glob(file):
        path.write_text(content)
    count = content.count("\n")
    monkeypatch.setitem(vtab.TASKS, task, replace(small, sizes=dict.fromkeys(small.sizes, count)))
    if "label_2" in file or "scenes" in file:
        monkeypatch.setitem(vtab.TASKS, task, small)
    with pytest.raises(ValueError, match=r"raw.* does not hold what it should"):
        read(tmp_path, "train800", task)


def test_a_listed_image_that_is_not_there_is_named(tmp_path, monkeypatch):
    shrink(monkeypatch, "dtd", by_hand.dtd(tmp_path / "raw"))
    victim = read(tmp_path, "test", "dtd").manifest.ids[0]
    (tmp_path / "raw" / "dtd" / "images" / victim).unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 images .* {victim}"):
        read(tmp_path, "test", "dtd")


def test_norb_matrices_that_are_still_compressed(tmp_path):
    (tmp_path / "x.mat").write_bytes(b"\x1f\x8b\x08\x08" + bytes(40))
    with pytest.raises(ValueError, match=r"no NORB matrix .* still compressed"):
        formats.norb_matrix(tmp_path / "x.mat")


def test_rescale_by_hand():
    """Bilinear at half-pixel centres: a row of 2 doubled reads -0.25, 0.25, 0.75, 1.25."""
    picture = np.array([[0, 100]], dtype=np.uint8)[..., None].repeat(3, axis=2).repeat(2, axis=0)
    assert retina.rescale(picture, 2)[0, :, 0].tolist() == [0, 25, 75, 100]
    wide = np.arange(0, 80, 10, dtype=np.uint8)[None, :, None].repeat(3, axis=2).repeat(4, axis=0)
    assert retina.rescale(wide, 0.25)[0, :, 0].tolist() == [15, 55]  # 1.5 and 5.5: no antialiasing


def test_big_scenes_are_scaled_to_120000_pixels(tmp_path):
    for size, expected in (((600, 400), (283, 424)), ((300, 400), (400, 300))):
        by_hand.save(tmp_path / "x.jpg", 90, size=size)
        image = retina.Shrunk(tmp_path, ["x.jpg"], 120_000)(0)
        assert image.shape[:2] == expected
        assert abs(int(image[5, 5, 0]) - 90) <= 1


UPRIGHT = {  # EXIF's orientations: where the first row and column of the stored picture belong
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_that_tfds_opened_with_opencv_are_turned_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(24, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "x.jpg") as picture:
        stored = np.asarray(picture)
    expected = UPRIGHT.get(orientation, lambda x: x)(stored)
    assert (retina.Shrunk(tmp_path, ["x.jpg"], 120_000)(0) == expected).all()
    assert (retina.Retina(tmp_path, ["x.jpg"])(0) == retina.btgraham(expected)).all()


def test_damaged_exif_data_turn_nothing(tmp_path):
    Image.new("RGB", (24, 16)).save(tmp_path / "x.jpg", exif=b"Exif\0\0no TIFF header")
    assert retina.Shrunk(tmp_path, ["x.jpg"], 120_000)(0).shape == (16, 24, 3)


def test_retina_processing():
    """A dark picture with an eye of radius 100: scaled to 300, a flat eye becomes grey 128."""
    y, x = np.mgrid[:240, :320]
    eye = ((x - 160) ** 2 + (y - 120) ** 2 <= 100**2).astype(np.uint8) * 100
    spot = eye.copy()
    spot[118:123, 178:183] = 140
    images = [retina.btgraham(np.repeat(p[..., None], 3, axis=2)) for p in (eye, spot)]
    assert {i.shape for i in images} == {(540, 540, 3)}
    flat, spotted = (i.astype(int).mean(axis=2) for i in images)
    assert np.abs(flat[200:340, 200:340] - 128).max() <= 1  # far from the rim: the mean is removed
    assert np.abs(flat[:60, :60] - 128).max() <= 1  # outside of the circle
    assert spotted[270, 330] > 180  # a bright spot stands out
    assert retina.btgraham(np.zeros((40, 60, 3), np.uint8)).shape == (540, 540, 3)  # no eye at all
