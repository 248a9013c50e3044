"""What a run leaves behind: its identity, its folder, its record.

A record is written once, atomically, and never edited; everything that a table shows comes from
records. `key` is the sha256 of the canonical JSON of the run's identity: what could change the
numbers, never where or with what it was watched.
"""

import copy
import errno
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

# Keys that came into the configuration after the first records, with the default under which
# nothing changed: they enter the identity only when they differ from it, so that older records are
# still found.
ADDED_LATER: dict[str, object] = {
    "optim.steps": None,
    "optim.lr_base_size": None,
    "optim.restart_epochs": None,
    "optim.restart_factor": 1,
    "optim.mixup": 0.0,
    "optim.cutmix": 0.0,
    "optim.ema": None,
    "optim.accumulate": 1,
    "optim.schedule": "step",
    "optim.warmup_lr": 1e-6,
    "optim.head_init": "zero",
    "protocol.peek_every": 1,
    "derived": None,
}

MACHINE = {
    "device",
    "workers",
    "pack",
    "compile",
    "grad_checkpointing",
    "checkpoint_seconds",
    "info",
    "force",
    "runs_dir",
    "data_root",
    "weights_dir",
    "logger",
    "selected_from",
}
FIELDS = [
    "key",
    "phase",
    "config",
    "suite",
    "task",
    "group",
    "backbone",
    "method",
    "variant",
    "seed",
    "protocol",
    "selection",
    "trained_on",
    "selected_from",
    "metrics",
    "tuned_params",
    "head_params",
    "seconds",
    "images_per_second",
    "peak_memory_bytes",
    "device",
    "provenance",
]


def assemble(
    config: Mapping,
    *,
    key: str,
    variant: str,
    selected_from: list[str],
    metrics: Mapping[str, float],
    counts: Mapping[str, int],
    images: int,
    seconds: float,
    memory: int,
    device: str,
    provenance: Mapping,
) -> dict:
    """The record of a run from its portable configuration and what came of it: `images` trained on
    in `seconds`, with at most `memory` bytes."""
    dataset, protocol = config["dataset"], config["protocol"]
    splits = protocol["tune" if scored_as(config) == "grid" else "final"]
    return {
        "key": key,
        "phase": config["phase"],
        "config": config,
        "suite": dataset["suite"],
        "task": dataset["name"],
        "group": dataset.get("group"),
        "backbone": config["backbone"]["name"],
        "method": config["method"]["name"],
        "variant": variant,
        "seed": config["seed"],
        "protocol": protocol["name"],
        "selection": protocol["selection"],
        "trained_on": splits["train_on"],
        "selected_from": selected_from,
        "metrics": dict(metrics),
        "tuned_params": counts["tuned"],
        "head_params": counts["head"],
        "seconds": round(seconds, 3),
        "images_per_second": round(images / max(seconds, 1e-9), 2),
        "peak_memory_bytes": memory,
        "device": device,
        "provenance": {**provenance, **environment()},
    }


def portable(config: Mapping) -> dict:
    """A resolved configuration without what belongs to this machine, only the placements of the
    backbone's family, and `weights` as the digest of the file: enough to run the same elsewhere."""
    config = {key: value for key, value in config.items() if key not in MACHINE}
    if config.get("weights"):
        path = Path(config["weights"])
        if not path.is_file():
            raise FileNotFoundError(
                f"weights={path} is not there: name a checkpoint in its original format (.npz, "
                ".pth, .pth.tar or .safetensors)"
            )
        config["weights"] = f"sha256:{_digest(path, path.stat().st_mtime_ns)}"
    backbone, method = config["backbone"], config["method"]
    loading = {"weights", "original", "unused", "fresh", "accepts", "smallest", "patch", "sites"}
    config["backbone"] = {k: v for k, v in backbone.items() if k not in loading}
    placements = method["placements"]
    if isinstance(placements, Mapping):
        placements = placements.get(backbone["family"])
    config["method"] = hyperparameters(method) | {
        "name": method["name"],
        "placements": placements,
        "trainable": method["trainable"],
    }
    return config


@functools.lru_cache
def _digest(path: Path, mtime_ns: int) -> str:
    """Of a file, read once per process and version of the file: a sweep asks often."""
    return sha256(path)


