"""Pictures of one's own, in folders as torchvision's ImageFolder has them."""

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from test_train import TINY

import train
from data import folder
from peft.config import CONFIGS, compose
from scripts import doctor


def make(root, split: str, counts: dict[str, int]) -> None:
    for k, (label, count) in enumerate(counts.items()):
        (root / split / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((9, 8, 3), 40 * k + i, np.uint8)).save(
                root / split / label / f"{i}.png"
            )


@pytest.fixture
def birds(tmp_path):
    make(tmp_path / "birds", "train", {"rook": 20, "crow": 13})
    make(tmp_path / "birds", "test", {"rook": 3})
    (tmp_path / "birds/train/rook/notes.txt").write_text("not a picture")
    return tmp_path


def read(root, split: str, num_classes: int = 2):
    return folder.read(split, name="birds", num_classes=num_classes, data_root=root)


def test_classes_are_folders_and_a_tenth_is_set_aside(birds):
    whole, part, val = (read(birds, split) for split in ("train+val", "train", "val"))
    assert (len(whole), len(part), len(val)) == (33, 29, 4)
    assert np.bincount(val.manifest.labels).tolist() == [2, 2]  # a tenth of each, and one more
    assert {*part.manifest.ids, *val.manifest.ids} == {*whole.manifest.ids}
    test = read(birds, "test")
    assert test.manifest.labels.tolist() == [1, 1, 1]  # crow is 0, though it has no picture here
    assert test.manifest.ids[1] == "test/rook/1.png" and (test.image(1) == 1).all()
    assert read(birds, "val").manifest.digest == val.manifest.digest


def test_doctor_reads_a_suite_that_somebody_added(birds):
    yaml = OmegaConf.load(CONFIGS / "dataset/folder.yaml")
    yaml.name = "birds"
    found = doctor.examine("folder", yaml, birds, doctor.READER, deep=False)
    assert found.state == "found" and f"{birds}/birds" in found.text
    assert "train 29 " in found.text and "val 4 " in found.text and "test 3 " in found.text
    yaml.name = "bees"
    found = doctor.examine("folder", yaml, birds, doctor.READER, deep=False)
    assert found.state == "missing" and "What is expected" in found.text


def test_a_val_of_ones_own_is_taken(birds):
    make(birds / "birds", "val", {"crow": 2})
    assert len(read(birds, "train")) == 33 and len(read(birds, "val")) == 2
    assert read(birds, "train+val").manifest.ids[33:] == ("val/crow/0.png", "val/crow/1.png")


def test_what_does_not_fit_is_told(birds):
    with pytest.raises(ValueError, match=r"has 2 folders.*give dataset.num_classes=2"):
        read(birds, "train", 3)
    with pytest.raises(ValueError, match="no split 'train800'; there are train, val"):
        read(birds, "train800")
    (birds / "birds/test/jay").mkdir()
    with pytest.raises(ValueError, match=r"test has the class 'jay', which .*train has not"):
        read(birds, "test")
    with pytest.raises(FileNotFoundError, match=r"\{train,val,test\}/<class>/<picture>"):
        folder.read("train", name="brids", num_classes=2, data_root=birds)


def test_a_run_on_pictures_of_ones_own(birds):
    told = [word for word in TINY if not word.startswith(("dataset", "protocol", "preset"))]
    own = ["method=lora", "dataset=folder", "dataset.name=birds", f"data_root={birds}"]
    train.run(compose("train", [*told, *own, f"runs_dir={birds}/runs"]))
    assert len(list((birds / "runs/own/birds").glob("lora-*/record.json"))) == 1
