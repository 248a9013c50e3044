"""Evaluates a finished run: reproduces its number, merges, exports.

python eval.py run=results/runs/mini/dsprites_location/rlrr-dinov2_s14-final-s42-1a2b3c4d
python eval.py run=DIR merged=true export=model.safetensors      # the plain backbone with its own
keys, and the head
python eval.py run=DIR per_class=true confusion=confusion.csv
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import data
import peft
from peft import config as configuration
from peft import record as records
from peft.watch import per_class, write_confusion


def device_of(name: str) -> torch.device:
    """Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(
            f"device={name} is not here ({str(error).splitlines()[0]}); there is "
            f"{', '.join(there)}, or auto"
        ) from error


def autocast_of(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision on CUDA; a CPU computes in fp32, whatever the configuration says, and the
    record's provenance tells."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in types:
        raise ValueError(f"precision={precision} is none of {', '.join(types)}")
    mixed = device.type == "cuda" and precision != "fp32"
    return torch.autocast(device.type, types[precision] if mixed else torch.bfloat16, enabled=mixed)


def model_of(cfg: DictConfig, device: torch.device) -> nn.Module:
    """The model of a configuration, initialised on the CPU by `seed`, so that every device starts
    from the same numbers."""
    torch.manual_seed(cfg.seed)
    model = configuration.build(
        cfg.backbone,
        cfg.method,
        num_classes=cfg.dataset.num_classes,
        weights=cfg.weights,
        image_size=cfg.image_size,
        layer_dropout=cfg.optim.layer_dropout,
        drop_path=cfg.optim.drop_path,
    )
    return model.to(device)


def loader_of(cfg: DictConfig, split: str, device: torch.device, train: bool) -> data.Loader:
    """The batches of one split under the configuration's preset."""
    read = configuration.instantiate(cfg.dataset.reader)
    images = read(split=split, data_root=cfg.data_root)
    return data.load(
        images,
        data.Preset(**configuration.plain(cfg.preset)),
        image_size=cfg.image_size,
        mean=cfg.backbone.mean,
        std=cfg.backbone.std,
        train=train,
        # without gradients, four times as many images take less memory than a step does
        batch_size=cfg.optim.batch_size if train else 4 * cfg.optim.batch_size,
        data_seed=cfg.data_seed,
        device=device,
        workers=cfg.workers,
        drop_last=train and cfg.optim.drop_last,
        task=cfg.dataset.name,
    )


def evaluate(model: nn.Module, loader: data.Loader, autocast: torch.autocast) -> float:
    """Top-1 accuracy in percent; see `confusion`."""
    table = confusion(model, loader, autocast)
    return 100 * table.trace().item() / table.sum().item()


@torch.no_grad()
def confusion(model: nn.Module, loader: data.Loader, autocast: torch.autocast) -> Tensor:
    """How many images of each class (rows) are taken for each class (columns), in one pass, with
    the tuners folded in where they can be: that is the model one would deploy."""
    try:
        still = peft.merge(model).eval() if peft.tuners(model) else model.eval()
    except TypeError:
        still = model.eval()
    pairs, classes = [], 0
    with autocast:
        for images, labels in loader.epoch():
            logits = still(images)
            classes = logits.shape[1]
            pairs.append(labels * classes + logits.argmax(1))
    return torch.cat(pairs).bincount(minlength=classes**2).view(classes, classes).cpu()


def restore(run: str | Path, machine: Mapping) -> tuple[dict, DictConfig]:
    """The record of a run and its configuration on this machine. Raises FileNotFoundError where no
    run finished."""
    path = Path(run) / "record.json"
    if not path.is_file():
        near = (
            sorted(str(p.parent) for p in Path(run).parent.glob("*/record.json"))[:3]
            if Path(run).parent.is_dir()
            else []
        )
        raise FileNotFoundError(
            f"{path} is not there: no run finished in {run}"
            + (f"; beside it: {', '.join(near)}" if near else "")
        )
    record = records.read(path)
    saved = record["config"]
    # Sites and sources of weights are the checkout's; every number is the record's.
    here = configuration.compose(
        "train", [f"backbone={record['backbone']}", f"weights_dir={machine['weights_dir']}"]
    )
    cfg = OmegaConf.create(
        {
            **saved,
            **machine,
            "backbone": {**configuration.plain(here.backbone), **saved["backbone"]},
        }
    )
    if saved.get("weights") and not machine.get("weights"):
        raise ValueError(
            f"this run started from a weights file ({saved['weights']}); give it again with "
            "weights=FILE"
        )
    return record, cfg


def run(cfg: DictConfig) -> float:
    """Reproduces a record's number on `split`, and merges or exports on request. Returns the
    accuracy."""
    if not cfg.run:
        raise ValueError(
            "say which run: python eval.py run=DIR, a folder that holds record.json and "
            "adapter.safetensors"
        )
    machine = {
        key: cfg[key]
        for key in ("device", "workers", "data_root", "weights_dir", "runs_dir", "weights")
    }
    record, trained = restore(cfg.run, machine)
    device = device_of(cfg.device)
    autocast = autocast_of(trained.precision, device)
    model = model_of(trained, device)
    peft.load_adapter_state(model, load_file(Path(cfg.run) / "adapter.safetensors"))
    scored = trained.protocol.tune if record["phase"] == "grid" else trained.protocol.final
    split = cfg.split or scored.score_on
    loader = loader_of(trained, split, device, train=False)
    table = confusion(model, loader, autocast)
    top1 = 100 * table.trace().item() / table.sum().item()
    print(f"{record['method']} on {record['task']}/{split}: top-1 {top1:.2f} %")
    if cfg.per_class:
        print(per_class(table))
    if cfg.confusion:
        written = write_confusion(Path(cfg.confusion), table)
        print(f"the confusion matrix (rows: labels, columns: answers) is in {written}")
    if split == scored.score_on:
        recorded = record["metrics"].get("top1_val" if record["phase"] == "grid" else "top1_last")
        verdict = "reproduced" if top1 == recorded else f"differs by {top1 - recorded:+.2f}"
        print(f"the record says {recorded:.2f} %: {verdict}")
    if cfg.merged or cfg.export:
        merged = peft.merge(model).eval()
        images, _ = next(loader.epoch())
        with torch.no_grad():
            gap = (merged(images) - model.eval()(images)).abs().max().item()
        print(f"merged: the largest difference of a logit over {len(images)} images is {gap:.1e}")
        if cfg.export:
            plain = set(timm_keys(trained))
            gained = sorted(set(merged.state_dict()) - plain)
            target = Path(cfg.export)
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in merged.state_dict().items()},
                target.with_name(f".{target.name}.part"),
            )
            target.with_name(f".{target.name}.part").replace(target)
            print(
                f"exported {len(merged.state_dict())} tensors to {target}"
                + (f"; gained: {', '.join(gained)}" if gained else "")
            )
    return top1


def timm_keys(cfg: DictConfig) -> list[str]:
    """The keys of the plain backbone with its head."""
    with torch.device("meta"):
        return list(
            configuration.instantiate(cfg.backbone.model)(
                num_classes=cfg.dataset.num_classes
            ).state_dict()
        )


main = configuration.entry("eval")(run)

if __name__ == "__main__":
    main()
