"""What data and weights are here, what is missing or wrong, and how to get it.

    python -m scripts.doctor                                   one line for each data set
    python -m scripts.doctor dataset=vtab/svhn                 every source of it, with its paths
    python -m scripts.doctor dataset=vtab source=raw deep=true decodes every image

Counts, label ranges and digests are checked by the readers themselves, so what is found here can be
trained on. Without deep=true a few images of each split are decoded. Exit status 1 if a data set
that was asked for cannot be used, or if anything that is here is wrong. data_root=DIR is where data
lies (default $DATA_ROOT, else ~/.cache/visual-peft-bench/data); data/README.md shows the layouts.
"""

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from data import Images, archives, cifar, fgvc, store, tfds, vtab
from peft import config as configuration
from scripts.fetch_weights import weights_folder
from scripts.prepare import datasets, flag, options, root_of, wants_help

SOURCES = {
    "mini": ("mini",),
    "vtab": ("folder", "raw", "tfds", "store"),
    "fgvc": ("json", "official", "store"),
    "cifar": ("raw",),
}
READER = "reader"  # of a suite that somebody added: what its yaml names is all there is


@dataclass(frozen=True)
class Finding:
    """What is known of one source of a data set. state: found, missing or wrong."""

    source: str
    state: str
    text: str


def place(root: Path, suite: str, task: str, source: str) -> Path:
    """Where a source lies. Raises FileNotFoundError, saying where it belongs, if it is not
    there.
    """
    finders: dict[str, Callable[[], Path]] = {
        "folder": lambda: vtab.find_folder(root, task),
        "raw": lambda: archives.find(root / "raw", vtab.TASKS[task].archive),
        "tfds": lambda: tfds.find(root, vtab.TASKS[task].archive),
        "json": lambda: fgvc.find(root, task, "train.json"),
        "official": lambda: fgvc.find(root, task, fgvc.SETS[task].proof),
    }
    if source == READER:
        return root / task
    if source == "mini":
        return root / "mini"  # made when first read
    if suite == "cifar":
        return cifar.find(root / "raw", task)
    if source.partition("/")[0] == "store":
        return store.find(root, suite, task, source.partition("/")[2])
    return finders[source]()


def unreadable(images: Images, deep: bool) -> list[str]:
    """Errors of the images that cannot be decoded: of all, or of eight spread over the split."""

    def check(i: int) -> str | None:
        try:
            images.image(int(i))
        except (OSError, ValueError) as error:
            return str(error)
        return None

    rows: Iterable = range(len(images))
    if deep:
        rows = tqdm(rows, f"{images.manifest.dataset} {images.manifest.split}", leave=False)
    else:
        rows = np.unique(np.linspace(0, len(images) - 1, 8).astype(int))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [error for error in pool.map(check, rows) if error]


def examine(name: str, config: DictConfig, root: Path, source: str, deep: bool) -> Finding:
    """Reads every split of one source of the data set that configs/dataset has as `name`."""
    try:
        folder = place(root, config.suite, config.name, source)
    except FileNotFoundError as error:
        return Finding(source, "missing", str(error))
    except ValueError as error:
        return Finding(source, "wrong", str(error))
    splits = config.get("splits")
    if source != READER:
        config.source = source
    elif not splits:
        protocol = configuration.compose("train", [f"dataset={name}"]).protocol
        splits = dict.fromkeys(
            part for use in (protocol.tune, protocol.final) for part in use.values()
        )
    counts = []
    for split in splits:
        try:
            images = instantiate(config.reader)(split=split, data_root=root)
            if errors := unreadable(images, deep):
                more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
                return Finding(source, "wrong", f"{split}: {errors[0]}{more}")
            if deep and source.partition("/")[0] == "store" and split not in store.UNIONS:
                store.verify(folder, split)
        except (OSError, ValueError, ImportError) as error:
            absent = source == READER and isinstance(error, FileNotFoundError)
            return Finding(source, "missing" if absent else "wrong", f"{split}: {error}")
        manifest = images.manifest
        counts.append(f"{split} {len(images):,} {manifest.digest[:8]}")
    return Finding(source, "found", f"{folder} ({manifest.pixels}): {', '.join(counts)}")


def report(findings: dict[str, list[Finding]], details: bool) -> list[str]:
    """The table: one line for each data set, or for each of its sources."""
    lines = []
    for name, found in findings.items():
        if details:
            lines += [f"{name:28} {f.source:9} {f.state:8} {f.text}" for f in found]
            continue
        usable = [f.source for f in found if f.state == "found"]
        lines += [f"{name:28} {f.source:9} wrong    {f.text}" for f in found if f.state == "wrong"]
        if usable:
            lines.append(f"{name:28} {'found':18} {', '.join(usable)}")
        elif all(f.state == "missing" for f in found):
            texts = dict.fromkeys(f.text for f in found[:2])  # ready-made, and the makers' own
            lines.append(f"{name:28} {'missing':18} {' Or: '.join(texts)}")
    return lines


def weights() -> list[str]:
    """Where the weights of every backbone come from, and whether files that belong here are."""
    lines, folder = [], weights_folder()
    for path in sorted((configuration.CONFIGS / "backbone").glob("[!_]*.yaml")):
        choice = [f"backbone={path.stem}", f"weights_dir={folder}"]
        backbone = configuration.compose("train", choice).backbone
        file, original = backbone.get("weights"), backbone.get("original")
        told = f"to be had at {original}"
        if isinstance(file, DictConfig):
            file = folder / f"{path.stem}.safetensors"
            told = f"run python -m scripts.fetch_weights {path.stem}"
        if file and Path(file).is_file():
            state, text = "found", f"{file} ({Path(file).stat().st_size / 1e6:.0f} MB)"
        elif file:
            state, text = "missing", f"{file}, {told}"
        elif original:
            text = f"{backbone.model.model_name}; or weights=FILE of {original}"
            state = "timm's hub"
        else:
            continue  # a tiny one, for tests
        lines.append(f"{path.stem:28} {state:18} {text}")
    return lines


def main(arguments: list[str]) -> int:
    if wants_help(arguments):
        print(__doc__)
        return 0
    try:
        given = options(arguments, {"dataset", "source", "deep", "data_root"})
        root, deep = root_of(given), flag(given, "deep")
        findings = {}
        everyone = configuration.catalogue("dataset")
        suites = dict.fromkeys([*SOURCES, *(n.partition("/")[0] for n in everyone if "/" in n)])
        for name, config in datasets(given.get("dataset"), tuple(suites)).items():
            known = SOURCES.get(config.suite, (READER,))
            sources = (given["source"],) if "source" in given else known
            if sources[0].partition("/")[0] not in known:
                raise ValueError(
                    f"{name} has no source '{given['source']}'; there are {', '.join(known)}."
                )
            findings[name] = [examine(name, config, root, source, deep) for source in sources]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"data_root {root}")
    print("\n".join(report(findings, details="dataset" in given)))
    if "dataset" not in given:
        print(f"\nweights_dir {weights_folder()}")
        print("\n".join(weights()))
    unusable = [n for n, found in findings.items() if all(f.state != "found" for f in found)]
    wrong = any(f.state == "wrong" for found in findings.values() for f in found)
    return int(wrong or ("dataset" in given and bool(unusable)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
