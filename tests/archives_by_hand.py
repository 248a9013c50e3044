"""Small archives in the real formats, written byte by byte or with the library that the makers
used.

Each function fills `root` and returns {TFDS split: [(key, {task: label}, grey level)]}. Pictures
are flat, so that every format, JPEG included, gives the level back within one.
"""

import csv
import io
import json
import pickle
import struct

import numpy as np
from PIL import Image


def grey(i):
    return 20 + 37 * i % 200


def save(path, level, size=(16, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    colour = level if mode == "L" else (level,) * 3 + ((255,) if mode == "RGBA" else ())
    Image.new(mode, size, colour).save(path, kind)


def encoded(level, kind="PNG", size=(16, 12), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, level if mode == "L" else (level,) * 3).save(file, kind)
    return file.getvalue()


def cifar_rows(count):
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 100, count).tolist()
    return labels, [bytes([grey(i)]) * 3072 for i in range(count)]


def cifar100_binary(root):
    found = {}
    for split, count in (("train", 9), ("test", 4)):
        labels, pixels = cifar_rows(count)
        path = root / "cifar-100-binary" / f"{split}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(bytes([7, y]) + x for y, x in zip(labels, pixels)))
        found[split] = [(i, {"cifar100": y}, grey(i)) for i, y in enumerate(labels)]
    return found


def cifar_pickle(arrays):
    """A dictionary as Python 2's cPickle wrote it (protocol 2): short and long byte strings, lists
    of small integers in batches, and an array rebuilt by numpy.core.multiarray._reconstruct.
    """
    out = [b"\x80\x02}q\x01("]
    for key, value in arrays.items():
        out.append(b"U" + bytes([len(key)]) + key.encode() + b"q\x02")
        if isinstance(value, bytes):
            out.append(
                b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87"
                b"Rq\x05(K\x01" + b"M" + struct.pack("<H", len(value) // 3072) + b"M\x00\x0c\x86"
                b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
                b"J\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(value)) + value + b"tb"
            )
        else:
            out.append(b"]q\x08(" + b"".join(b"K" + bytes([v]) for v in value) + b"e")
    return b"".join(out) + b"u."


def cifar100_python(root):
    found = {}
    for split, count in (("train", 9), ("test", 4)):
        labels, pixels = cifar_rows(count)
        path = root / "cifar-100-python" / split
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = [3] * count
        content = {"coarse_labels": coarse, "data": b"".join(pixels), "fine_labels": labels}
        path.write_bytes(cifar_pickle(content))
        found[split] = [(i, {"cifar100": y}, grey(i)) for i, y in enumerate(labels)]
    return found


def caltech101(root):
    """Two categories; the class of the background sorts by its lower-cased name."""
    folder = root / "caltech-101" / "101_ObjectCategories"
    found = []
    for label, name in enumerate(("accordion", "BACKGROUND_Google", "Faces")):
        for i in range(33):
            save(folder / name / f"image_{i + 1:04d}.jpg", grey(40 * label + i), mode="L")
            key = f"{name}/image_{i + 1:04d}.jpg"
            found.append((key, {"caltech101": label}, grey(40 * label + i)))
    (folder / "BACKGROUND_Google" / "tmp").write_text("no picture")
    return {"all": found}


def dtd(root):
    found = {}
    for split, name in (("train", "train1"), ("validation", "val1"), ("test", "test1")):
        rows = []
        for i in range(6):
            kind = ("banded", "zigzagged", "blotchy")[i % 3]
            key = f"{kind}/{kind}_{name}{i:03d}.jpg"
            save(root / "dtd" / "images" / key, grey(i))
            label = {"banded": 0, "blotchy": 1, "zigzagged": 2}[kind]
            rows.append((key, {"dtd": label}, grey(i)))
        path = root / "dtd" / "labels" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{key}\n" for key, _, _ in rows))
        found[split] = rows
    return found


def flowers102(root):
    from scipy.io import savemat

    folder, labels = root / "flowers-102", np.arange(18) * 5 % 102 + 1
    for i in range(18):
        save(folder / "jpg" / f"image_{i + 1:05d}.jpg", grey(i))
    numbers = {"trnid": [3, 1, 8, 9], "valid": [2, 18, 17, 5], "tstid": [4, 6, 7, 10, 11]}
    arrays = {k: np.array([v], dtype=np.uint16) for k, v in numbers.items()}
    savemat(folder / "setid.mat", arrays)
    savemat(folder / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    names = {"train": "trnid", "validation": "valid", "test": "tstid"}
    return {
        split: [
            (f"image_{n:05d}.jpg", {"flowers102": int(labels[n - 1]) - 1}, grey(n - 1))
            for n in numbers[name]
        ]
        for split, name in names.items()
    }


def pets(root):
    found, number = {}, 0
    for split, name in (("train", "trainval"), ("test", "test")):
        rows, lines = [], []
        for i in range(7):
            breed, label = (("Abyssinian", 1), ("yorkshire_terrier", 37))[i % 2]
            stem, number = f"{breed}_{name}{i}", number + 1
            save(root / "oxford-iiit-pet" / "images" / f"{stem}.jpg", grey(number))
            lines.append(f"{stem} {label} {2 - label % 2} {i + 1}\n")
            rows.append((f"{stem}.jpg", {"pets": label - 1}, grey(number)))
        path = root / "oxford-iiit-pet" / "annotations" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("#Image CLASS-ID SPECIES BREED ID\n" * (split == "test") + "".join(lines))
        found[split] = rows
    return found


def svhn(root):
    from scipy.io import savemat

    found = {}
    (root / "svhn").mkdir(parents=True)
    for split, count in (("train", 11), ("test", 5)):
        stored = np.arange(count) % 10 + 1
        pictures = np.stack([np.full((32, 32, 3), grey(i), np.uint8) for i in range(count)], axis=3)
        savemat(root / "svhn" / f"{split}_32x32.mat", {"X": pictures, "y": stored[:, None]})
        found[split] = [(i, {"svhn": (i + 1) % 10}, grey(i)) for i in range(count)]
    return found


def patch_camelyon(root):
    import h5py

    found = {}
    (root / "pcam").mkdir(parents=True)
    for split, prefix in (("train", "train"), ("validation", "valid"), ("test", "test")):
        stem = root / "pcam" / f"camelyonpatch_level_2_split_{prefix}"
        levels = np.array([grey(i) for i in range(6)], dtype=np.uint8)
        with h5py.File(f"{stem}_x.h5", "w") as file:
            pictures = np.broadcast_to(levels[:, None, None, None], (6, 96, 96, 3))
            file.create_dataset("x", data=pictures, chunks=(2, 96, 96, 3), compression="gzip")
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(6) % 2).reshape(6, 1, 1, 1).astype(np.uint8)
        found[split] = [(f"{prefix}_{i}", {"patch_camelyon": i % 2}, grey(i)) for i in range(6)]
    return found


def eurosat(root):
    found = []
    for label, name in enumerate(("AnnualCrop", "Forest", "SeaLake")):
        for i in range(1, 4):
            save(root / "2750" / name / f"{name}_{i}.jpg", grey(3 * label + i))
            found.append((f"{name}_{name}_{i}.jpg", {"eurosat": label}, grey(3 * label + i)))
    return {"train": found}


def resisc45(root):
    found = []
    for label, name in enumerate(("airplane", "dense_residential", "wetland")):
        for i in range(1, 4):
            save(root / "NWPU-RESISC45" / name / f"{name}_{i:03d}.jpg", grey(3 * label + i))
            found.append((f"{name}_{name}_{i:03d}.jpg", {"resisc45": label}, grey(3 * label + i)))
    return {"train": found}


def clevr_scene(name, depths):
    things = [
        {"color": "red", "3d_coords": [1.0, 2.0, 0.35], "pixel_coords": [100 + i, 50, depth]}
        for i, depth in enumerate(depths)
    ]
    return {"image_index": 0, "objects": things, "image_filename": name, "relationships": {}}


def clevr(root):
    cases = [[9.2, 8.2, 12.0], [8.0, 9.0, 9.0, 9.0], [11.0] * 10, [9.5, 9.6, 9.7], [9.51] * 5]
    expected = [(0, 1), (1, 0), (7, 5), (0, 3), (2, 4)]
    found = {}
    for split, name in (("train", "train"), ("validation", "val")):
        scenes, rows = [], []
        for i, (depths, (count, distance)) in enumerate(zip(cases, expected)):
            key = f"CLEVR_{name}_{i:06d}.png"
            save(root / "CLEVR_v1.0" / "images" / name / key, grey(i), mode="RGBA")
            scenes.append(clevr_scene(key, depths))
            rows.append((key, {"clevr_count": count, "clevr_distance": distance}, grey(i)))
        path = root / "CLEVR_v1.0" / "scenes" / f"CLEVR_{name}_scenes.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"info": {"split": name, "version": "1.0"}, "scenes": scenes}))
        found[split] = rows
    return found


KITTI_LINE = "{} 0.00 0 -1.57 614.24 181.78 727.31 284.77 1.57 1.73 4.15 1.00 1.75 {} -1.62\n"


def kitti(root):
    """Twelve videos of two images; which of them are for validation and test is the seed's
    choice.
    """
    folder = root / "kitti"
    order = list(np.random.default_rng(5).permutation(24) + 1)
    lines = [f"2011_09_26 2011_09_26_drive_{n // 2:04d}_sync {n:010d}" for n in range(24)]
    (folder / "mapping").mkdir(parents=True)
    (folder / "mapping" / "train_rand.txt").write_text(",".join(map(str, order)))
    (folder / "mapping" / "train_mapping.txt").write_text("\n".join(lines) + "\n")
    cases = [
        ([("Car", 8.0), ("Van", 30.0)], 0),
        ([("Truck", 8.01), ("Pedestrian", 3.0)], 1),
        ([("Car", 20.01), ("DontCare", -1000)], 2),
        ([("Tram", 5.0), ("Cyclist", 2.0)], 3),
    ]
    videos = sorted({line.split()[1] for line in lines})
    draw = np.random.RandomState(123)
    test = draw.choice(videos, 1, replace=False)
    validation = draw.choice([v for v in videos if v not in test], 1, replace=False)
    found = {"train": [], "validation": [], "test": []}
    for image, line in enumerate(order):
        things, label = cases[image % 4]
        path = folder / "training" / "label_2" / f"{image:06d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(KITTI_LINE.format(kind, z) for kind, z in things))
        save(folder / "training" / "image_2" / f"{image:06d}.png", grey(image), size=(40, 12))
        video = lines[line - 1].split()[1]
        split = "test" if video in test else "validation" if video in validation else "train"
        found[split].append((f"{image:06d}.png", {"kitti_distance": label}, grey(image)))
    return found


def dsprites(root):
    rows = 2200
    pictures = np.zeros((rows, 64, 64), dtype=np.uint8)
    pictures[1::2] = 1  # stored as 0 and 1
    root.mkdir(parents=True, exist_ok=True)
    trap = np.array({"not": Exploding()}, dtype=object)
    name = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    np.savez_compressed(root / name, metadata=trap, imgs=pictures)
    found = []
    for row in range(rows):
        turn, x = row // 1024, row // 32 % 32
        labels = {"dsprites_location": x // 2, "dsprites_orientation": [0, 0, 0, 1][turn]}
        found.append((row, labels, 255 * (row % 2)))
    return {"train": found}


class Exploding:
    def __reduce__(self):
        return (exec, ("raise RuntimeError('unpickled')",))


def smallnorb(root):
    found = {}
    (root / "smallnorb").mkdir(parents=True)
    toys = {"train": "46789x9x18x6x2x96x96-training", "test": "01235x9x18x6x2x96x96-testing"}
    for split, name in toys.items():
        stem, count, rows = f"{root}/smallnorb/smallnorb-5x{name}", 8, []
        left = [bytes([grey(i)]) * 9216 + bytes(9216) for i in range(count)]
        with open(f"{stem}-dat.mat", "wb") as file:
            file.write(struct.pack("<6i", 507333717, 4, count, 2, 96, 96) + b"".join(left))
        with open(f"{stem}-info.mat", "wb") as file:
            file.write(struct.pack("<5i", 507333716, 2, count, 4, 1))
            for i in range(count):
                elevation, azimuth = i, (34 - 2 * i)
                file.write(struct.pack("<4i", 7, elevation, azimuth, 3))
                labels = {"smallnorb_azimuth": 17 - i, "smallnorb_elevation": i}
                rows.append((i, labels, grey(i)))
        found[split] = rows
    return found


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(path, payloads):
    """length, masked crc of the length, payload, masked crc of the payload."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + masked(length) + payload + masked(payload))


def example(**features):
    """A serialised tf.train.Example; the values are bytes, or lists of integers or floats."""
    from tensorflow_datasets.proto import tf_example_pb2

    proto = tf_example_pb2.Example()
    for name, value in features.items():
        feature = proto.features.feature[name.replace("__", "/")]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif value and isinstance(value[0], float):
            feature.float_list.value.extend(value)
        else:
            feature.int64_list.value.extend(value)
    return proto.SerializeToString()


def dmlab(root):
    found = {}
    for split in ("train", "validation", "test"):
        rows, payloads = [], []
        for i in range(7):
            key, label = f"{split}-{i}.jpg", i % 6
            image = encoded(grey(i), "JPEG")
            payloads.append(example(image=image, filename=key.encode(), label=[label]))
            rows.append((key, {"dmlab": label}, grey(i)))
        for shard in (0, 1):
            name = f"dmlab-{split}.tfrecord-{shard:05d}-of-00002"
            tfrecord(root / "dmlab" / name, payloads[4 * shard : 4 * shard + 4])
        found[split] = rows
    return found


def retinopathy(root):
    folder, found = root / "diabetic-retinopathy-detection", {}
    folder.mkdir(parents=True)
    tables = {"train": [], "test": []}
    for split, usage in (("train", None), ("validation", "Public"), ("test", "Private")):
        rows = []
        for i in range(3):
            for side in ("left", "right"):
                name, level = f"{len(found)}{i}_{side}", i
                where = "test" if usage else "train"
                save(folder / where / f"{name}.jpeg", grey(i), size=(64, 48))
                row = {"image": name, "level": level}
                tables[where].append(row | ({"Usage": usage} if usage else {}))
                rows.append((name, {"retinopathy": level}, None))
        found[split] = rows
    for where, name in (("train", "trainLabels.csv"), ("test", "retinopathy_solution.csv")):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, tables[where][0].keys())
            writer.writeheader()
            writer.writerows(tables[where])
    return found


ARCHIVES = (
    cifar100_binary, cifar100_python, caltech101, dtd, flowers102, pets, svhn, patch_camelyon,
    eurosat, resisc45, clevr, kitti, dsprites, smallnorb, dmlab, retinopathy,
)  # fmt: skip
assert pickle.loads(cifar_pickle({"fine_labels": [1, 2]})) == {"fine_labels": [1, 2]}
