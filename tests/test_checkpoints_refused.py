"""Files that are no checkpoint of the model: named, whole or not, and never unpickled."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import google, loaded, random_state

import peft


def test_wrong_files_say_which_tensors_differ(tmp_path):
    torch.save(random_state("tiny_resnet"), tmp_path / "resnet.pth")
    for backbone in ("tiny_vit", "tiny_swin", "tiny_convnext", "tiny_asmlp"):
        with pytest.raises(
            ValueError,
            match=r"(?s)resnet.pth holds another .* differ\n  missing .* and \d+ more",
        ):
            loaded(backbone, tmp_path / "resnet.pth")
    torch.save(
        {"model": {**random_state("tiny_vit"), "extra.weight": torch.ones(2)}},
        tmp_path / "more.pth",
    )
    with pytest.raises(ValueError, match=r"1 tensors differ\n  unexpected extra.weight \(2,\)"):
        loaded("tiny_vit", tmp_path / "more.pth")
    with pytest.raises(
        FileNotFoundError,
        match=r"no weights at .*absent.pth: give weights=FILE .*original is https://dl.fbaipublicfiles",
    ):
        peft.create("vit_b16_mae_in1k", num_classes=3, weights="absent.pth")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (Bomb.path,)


@pytest.mark.parametrize("name", ["bomb.pth", "bomb.pth.tar"])
def test_nothing_is_unpickled(tmp_path, name):
    Bomb.path = str(tmp_path / "exploded")
    torch.save({"model": random_state("tiny_vit"), "optimizer": Bomb()}, tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of tensors"):
        loaded("tiny_vit", tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_damaged_files_are_named(tmp_path):
    np.savez(tmp_path / "objects.npz", cls=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "whole.npz", **google(1))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:5000])
    save_file(random_state("tiny_resnet"), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    for name in ("objects.npz", "cut.npz", "cut.safetensors", "text.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a checkpoint of tensors"):
            loaded("tiny_vit", tmp_path / name)
