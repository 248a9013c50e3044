"""FGVC and full CIFAR: VPT's json layout and the makers' lists, written by hand."""

import hashlib
import json
from pathlib import Path

import archives_by_hand as by_hand
import numpy as np
import pytest
from archives_by_hand import grey, save
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data import fgvc

CONFIGS = Path(__file__).parent.parent / "configs" / "dataset"
SIZES = {
    "cub200": (200, 5_394, 600, 5_794), "nabirds": (555, 21_536, 2_393, 24_633),
    "oxford_flowers": (102, 1_020, 1_020, 6_149), "stanford_dogs": (120, 10_800, 1_200, 8_580),
    "stanford_cars": (196, 7_329, 815, 8_041),
}  # fmt: skip


@pytest.mark.parametrize("task", fgvc.SETS)
def test_the_catalogue_has_the_published_sizes(task):
    config = OmegaConf.load(CONFIGS / "fgvc" / f"{task}.yaml")
    sizes = (config.num_classes, *(config.splits[s] for s in ("train", "val", "test")))
    assert sizes == SIZES[task]
    assert config.splits["train+val"] == config.splits.train + config.splits.val
    assert config.name == config.reader.task == task
    if task != "oxford_flowers":  # what own_split gives
        assert config.splits.val == -(-config.splits["train+val"] // 10)


def birds(folder, sparse):
    """24 training and 6 test images of three classes; NABirds' ids are hexadecimal and sparse."""
    ids = [f"{i:08x}-{i:04x}" if sparse else str(i + 1) for i in range(30)]
    classes = [str((2, 817, 90)[i % 3] if sparse else i % 3 + 1) for i in range(30)]
    names = [f"{classes[i]}.Bird/Bird_{i:04d}.jpg" for i in range(30)]
    for i, name in enumerate(names):
        save(folder / "images" / name, grey(i))
    tables = {
        "images": names,
        "image_class_labels": classes,
        "train_test_split": [str(int(i < 24)) for i in range(30)],
    }
    for table, values in tables.items():
        text = "".join(f"{i} {v}\n" for i, v in zip(ids, values))
        (folder / f"{table}.txt").write_text(text)
    order = {c: k for k, c in enumerate(sorted(set(classes), key=int))}
    return {f"images/{n}": (order[c], grey(i)) for i, (n, c) in enumerate(zip(names, classes))}


def cells(names):
    out = np.empty((len(names), 1), dtype=object)
    out[:, 0] = names
    return out


def dogs(folder):
    from scipy.io import savemat

    found = {}
    for split, count in (("train", 24), ("test", 6)):
        names = [f"n0208{i % 3}-Breed/n0208_{split}{i}.jpg" for i in range(count)]
        labels = np.array([[i % 3 + 1] for i in range(count)], dtype=np.uint8)
        for i, name in enumerate(names):
            save(folder / "Images" / name, grey(i))
            found[f"Images/{name}"] = (i % 3, grey(i))
        content = {"file_list": cells(names), "annotation_list": cells(names), "labels": labels}
        (folder / "lists").mkdir(exist_ok=True)
        savemat(folder / "lists" / f"{split}_list.mat", content)
    return found


def annotations(rows):
    """A 1 x N struct array, as the makers of Cars saved it."""
    kinds = [(name, object) for name in rows[0]]
    out = np.empty((1, len(rows)), dtype=kinds)
    for i, row in enumerate(rows):
        out[0, i] = tuple(np.array([[v]]) if isinstance(v, int) else v for v in row.values())
    return {"annotations": out}


def cars(folder, combined, nested=False):
    from scipy.io import savemat

    found, rows = {}, {"train": [], "test": []}
    for i in range(30):
        split = "train" if i < 24 else "test"
        box = {"bbox_x1": 1, "bbox_y1": 2, "bbox_x2": 30, "bbox_y2": 40, "class": i % 3 + 1}
        if combined:
            name = f"car_ims/{i + 1:06d}.jpg"
            rows["train"].append({"relative_im_path": name, **box, "test": int(split == "test")})
        else:
            rows[split].append({**box, "fname": f"{len(rows[split]) + 1:05d}.jpg"})
            name = f"cars_{split}/" + nested * f"cars_{split}/" + rows[split][-1]["fname"]
        save(folder / name, grey(i))
        found[name] = (i % 3, grey(i))
    if combined:
        savemat(folder / "cars_annos.mat", annotations(rows["train"]))
    else:
        (folder / "devkit").mkdir()
        savemat(folder / "devkit" / "cars_train_annos.mat", annotations(rows["train"]))
        place = folder if nested else folder / "devkit"
        savemat(place / "cars_test_annos_withlabels.mat", annotations(rows["test"]))
    return found


OFFICIAL = {
    "cub200": lambda folder: birds(folder, sparse=False),
    "nabirds": lambda folder: birds(folder, sparse=True),
    "stanford_dogs": dogs,
    "stanford_cars": lambda folder: cars(folder, combined=False),
    "stanford_cars combined": lambda folder: cars(folder, combined=True),
    "stanford_cars nested": lambda folder: cars(folder, combined=False, nested=True),
}
SMALL = {"train": 21, "val": 3, "train+val": 24, "test": 6}


def read(root, split, task="cub200", num_classes=3, splits=SMALL, source="auto"):
    config = OmegaConf.load(CONFIGS / "fgvc" / f"{task}.yaml")
    config.num_classes, config.splits, config.source = num_classes, splits, source
    return instantiate(config.reader)(split=split, data_root=root)


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_archives(case, tmp_path):
    task = case.split()[0]
    folder = tmp_path / "fgvc" / fgvc.SETS[task].folders[0]
    folder.parent.mkdir()
    expected = OFFICIAL[case](folder)
    seen = {}
    for split, count in SMALL.items():
        images = read(tmp_path, split, task)
        assert len(images) == count
        assert images.manifest.source == "official-own"
        for i, name in enumerate(images.manifest.ids):
            label, level = expected[name]
            assert images.manifest.labels[i] == label
            assert np.abs(images.image(i).astype(int) - level).max() <= 1
        seen[split] = images.manifest.ids
    assert seen["train+val"] == seen["train"] + seen["val"]
    assert set(seen["train+val"] + seen["test"]) == set(expected)
    val = read(tmp_path, "val", task).manifest.labels
    assert np.bincount(val).tolist() == [1, 1, 1]  # stratified


def test_flowers_use_their_own_validation_split(tmp_path):
    from scipy.io import savemat

    folder = tmp_path / "OxfordFlowers"
    for i in range(1, 13):
        save(folder / "jpg" / f"image_{i:05d}.jpg", grey(i))
    labels = np.arange(12) % 3 + 1
    savemat(folder / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    numbers = {"trnid": [12, 2, 7], "valid": [3, 1], "tstid": [4, 5, 6, 8, 9]}
    arrays = {k: np.array([v], dtype=np.uint16) for k, v in numbers.items()}
    savemat(folder / "setid.mat", arrays)
    sizes = {"train": 3, "val": 2, "train+val": 5, "test": 5}
    for split, field in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        images = read(tmp_path, split, "oxford_flowers", splits=sizes)
        assert images.manifest.ids == tuple(f"jpg/image_{n:05d}.jpg" for n in numbers[field])
        assert images.manifest.labels.tolist() == [(n - 1) % 3 for n in numbers[field]]


@pytest.mark.parametrize(("per_class", "classes"), [(30, 200), (7, 12), (100, 3), (41, 5)])
def test_own_split(per_class, classes):
    rows = [(f"{c}/{i}.jpg", str(c)) for c in range(classes) for i in range(per_class)]
    train, val = fgvc.own_split(rows)
    assert sorted(train + val) == sorted(rows)
    assert len(val) == -(-len(rows) // 10)
    counts = np.bincount([int(c) for _, c in val], minlength=classes)
    assert counts.min() >= per_class // 10
    assert counts.max() <= per_class // 10 + 1
    again = fgvc.own_split(rows[::-1])
    assert set(again[1]) == set(val)  # whatever the order of the listing
    for c in range(classes):  # each class gives the first of its hash order
        names = sorted(
            (name for name, label in rows if label == str(c)),
            key=lambda name: hashlib.md5(f"val{name}".encode()).hexdigest(),
        )
        assert {name for name, label in val if label == str(c)} == set(names[: counts[c]])


def vpt(folder, images="images", keys=None, splits=None):
    """VPT's three files for 21 + 3 + 6 images; val.json lacks the second class."""
    folder.mkdir(parents=True)
    labels = {"train": [12, 90, 155] * 7, "val": [12, 155, 12], "test": [155, 90] * 3}
    for split, values in (splits or labels).items():
        content = {}
        for i, label in enumerate(values):
            key = f"{label:03d}.Bird/{split}{i}.jpg"
            save(folder / images / key, label)
            content[(keys or str)(key)] = label
        (folder / f"{split}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "keys", [str, lambda k: f"images/{k}", lambda k: f"elsewhere/{k.split('/')[1]}"]
)
def test_json_layout_has_one_class_map_and_finds_its_files(keys, tmp_path):
    vpt(tmp_path / "CUB_200_2011", keys=keys)
    for split, expected in (("train", [0, 1, 2] * 7), ("val", [0, 2, 0]), ("test", [2, 1] * 3)):
        images = read(tmp_path, split)
        assert images.manifest.labels.tolist() == expected
        assert images.manifest.source == "json"
        levels = [round(float(images.image(i).mean())) for i in range(len(images))]
        assert np.abs(np.array(levels) - np.array([12, 90, 155])[expected]).max() <= 1
    assert len(read(tmp_path, "train+val")) == 24


def rewrite(folder, split, change):
    path = folder / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_bad_json_layouts(tmp_path):
    folder = tmp_path / "CUB_200_2011"

    def fresh():
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        vpt(folder)

    def refused(message, kind=ValueError):
        with pytest.raises(kind, match=message):
            read(tmp_path, "test")

    fresh()
    rewrite(folder, "test", lambda c: c.update({"012.Bird/train0.jpg": 12}))
    refused(r"'images/012.Bird/train0.jpg' is in the splits 'train' and 'test'")
    fresh()
    rewrite(folder, "train", lambda c: [c.pop(k) for k in list(c) if k.startswith("090")])
    refused(r"1 classes have no training image; the first: 90")
    rewrite(folder, "test", lambda c: [c.pop(k) for k in list(c) if k.startswith("090")])
    refused(r"name 2 classes; expected 3")
    fresh()
    rewrite(folder, "test", lambda c: c.pop("155.Bird/test0.jpg"))
    refused(r"has 5 images in its split 'test' \(json\); expected 6")
    fresh()
    (folder / "images" / "155.Bird" / "test0.jpg").unlink()
    refused(r"1 of 30 images .* 155.Bird/test0.jpg", FileNotFoundError)
    fresh()
    (folder / "test.json").write_text('{"a.jpg": 1, "b.jpg": 2, "a.jpg": 1}')
    refused(r"test.json: 'a.jpg' is listed twice")
    (folder / "test.json").write_text('{"a.jpg": "1"}')
    refused(r"expected \{path: class id\}, found \('a.jpg', '1'\)")
    (folder / "test.json").write_text('{"../../a.jpg": 1}')
    refused(r"'../../a.jpg' points out of")
    (folder / "test.json").write_text('{"a.jpg": 1')
    refused(r"test.json is damaged")
    (folder / "test.json").unlink()
    refused(r"test.json is not there", FileNotFoundError)
    with pytest.raises(ValueError, match="no source 'zip'"):
        read(tmp_path, "test", source="zip")
    with pytest.raises(ValueError, match="no split 'val200'"):
        read(tmp_path, "val200")


def test_mixed_layouts(tmp_path):
    """The archive and VPT's files side by side, in one folder or two; both archives of Cars."""
    both, alone = tmp_path / "one/CUB_200_2011", tmp_path / "two"
    vpt(both)
    birds(both, sparse=False)
    images = read(tmp_path / "one", "train")
    assert images.manifest.source == "json"
    assert read(tmp_path / "one", "test", source="official").manifest.source == "official-own"

    birds(alone / "CUB_200_2011", sparse=False)
    assert read(alone, "test").manifest.source == "official-own"
    vpt(alone / "fgvc/CUB")  # VPT's name, beside the archive's own
    assert read(alone, "test").manifest.source == "json"
    assert read(alone, "test", source="official").manifest.source == "official-own"
    vpt(alone / "cub")
    with pytest.raises(ValueError, match=r"fgvc/CUB and .*/cub both hold train.json\. Move away"):
        read(alone, "test")

    cars(tmp_path / "StanfordCars", combined=False)
    cars(tmp_path / "StanfordCars", combined=True)
    names = read(tmp_path, "train+val", task="stanford_cars").manifest.ids
    assert all(name.startswith("car_ims/") for name in names)

    (both / "val.json").unlink()  # half a layout is not quietly replaced by another
    with pytest.raises(FileNotFoundError, match=r"val.json is not there"):
        read(tmp_path / "one", "train")


@pytest.mark.parametrize("task", fgvc.SETS)
def test_absent_sets_say_where_they_belong(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"fgvc/{fgvc.SETS[task].folders[0]} with the"):
        read(tmp_path, "test", task)


@pytest.mark.parametrize("task", ["cifar10", "cifar100"])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_full_cifar(task, kind, tmp_path):
    config = OmegaConf.load(CONFIGS / "cifar" / f"{task}.yaml")
    assert dict(config.splits) == {
        "train": 45_000,
        "val": 5_000,
        "train+val": 50_000,
        "test": 10_000,
    }
    config.splits = {"train": 7, "val": 3, "train+val": 10, "test": 4}
    folder = tmp_path / "raw" / {
        ("cifar10", "binary"): "cifar-10-batches-bin", ("cifar10", "python"): "cifar-10-batches-py",
        ("cifar100", "binary"): "cifar-100-binary", ("cifar100", "python"): "cifar-100-python",
    }[task, kind]  # fmt: skip
    folder.mkdir(parents=True)
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    files = batches if task == "cifar10" else ["train"]
    labels = np.arange(14) * 3 % 10
    rows = dict(zip(files, np.array_split(np.arange(10), len(files))))
    rows["test_batch" if task == "cifar10" else "test"] = np.arange(10, 14)
    for name, part in rows.items():
        pixels = [bytes([grey(i)]) * 2048 + bytes([7]) * 1024 for i in part]
        if kind == "python":
            key = "labels" if task == "cifar10" else "fine_labels"
            content = {"data": b"".join(pixels), key: labels[part].tolist()}
            (folder / name).write_bytes(by_hand.cifar_pickle(content))
        else:
            head = b"" if task == "cifar10" else b"\x05"
            records = (head + bytes([labels[i]]) + p for i, p in zip(part, pixels))
            (folder / f"{name}.bin").write_bytes(b"".join(records))
    seen = {}
    for split, count in config.splits.items():
        images = instantiate(config.reader)(split=split, data_root=tmp_path)
        numbers = [int(i.split("/")[1]) + 10 * (split == "test") for i in images.manifest.ids]
        assert len(images) == count
        assert images.manifest.labels.tolist() == labels[numbers].tolist()
        for k, i in enumerate(numbers):
            assert images.image(k)[0, 0].tolist() == [grey(i), grey(i), 7]
        seen[split] = images.manifest.ids
    assert seen["train+val"] == seen["train"] + seen["val"]
    assert len(set(seen["train+val"])) == 10
    with pytest.raises(FileNotFoundError, match=r"cifar-.* Download an archive"):
        instantiate(config.reader)(split="test", data_root=tmp_path / "empty")
    config.splits.test = 5
    with pytest.raises(ValueError, match="the test files hold 4 images, not 5"):
        instantiate(config.reader)(split="test", data_root=tmp_path)
