"""The builders of TensorFlow Datasets themselves, run under TensorFlow on small archives in their
makers' formats: from one archive, `source="raw"` and `source="tfds"` give the same images, labels
and order, in both record formats.

    pip install tensorflow-cpu importlib_resources opencv-python-headless
    OMP_NUM_THREADS=1 python -m pytest -m full tests/test_data_tfds_truth.py

Only the download is replaced, by `fetch`. Caltech101 is left out: TFDS draws its split from
directory listings in the file system's order. Pixels are equal to the last bit but for Sun397 and
the retina scans, which TFDS scales with OpenCV and compresses once more.
"""

import io
import json
import re
import shutil
import tarfile
import zlib
from importlib.util import find_spec

import archives_by_hand as by_hand
import numpy as np
import pytest
from PIL import Image
from test_data_raw import TASKS, read, replace, vtab

from data import hash_order, raw, tfds

NEEDED = ("tensorflow", "importlib_resources", "cv2")
pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
]
NAMES = ("id", "file_name", "filename", "name", "image/file_name")  # the key, if a builder keeps it
FOLDERS = {  # the folder in raw/ that the builder finds unpacked, where it is not raw/ itself
    "flowers102": "flowers-102", "pets": "oxford-iiit-pet", "dmlab": "dmlab",
    "retinopathy": "diabetic-retinopathy-detection",
}  # fmt: skip
SCALED = {"sun397": 1.0, "retinopathy": 1.5}  # admissible mean difference in grey levels


def texture(seed, height, width, channels=3, cells=4):
    """Smooth noise, which survives JPEG; no two pictures or channels are alike."""
    rng = np.random.default_rng(zlib.crc32(str(seed).encode()))
    small = rng.integers(0, 256, (channels, cells, cells), dtype=np.uint8)
    planes = [Image.fromarray(plane).resize((width, height)) for plane in small]
    return np.stack(planes, axis=2)


