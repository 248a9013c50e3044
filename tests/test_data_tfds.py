"""Prepared TFDS folders, written record by record, in both formats; TensorFlow is never
imported.
"""

import pickle
import sys

import archives_by_hand as by_hand
import numpy as np
import pytest
from test_data_raw import TASKS, read, replace, vtab

from data import tfds
from data.formats import Records


def array_record(path, payloads):
    from array_record.python.array_record_module import ArrayRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()


WRITERS = {"tfrecord": by_hand.tfrecord, "array_record": array_record}


def example(task, i):
    """An example as the task's builder stores it, and its label."""
    image = by_hand.encoded(by_hand.grey(i))
    if task.startswith("clevr"):
        depths = [[9.2, 8.2, 12.0], [8.0, 9.0, 9.0, 9.0], [11.0] * 10][i % 3]
        flat = [float(x) for depth in depths for x in (10, 20, depth)]
        labels = {"clevr_count": [0, 1, 7], "clevr_distance": [1, 0, 5]}
        return {"image": image, "objects__pixel_coords": flat}, labels[task][i % 3]
    if task == "kitti_distance":  # types: Car 0, Van 1, Truck 2, Pedestrian 3, ...
        kinds, depths = [([0, 3], [8.5, 1.0]), ([2], [8.0]), ([3, 7], [1.0, 2.0])][i % 3]
        flat = [float(x) for depth in depths for x in (1, 2, depth)]
        return {"image": image, "objects__type": kinds, "objects__location": flat}, [1, 0, 3][i % 3]
    if task.startswith("dsprites"):
        image = by_hand.encoded(i % 2, size=(64, 64), mode="L")  # stored as 0 and 1
        features = {"label_x_position": [2 * i], "label_orientation": [(5 * i + 1) // 2]}
        return {"image": image, **features}, i
    if task.startswith("smallnorb"):
        image = by_hand.encoded(by_hand.grey(i), size=(96, 96), mode="L")
        features = {"label_azimuth": [17 - i], "label_elevation": [i]}
        return {"image": image, **features}, 17 - i if task.endswith("azimuth") else i
    return {"image": image, "label": [i % 2]}, i % 2


def prepare(root, task, monkeypatch, kind, version=None, count=8, shards=3):
    """A prepared folder of `count` examples a split in three shards, and slices that fit it."""
    full = TASKS[task]
    name, majors = tfds.BUILDERS[full.archive]
    folder = root / "tfds" / name / (version or f"{majors[-1]}.0.0")
    for salt in full.sizes:
        payloads = [by_hand.example(**example(task, i)[0]) for i in range(count)]
        for k, part in enumerate(np.array_split(np.arange(count), shards)):
            stem = f"{name.split('/')[0]}-{salt}.{kind}-{k:05d}-of-{shards:05d}"
            WRITERS[kind](folder / stem, [payloads[i] for i in part])
    small = replace(
        full, sizes=dict.fromkeys(full.sizes, 8), train800=("train", 0, 3),
        val200=(full.val200[0], 3, 5), test=(full.test[0], 5, 8),
        also=dict.fromkeys(full.also, 7),
    )  # fmt: skip
    monkeypatch.setitem(vtab.TASKS, task, small)
    return folder


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_read_in_the_order_of_its_records(task, kind, tmp_path, monkeypatch):
    prepare(tmp_path, task, monkeypatch, kind)
    before = set(sys.modules)  # other tests may have imported it
    for split, rows in (("train800", range(3)), ("val200", range(3, 5)), ("test", range(5, 8))):
        images = pickle.loads(pickle.dumps(read(tmp_path, split, task, source="tfds")))
        salt = getattr(vtab.TASKS[task], split)[0]
        assert images.manifest.ids == tuple(f"{salt}[{i}]" for i in rows)
        assert images.manifest.labels.tolist() == [example(task, i)[1] for i in rows]
        for k, i in enumerate(rows):
            level = 255 * (i % 2) if task.startswith("dsprites") else by_hand.grey(i)
            image = images.image(k)
            assert image.shape[2] == 3
            assert (image == level).all()
    assert len(read(tmp_path, "train800val200", task, source="tfds")) == 5
    assert "tensorflow" not in set(sys.modules) - before


def test_the_newest_fitting_version_is_read(tmp_path, monkeypatch):
    for version in ("3.2.0", "3.10.0"):
        prepare(tmp_path, "pets", monkeypatch, "tfrecord", version)
    (tmp_path / "tfds" / "oxford_iiit_pet" / "5.0.0").mkdir()
    assert tfds.find(tmp_path, "pets").name == "3.10.0"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert tfds.find(tmp_path / "elsewhere", "pets").name == "3.10.0"


def test_one_image_less_moves_the_slices_of_caltech(tmp_path, monkeypatch):
    """With 3,059 training images val200 starts one earlier; train800 still starts at 0."""
    prepare(tmp_path, "caltech101", monkeypatch, "tfrecord", count=7)
    found = [
        read(tmp_path, split, "caltech101", source="tfds").manifest.ids
        for split in ("train800", "val200", "test")
    ]
    assert found[0] == ("train[0]", "train[1]", "train[2]")
    assert found[1] == ("train[2]", "train[3]")
    assert found[2] == ("test[4]", "test[5]", "test[6]")


def test_damaged_folders(tmp_path, monkeypatch):
    full = TASKS["dtd"]
    folder = prepare(tmp_path, "dtd", monkeypatch, "tfrecord")
    shards = sorted(folder.glob("dtd-train*"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"00001-of-00003 is cut short at byte \d+"):
        read(tmp_path, "train800", "dtd", source="tfds")
    shards[1].write_bytes(whole[:14] + b"\xff" * 20 + whole[34:])
    with pytest.raises(ValueError, match=r"00001-of-00003: record 3 is damaged"):
        Records.of(shards).features(3)
    shards[1].unlink()
    with pytest.raises(ValueError, match=r"has 2 of 3 shards of its split 'train'"):
        read(tmp_path, "train800", "dtd", source="tfds")
    assert len(read(tmp_path, "test", "dtd", source="tfds")) == 3
    monkeypatch.setitem(vtab.TASKS, "dtd", full)
    with pytest.raises(ValueError, match=r"has 8 images in its split 'test'; expected 1880"):
        read(tmp_path, "test", "dtd", source="tfds")


def test_absent_folders_say_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"tfds/eurosat/rgb/2\.\*.* tfds build eurosat/rgb"):
        read(tmp_path, "test", "eurosat", source="tfds")