def sha256(path: Path) -> str:
    """The digest of a file, which need not fit into memory."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            sha.update(block)
    return sha.hexdigest()


def hyperparameters(method: Mapping) -> dict:
    """The values a method's yaml sets at its top level. Mappings there are parts that placements
    refer to, and some keys only describe."""
    describing = {"name", "paper", "formula", "excludes", "no_gradient", "no_merge"}

    def simple(value: object) -> bool:
        parts = value if isinstance(value, list) else [value]
        return not any(isinstance(part, Mapping) for part in parts)

    named = {key: value for key, value in method.items() if key not in {*describing, "placements"}}
    return {key: value for key, value in named.items() if simple(value)}


def identity(config: Mapping) -> dict:
    """What a run is, from its portable configuration."""
    kept = {
        key: config[key]
        for key in (
            "phase",
            "seed",
            "data_seed",
            "image_size",
            "precision",
            "weights",
            "preset",
            "optim",
            "backbone",
            "method",
        )
    }
    kept["dataset"] = {
        key: value for key, value in config["dataset"].items() if key not in {"title", "group"}
    }
    kept["protocol"] = {key: value for key, value in config["protocol"].items() if key != "seeds"}
    kept["derived"] = config.get("derived")
    for path, default in ADDED_LATER.items():
        kept = _without(kept, path.split("."), default)
    return kept


def _without(node: Mapping, path: list[str], default: object) -> Mapping:
    """`node` without what is at `path`, where that is the default; `node` itself stays as it is."""
    head, *rest = path
    if not rest:
        return {k: v for k, v in node.items() if k != head or v != default}
    return {**node, head: _without(node[head], rest, default)} if head in node else node


def flat(value: object, path: str = "") -> dict[str, object]:
    """Leaves of nested mappings by their dotted paths; plain lists are leaves."""
    if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, object] = {}
    for key, part in value.items():
        found |= flat(part, f"{path}.{key}" if path else str(key))
    return found


def derived(sources: list[Mapping], change: Mapping) -> dict:
    """The configuration of what follows from finished runs without training: that of the first of
    their records, and under `derived` the `change`, whose runs (`of`) and which phase they were."""
    of = {"of": [source["key"] for source in sources], "phase": scored_as(sources[0]["config"])}
    return copy.deepcopy(sources[0]["config"]) | {"phase": "derived", "derived": {**change, **of}}


def scored_as(config: Mapping) -> str:
    """grid or final: on which split a run is scored. What is derived is scored as its runs."""
    return (config.get("derived") or config)["phase"]


def key_of(config: Mapping) -> str:
    text = json.dumps(identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def folder_of(config: Mapping, runs_dir: str | Path, key: str | None = None) -> Path:
    """Where a run leaves its files: no `=` and no `,`, which Hydra's command line would trip over.
    `key` is the run's own, where it is known already."""
    dataset, key = config["dataset"], key or key_of(config)
    names = config["method"]["name"], config["backbone"]["name"], config["phase"]
    run = "-".join([*names, f"s{config['seed']}", key[:8]])
    return Path(runs_dir) / dataset["suite"] / dataset["name"] / run


def write(path: Path, content: Mapping | str | bytes | memoryview) -> None:
    """Replaces a file in one step; what was there stays if anything fails."""
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if isinstance(content, str):
        content = content.encode()
    descriptor, temporary = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = OSError(
            f"the disk of {path} is full: make room, and the same command goes on from the last "
            "checkpoint"
        )
        problem.errno = error.errno
        raise problem from error


def sealed(record: Mapping) -> dict:
    """A record with the digest of all that it says, by which `read` knows one that was edited."""
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True, separators=(",", ":"))
    return {**record, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read(path: Path) -> dict:
    """A record. Raises ValueError naming the file for one that was cut off, edited, or lacks a
    field."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is no record: {error}. It was cut off or edited; delete it and run that cell "
            "again"
        ) from error
    seal = record.pop("seal", None) if isinstance(record, dict) else None
    missing = [field for field in FIELDS if not isinstance(record, dict) or field not in record]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: not a record of this suite, or edited; delete it "
            "and run that cell again"
        )
    try:
        key = key_of(record["config"])
    except (KeyError, TypeError, AttributeError):
        key = None  # half a configuration
    if record["key"] != key:
        raise ValueError(
            f"{path} was edited: its key is not that of its configuration; delete it and run that "
            "cell again"
        )
    figures = (int, float)
    bad = [
        name
        for name, value in dict(record["metrics"]).items()
        if not isinstance(value, figures) or not math.isfinite(value)
    ]
    if bad:
        raise ValueError(
            f"{path} holds {', '.join(bad)} that are no numbers; delete it and run that cell again"
        )
    if seal is not None and seal != sealed(record)["seal"]:
        raise ValueError(
            f"{path} was edited: it is not what its run wrote; delete it and run that cell again"
        )
    return record


def variant_of(method: Mapping, default: Mapping) -> str:
    """The hyper-parameters of a method that differ from its yaml, as `alpha=8,rank=4`."""
    ours, theirs = hyperparameters(method), hyperparameters(default)
    return ",".join(f"{key}={ours[key]}" for key in sorted(ours) if ours[key] != theirs.get(key))


def environment() -> dict:
    """Versions and the state of the checkout."""

    def git(*arguments: str) -> str | None:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        return found.stdout.strip() if found.returncode == 0 else None

    # files that git does not know count where they can be part of a run; :/ is the checkout's root
    parts = ("configs", "data", "peft", "eval.py", "sweep.py", "train.py")
    status = git("status", "--porcelain", "--", *(f":/{part}" for part in parts))
    packages = ("torch", "torchvision", "timm", "hydra-core", "numpy", "pillow")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
    }