def save(path, level=0, size=(16, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(texture(path.name, size[1], size[0], len(mode)).squeeze())
    picture.save(path, "PNG" if path.suffix == ".png" else "JPEG")


def encoded(level, kind):
    file = io.BytesIO()
    Image.fromarray(texture(level, 12, 16)).save(file, kind)
    return file.getvalue()


def cifar_rows(count, original=by_hand.cifar_rows):
    pixels = [texture(i, 32, 32).transpose(2, 0, 1).tobytes() for i in range(count)]
    return original(count)[0], pixels


def clevr_scene(name, depths, original=by_hand.clevr_scene):
    """With the attributes that the builder copies and no label takes."""
    scene = original(name, depths)
    more = {"material": "metal", "shape": "cube", "size": "small", "rotation": 1.5}
    return scene | {"objects": [thing | more for thing in scene["objects"]]}


def turned(folder, suffix):
    """Turns every third picture of a folder by its EXIF data; OpenCV, hence TFDS, turns it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in sorted(folder.rglob(f"*{suffix}"))[::3]:
        with Image.open(path) as picture:
            picture.save(path, "JPEG", exif=exif, quality=95)


def class_folders(folder, classes, pattern, size):
    """Three pictures in each of the builder's classes, as a class number is a rank among all."""
    pairs = [(name, pattern.format(name, i)) for name in classes for i in (1, 2, 3)]
    for pair in pairs:
        save(folder.joinpath(*pair), size=(size, size))
    return {"train": pairs}


def eurosat(root, classes):
    return class_folders(root / "2750", classes, "{}_{}.jpg", 64)


def resisc45(root, classes):
    return class_folders(root / "NWPU-RESISC45", classes, "{}_{:03d}.jpg", 256)


def sun397(root, classes):
    """The six pictures that lead the hash order of each full split, in the maker's tar file."""
    (root / "SUN397" / "a" / "abbey").mkdir(parents=True)
    found = {}
    for salt in TASKS["sun397"].sizes:
        keys = raw.sun397(root, salt, "sun397").keys
        found[salt] = [keys[i] for i in hash_order(salt, keys)[:6]]
        for i, key in enumerate(found[salt]):
            save(root / "SUN397" / key[1:], size=(640, 400) if i % 2 else (200, 300))
    turned(root / "SUN397", ".jpg")
    with tarfile.open(root / "SUN397.tar.gz", "w:gz") as file:
        file.add(root / "SUN397", "SUN397")
    return found


def complete(archive, root, classes):
    """Adds what a builder wants and VTAB-1k does not use, and fills arrays with noise."""
    import h5py
    from scipy.io import loadmat, savemat

    if archive == "cifar100":  # the builder takes the binary one; the Python one holds the same
        by_hand.cifar100_binary(root)
        for kind, count in (("fine", 100), ("coarse", 20)):
            text = "".join(f"{kind} {i}\n" for i in range(count))
            (root / "cifar-100-binary" / f"{kind}_label_names.txt").write_text(text)
    elif archive == "dtd":
        for name in classes:
            (root / "dtd" / "images" / name).mkdir(exist_ok=True)
    elif archive == "pets":
        folder = root / "oxford-iiit-pet" / "annotations"
        (folder / "test.txt").write_text((folder / "test.txt").read_text().split("\n", 1)[1])
        for path in (root / "oxford-iiit-pet" / "images").iterdir():
            save(folder / "trimaps" / f"{path.stem}.png", mode="L")
    elif archive == "svhn":
        for name, like in (("train", "train"), ("test", "test"), ("extra", "test")):
            digits = loadmat(root / "svhn" / f"{like}_32x32.mat")["y"]
            noise = [texture(f"{name} {i}", 32, 32) for i in range(len(digits))]
            savemat(root / "svhn" / f"{name}_32x32.mat", {"X": np.stack(noise, 3), "y": digits})
    elif archive == "patch_camelyon":
        for path in (root / "pcam").glob("*_x.h5"):
            with h5py.File(path, "r+") as file:
                file["x"][:] = [texture(f"{path.name} {i}", 96, 96) for i in range(6)]
    elif archive == "clevr":
        for name in ("train", "val", "test"):
            save(root / "CLEVR_v1.0" / "images" / "test" / f"CLEVR_test_{name}.png", mode="RGBA")
            path = root / "CLEVR_v1.0" / "questions" / f"CLEVR_{name}_questions.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"questions": []}))
    elif archive == "kitti":
        for name in ("data_object_image_2", "data_object_label_2", "devkit_object"):
            shutil.make_archive(root / name, "zip", root / "kitti")  # all in each: it picks
    elif archive == "dsprites":
        (path,) = root.glob("dsprites*.npz")
        pictures = np.random.default_rng(0).integers(0, 2, (2200, 64, 64), dtype=np.uint8)
        classes = np.stack(np.unravel_index(np.arange(2200), (1, 3, 6, 40, 32, 32)), axis=1)
        np.savez_compressed(path, imgs=pictures)
        with h5py.File(path.with_suffix(".hdf5"), "w") as file:
            file["imgs"], file["latents/classes"] = pictures, classes
            file["latents/values"] = classes / 7
    elif archive == "smallnorb":
        for path in (root / "smallnorb").glob("*-dat.mat"):
            pairs = [texture(f"{path.name} {i}", 96, 96, 2).transpose(2, 0, 1) for i in range(8)]
            path.write_bytes(path.read_bytes()[:24] + np.stack(pairs).tobytes())
            category = np.array([507333716, 1, 8, 1, 1, *[3] * 8], dtype="<i4")
            path.with_name(path.name.replace("-dat", "-cat")).write_bytes(category.tobytes())
    elif archive == "retinopathy":
        folder = root / "diabetic-retinopathy-detection"
        shutil.copytree(folder / "train", folder / "sample")
        y, x = np.mgrid[:300, :400]
        eye = ((x - 200) ** 2 + (y - 150) ** 2 < 140**2)[..., None]
        for path in folder.rglob("*.jpeg"):
            picture = (50 + texture(path.name, 300, 400, cells=24) // 2) * eye
            Image.fromarray(picture.astype(np.uint8)).save(path, "JPEG", quality=95)
        turned(folder, ".jpeg")


def prepare(archive, make, root, kind, monkeypatch):
    """Writes an archive to root/raw and has its builder prepare root/tfds from it, in two shards.
    Returns the sizes of the splits.
    """
    import tensorflow_datasets
    from tensorflow_datasets.core.download import DownloadConfig, DownloadManager

    name, folder = tfds.BUILDERS[archive][0], root / "raw" / FOLDERS.get(archive, "")
    builder = tensorflow_datasets.builder(name, data_dir=root / "tfds", file_format=kind)
    classes = getattr(dict(builder.info.features.items()).get("label"), "names", None)
    found = make(root / "raw", *([classes] if make.__module__ == __name__ else []))
    complete(archive, root / "raw", classes)

    def fetch(self, urls):
        """The file of a URL's name, unpacked where it was packed; else the folder."""
        if isinstance(urls, dict):
            return {key: fetch(self, url) for key, url in urls.items()}
        name = getattr(urls, "url", urls).partition("?")[0].rpartition("/")[2]
        return [*folder.rglob(name), *folder.rglob(name.removesuffix(".gz")), folder][0]

    monkeypatch.setattr(DownloadManager, "download", fetch)
    monkeypatch.setattr(DownloadManager, "download_and_extract", fetch)
    config = DownloadConfig(manual_dir=folder, try_download_gcs=False, num_shards=2)
    builder.download_and_prepare(download_config=config)
    return {salt: len(rows) for salt, rows in found.items()}


def plain(name):
    """train/5 and train_00005 are one name."""
    return re.sub(r"_0+(?=\d)", "_", name.replace("/", "_"))


MAKERS = [m for m in by_hand.ARCHIVES if m.__name__ not in ("caltech101", "eurosat", "resisc45")]


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
@pytest.mark.parametrize("make", [*MAKERS, eurosat, resisc45, sun397], ids=lambda m: m.__name__)
def test_raw_and_tfds_give_the_same(make, kind, tmp_path, monkeypatch):
    for function in (save, encoded, cifar_rows, clevr_scene):
        monkeypatch.setattr(by_hand, function.__name__, function)
    box = by_hand.KITTI_LINE.replace("614.24 181.78 727.31 284.77", "4.24 1.78 27.31 8.77")
    monkeypatch.setattr(by_hand, "KITTI_LINE", box)  # inside of the small pictures
    archive = make.__name__.removesuffix("_binary").removesuffix("_python")
    sizes = prepare(archive, make, tmp_path, kind, monkeypatch)
    if make is by_hand.cifar100_python:
        shutil.rmtree(tmp_path / "raw" / "cifar-100-binary")
    for task, full in [(name, t) for name, t in TASKS.items() if t.archive == archive]:
        splits = {getattr(full, split)[0]: split for split in ("train800", "val200", "test")}
        for salt, split in splits.items():
            cut, both = {split: (salt, 0, sizes[salt])}, []
            for source in ("raw", "tfds"):  # sun397 lists all of its images, wherever they are
                counted = full.sizes if (archive, source) == ("sun397", "raw") else sizes
                small = replace(full, sizes=counted, also={}, **cut)
                monkeypatch.setitem(vtab.TASKS, task, small)
                both.append(read(tmp_path, split, task, source=source))
            original, prepared = both
            assert len(original) == len(prepared) == sizes[salt]
            assert original.manifest.labels.tolist() == prepared.manifest.labels.tolist()
            for i, key in enumerate(original.manifest.ids):
                features, ours = prepared.open.features(i), original.image(i).astype(int)
                stored = [features[n].bytes_list.value[0].decode() for n in NAMES if n in features]
                assert all(plain(key).endswith(plain(name)) for name in stored)
                assert len(stored) == (archive not in ("dsprites", "smallnorb"))
                theirs = prepared.image(i)
                assert ours.shape == theirs.shape
                assert np.abs(ours - theirs).mean() <= SCALED.get(archive, 0)
