"""Whether what the runs of a sweep read is here, asked before any of them starts.

A sweep of thousands of runs must not find out in each of them that a dataset or a checkpoint is
missing. Weights of a hub are fetched while asking, once, and then lie in its cache for every run.
"""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from peft import config as configuration


def check(configs: Iterable[DictConfig]) -> None:
    """Raises FileNotFoundError with everything that is not here, each in its reader's words."""
    seen, missing = set(), {}
    for cfg in configs:
        splits = {*cfg.protocol.tune.values(), *cfg.protocol.final.values()}
        names = [("dataset", cfg.dataset.name, split) for split in sorted(splits)]
        names = [] if cfg.dataset.suite == "fake" else names
        for kind, name, split in [*names, ("weights", cfg.backbone.name, cfg.weights)]:
            if (kind, name, split) in seen or (kind, name) in missing:
                continue
            seen.add((kind, name, split))
            try:
                if kind == "dataset":
                    read = configuration.instantiate(cfg.dataset.reader)
                    read(split=split, data_root=cfg.data_root)
                else:
                    weights(cfg)
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                missing[kind, name] = str(error)
    if missing:
        text = "\n  ".join(missing.values())
        if any(kind == "dataset" for kind, _ in missing):
            text += "\n  python -m scripts.doctor says what is here and where the rest belongs"
        raise FileNotFoundError(f"nothing was run, because of what is not here:\n  {text}")


def weights(cfg: DictConfig) -> None:
    """Raises what a run would raise for the weights of its backbone."""
    own = cfg.backbone.weights
    if cfg.weights is not None:
        return  # a file that its runs are named by: it was read to name them
    if isinstance(own, str) and not Path(own).is_file():
        raise FileNotFoundError(f"{cfg.backbone.name}: no weights at {own}; give weights=FILE")
    if isinstance(own, DictConfig):
        configuration.instantiate(own)
    elif own is None and cfg.backbone.get("pretrained", True):
        classes, size = cfg.dataset.num_classes, cfg.image_size
        configuration.build(cfg.backbone, cfg.method, num_classes=classes, image_size=size)
