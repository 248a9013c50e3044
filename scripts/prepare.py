"""Export data sets once to the store: one file per split, with a manifest and hashes.

    python -m scripts.prepare dataset=vtab/svhn source=raw               lossless (pixels=png)
    python -m scripts.prepare dataset=vtab source=raw pixels=jpeg75      as the community folder
    python -m scripts.prepare dataset=vtab/dtd source=tfds               prepares TFDS first, if
    need be
    python -m scripts.prepare dataset=vtab/svhn source=raw verify=true   compares with the hashes
    python -m scripts.prepare archive=vtab-1k.zip to=vtab-1k             unpacks below data_root

dataset is a name, a suite, or several with commas; what is there is exported, the rest is named. An
interrupted export goes on where it stopped. data_root=DIR is where all data lies (default
$DATA_ROOT, else ~/.cache/visual-peft-bench/data); data/README.md says what belongs where in it.
Train on the result with dataset.source=store.
"""

import os
import sys
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from data import store, tfds
from data.unpack import unpack
from data.vtab import TASKS
from peft.config import CONFIGS, catalogue, near

# Module -> package: what TFDS imports to prepare a folder and does not require by itself.
PACKAGES = {"tensorflow": "tensorflow-cpu", "importlib_resources": "importlib_resources"}
OPENCV = {"cv2": "opencv-python-headless"}
OPTIONS = {"dataset", "source", "pixels", "verify", "archive", "to", "data_root"}


def options(arguments: list[str], known: set[str]) -> dict[str, str]:
    """key=value arguments; raises ValueError naming near keys."""
    found = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ValueError(f"there is no option {argument!r}; {near(key, sorted(known))}")
        found[key] = value
    return found


def flag(given: Mapping[str, str], key: str) -> bool:
    """A true or false option; raises ValueError for anything else."""
    value = given.get(key, "false").lower()
    if value not in ("true", "false"):
        raise ValueError(f"{key} is '{given[key]}'; it is true or false.")
    return value == "true"


def number(given: Mapping[str, str], key: str, default: int, least: int = 1) -> int:
    """An option that counts something. Raises ValueError for what is no such number."""
    text = given.get(key, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{key}={text} must be a whole number from {least} on")
    return int(text)


def wants_help(arguments: list[str]) -> bool:
    return any(argument in ("-h", "--help", "help") for argument in arguments)


def root_of(given: Mapping[str, str]) -> Path:
    """data_root: the option, else $DATA_ROOT, else a folder in the user's cache."""
    default = os.environ.get("DATA_ROOT") or "~/.cache/visual-peft-bench/data"
    return Path(given.get("data_root") or default).expanduser()


def datasets(names: str | None, suites: tuple[str, ...]) -> dict[str, DictConfig]:
    """Name -> yaml of the data sets called `names`: "vtab/dtd,fgvc", or all of the suites."""
    known = [n for n in catalogue("dataset") if n.partition("/")[0] in suites]
    chosen: list[str] = []
    for name in (names or ",".join(suites)).split(","):
        some = [n for n in known if n == name or n.partition("/")[0] == name]
        if not some:
            raise ValueError(f"there is no dataset {name!r}; {near(name, [*suites, *known])}")
        chosen += [n for n in some if n not in chosen]
    return {n: OmegaConf.load(CONFIGS / "dataset" / f"{n}.yaml") for n in chosen}


def prepare_tfds(root: Path, task: str) -> None:
    """Downloads and prepares a TFDS folder, unless it is there. This is what takes TensorFlow."""
    archive = TASKS[task].archive
    try:
        tfds.find(root, archive)
        return
    except FileNotFoundError as error:
        packages = PACKAGES | (OPENCV if archive in ("kitti", "retinopathy", "sun397") else {})
        absent = [package for module, package in packages.items() if find_spec(module) is None]
        if absent:
            raise FileNotFoundError(
                f"{error} Preparing one here takes TensorFlow and what its builders import: pip "
                f"install {' '.join(absent)}."
            ) from None
    import tensorflow_datasets

    name = tfds.BUILDERS[archive][0]
    try:
        tensorflow_datasets.builder(name, data_dir=root / "tfds").download_and_prepare()
    except Exception as error:  # of requests, urllib, TensorFlow and TFDS, without a common class
        url = getattr(getattr(error, "request", None), "url", None)
        same = "a split of our own" if archive == "caltech101" else "the same images"
        what = f"{url} could not be reached" if url else f"{type(error).__name__}"
        raise OSError(
            f"{task}: TensorFlow Datasets did not prepare {name}: {what} "
            f"({' '.join(str(error).split())}). Prepare it where the download works (tfds build "
            f"{name}) and copy the folder to {root / 'tfds' / name}; or take the original archive "
            f"by other means, unpack it below {root / 'raw'}, and choose source=raw: "
            f"{same}. python -m scripts.doctor dataset=vtab/{task} names every place."
        ) from error


def export(name: str, config: DictConfig, root: Path, given: Mapping[str, str]) -> None:
    """All splits of one data set to the store; unions are not stored twice."""
    config.source = given.get("source", config.source)
    form = given.get("pixels", "png")
    if config.source == "tfds":
        prepare_tfds(root, config.name)
    for split in config.splits:
        if split in store.UNIONS:
            continue
        images = instantiate(config.reader)(split=split, data_root=root)
        folder = root / "store" / name / f"{images.manifest.source}-{form}"
        if flag(given, "verify"):
            store.verify(folder, split)
            print(f"{name} {split}: unchanged ({folder})")
            continue
        title = f"{name} {split}"
        bar = partial(tqdm, desc=title, unit=f" x {store.CHUNK}")
        written = store.export(images, folder, form, bar)
        print(f"{name} {split}: {len(images)} images {'in' if written else 'already in'} {folder}")


def main(arguments: list[str]) -> int:
    if wants_help(arguments):
        print(__doc__)
        return 0
    failed = False
    try:
        given = options(arguments, OPTIONS)
        flag(given, "verify")
        root = root_of(given)
        if "archive" in given:
            folder = root / given.get("to", "raw")
            unpack(Path(given["archive"]), folder, lambda members: tqdm(members, "unpacking"))
            print(f"unpacked into {folder}")
            return 0
        if "dataset" not in given:
            print(__doc__)
            return 2
        for name, config in datasets(given["dataset"], ("vtab", "fgvc")).items():
            try:
                export(name, config, root, given)
            except (OSError, ValueError, ImportError) as error:
                print(f"error: {error}", file=sys.stderr)
                failed = True
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
