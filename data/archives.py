"""The original archives: where they lie under data_root/raw, where they come from, and what every
reader of one returns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cifar import FOLDERS
from data.pictures import Files, require

Open = Callable[[int], np.ndarray]
# For each archive: folders that may hold it (the first is the maker's own), a file that proves it,
# and where it comes from. `doctor` shows these.
ARCHIVES = {
    "cifar100": (FOLDERS["cifar100"], ".", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "caltech101": (
        ("caltech-101", "caltech101", "."),
        "101_ObjectCategories/accordion",
        "https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    "dtd": (("dtd", "dtd/dtd"), "labels/train1.txt", "https://www.robots.ox.ac.uk/~vgg/data/dtd/"),
    "flowers102": (
        ("flowers-102", "oxford_flowers102", "102flowers"),
        "setid.mat",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "pets": (
        ("oxford-iiit-pet", "oxford_iiit_pet"),
        "annotations/trainval.txt",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    "svhn": (("svhn", "SVHN"), "train_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
    "sun397": (("SUN397",), "a/abbey", "https://vision.princeton.edu/projects/2010/SUN/"),
    "patch_camelyon": (
        ("pcam", "patch_camelyon"),
        "camelyonpatch_level_2_split_train_x.h5",
        "https://zenodo.org/record/2546921 (gunzip the .h5.gz files)",
    ),
    "eurosat": (
        ("2750", "eurosat/2750", "EuroSAT", "EuroSAT_RGB"),
        "AnnualCrop",
        "https://github.com/phelber/EuroSAT (the RGB archive)",
    ),
    "resisc45": (
        ("NWPU-RESISC45", "resisc45/NWPU-RESISC45"),
        "airplane",
        "the authors of NWPU-RESISC45 (manual download)",
    ),
    "retinopathy": (
        ("diabetic-retinopathy-detection", "diabetic_retinopathy_detection"),
        "trainLabels.csv",
        "https://www.kaggle.com/c/diabetic-retinopathy-detection (account needed), all parts of "
        "train and test, and retinopathy_solution.csv",
    ),
    "clevr": (
        ("CLEVR_v1.0", "clevr/CLEVR_v1.0"),
        "scenes/CLEVR_train_scenes.json",
        "https://cs.stanford.edu/people/jcjohns/clevr/",
    ),
    "dmlab": (("dmlab",), ".", "https://storage.googleapis.com/dmlab-vtab/dmlab.tar.gz"),
    "kitti": (
        ("kitti", "Kitti/raw", "Kitti"),
        "training/label_2",
        "https://www.cvlibs.net/datasets/kitti/eval_object.php: left colour images, labels and the "
        "object development kit (its mapping/ folder)",
    ),
    "dsprites": (
        (".", "dsprites"),
        "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
        "https://github.com/google-deepmind/dsprites-dataset",
    ),
    "smallnorb": (
        ("smallnorb",),
        "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat",
        "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/ (gunzip the files)",
    ),
}


@dataclass(frozen=True, eq=False)
class Examples:
    """One TFDS split: keys to sort, the label of example i, and an opener for chosen examples."""

    keys: Sequence[str | int]
    label: Callable[[int], int]
    pick: Callable[[Sequence[int]], Open]


def find(root: Path, archive: str) -> Path:
    """The folder of an archive under `root` (= data_root/raw)."""
    folders, proof, origin = ARCHIVES[archive]
    for folder in folders:
        if (root / folder / proof).exists():
            return root / folder
    raise FileNotFoundError(
        f"{archive}: no original archive; expected {root / folders[0] / proof}. It comes from "
        f"{origin}."
    )


def files(root: Path, names: Sequence[str], keys: Sequence[str], label: Callable) -> Examples:
    """Examples that are image files: `names` relative to `root`."""

    def pick(rows: Sequence[int]) -> Open:
        chosen = [names[i] for i in rows]
        require(root, chosen, root.name)
        return Files(root, chosen)

    return Examples(keys, label, pick)
