"""Evaluates a finished run: reproduces its number, merges, exports, derives.

    python eval.py run=results/runs/mini/dsprites_location/rlrr-dinov2_s14-final-s42-1a2b3c4d
    python eval.py run=DIR merged=true export=model.safetensors   # the plain backbone, its own keys
    python eval.py run=DIR per_class=true confusion=confusion.csv
    python eval.py run=DIR experts=increment_2                    # an ALoRE without some experts
    python eval.py 'combine=[DIR_A,DIR_B]' 'weights=[0.7,0.3]'    # several RLRRs as one

The last two are runs of their own that nothing was trained for: they leave record.json (phase
derived) and adapter.safetensors beside the first run they come from, and are found again.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save
from torch import Tensor, nn

import data
import peft
from peft import checks, derive
from peft import config as configuration
from peft import record as records
from peft.labels import match_labels, votes
from peft.watch import per_class, write_confusion

TOLERANCE = 0.5  # points by which another machine's rounding may move a record's accuracy


def device_of(name: str) -> torch.device:
    """A device that is there; on CUDA, fp32 products take TF32 from here on, in training and in
    evaluation alike. Raises ValueError for a device that is not there."""
    try:
        if name == "auto":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        else:
            device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(
            f"device={name} is not here ({str(error).splitlines()[0]}); there is "
            f"{', '.join(there)}, or auto"
        ) from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def device_name(device: torch.device) -> str:
    """What records call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
    rows = label_rows(cfg, device)
    if rows:
        cfg = changed(cfg, {"backbone.head.keep": rows})
    torch.manual_seed(cfg.seed)
    model = configuration.build(
        cfg.backbone,
        cfg.method,
        num_classes=cfg.dataset.num_classes,
        weights=cfg.weights,
        image_size=cfg.image_size,
        layer_dropout=cfg.optim.layer_dropout,
        drop_path=cfg.optim.drop_path,
        head_init=cfg.optim.get("head_init", "zero"),  # records of before have none
    )
    return model.to(device)


def label_rows(cfg: DictConfig, device: torch.device) -> list[int] | None:
    """The rows of the checkpoint's own head that `backbone.head.keep=auto` stands for: the labels
    for which the network takes the training images, one a class. None where nothing asks for it.

    Without mixed precision on every device, and once a process.
    """
    head = cfg.backbone.get("head")
    if not head or head.keep != "auto":
        return None
    split = (cfg.protocol.tune if cfg.phase == "grid" else cfg.protocol.final).train_on
    parts = ("backbone", "dataset", "preset", "image_size", "weights", "data_root")
    told = [str(cfg[part]) for part in parts] + [split]
    told += [] if cfg.backbone.get("pretrained", True) else [str(cfg.seed)]
    if (key := tuple(told)) not in _rows:
        loader = loader_of(cfg, split, device, train=False)
        whole = {
            "backbone.head.keep": list(range(head.classes)),
            "dataset.num_classes": head.classes,
            "method": {"name": "linear", "placements": [], "trainable": ["head"]},
        }
        net = model_of(changed(cfg, whole), device)
        _rows[key] = match_labels(votes(net, loader.epoch(), cfg.dataset.num_classes))
    return _rows[key]


_rows: dict[tuple, list[int]] = {}


def changed(cfg: DictConfig, values: Mapping) -> DictConfig:
    """A copy with other values."""
    other = cfg.copy()
    for path, value in values.items():
        OmegaConf.update(other, path, value, merge=False, force_add=True)
    return other


def loader_of(cfg: DictConfig, split: str, device: torch.device, train: bool) -> data.Loader:
    """The batches of one split under the configuration's preset."""
    read = configuration.instantiate(cfg.dataset.reader)
    images, sizes = read(split=split, data_root=cfg.data_root), cfg.dataset.get("splits") or {}
    if len(images) != sizes.get(split, len(images)):
        raise ValueError(
            f"{cfg.dataset.name} has {len(images)} images in its split {split!r}, where "
            f"dataset.splits.{split} is {sizes[split]}"
        )
    return data.load(
        images,
        data.Preset(**configuration.plain(cfg.preset)),
        image_size=cfg.image_size,
        mean=cfg.backbone.mean,
        std=cfg.backbone.std,
        train=train,
        # without gradients, four times as many images take less memory than a step does; but the
        # batches of linear probing on cached features may be more than a network can take
        batch_size=cfg.optim.batch_size if train else min(4 * cfg.optim.batch_size, 512),
        data_seed=cfg.data_seed,
        device=device,
        workers=min(8, checks.cores()) if cfg.workers == "auto" else cfg.workers,
        drop_last=train and cfg.optim.drop_last,
        task=cfg.dataset.name,
    )


def evaluate(model: nn.Module, loader: data.Loader, autocast: torch.autocast) -> float:
    """Top-1 accuracy in percent; see `confusion`."""
    return accuracy(confusion(model, loader, autocast))


def accuracy(table: Tensor) -> float:
    """Top-1 in percent, from a confusion matrix."""
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
    head = cfg.backbone.get("head")
    if head and head.keep == "auto":  # what it stood for is known: no training image is needed
        head.keep = record["provenance"]["head_rows"]
    if saved.get("weights") and not machine.get("weights"):
        raise ValueError(
            f"this run started from a weights file ({saved['weights']}); give it again with "
            "weights=FILE"
        )
    return record, cfg


def adapter_of(run: str | Path) -> dict[str, Tensor]:
    """What a run trained. Raises FileNotFoundError for a record that is kept alone."""
    path = Path(run) / "adapter.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: of this run only the record was kept. Train it again (its "
            "configuration is in record.json) and name that folder"
        )
    return load_file(path)


def other_weights(model: nn.Module, record: dict) -> str:
    """What to say of a backbone whose weights are not those that a run started from; "" of one
    whose are."""
    here, there = peft.state.digest(model), record["provenance"]["weights_sha256"]
    if here == there:
        return ""
    name = record["provenance"]["weights"]
    return (
        f"the backbone's weights are not those that the run started from ({name}): their sha256 is "
        f"{here[:8]}.. and not {there[:8]}.."
    )


def run(cfg: DictConfig) -> float:
    """Reproduces a record's number on `split`, and merges or exports on request; or derives.
    Returns the accuracy. Raises ArithmeticError, last of all, where the number does not hold."""
    checks.check(cfg)
    if not (cfg.run or cfg.combine):
        raise ValueError(
            "say which run: python eval.py run=DIR, a folder that holds record.json and "
            "adapter.safetensors"
        )
    machine = {
        key: cfg[key]
        for key in ("device", "workers", "data_root", "weights_dir", "runs_dir", "weights")
    }
    if cfg.experts or cfg.combine:
        return derived(cfg, machine)
    record, trained = restore(cfg.run, machine)
    for path in filter(None, (cfg.export, cfg.confusion)):
        prepare(Path(path))
    if cfg.export and Path(cfg.export).suffix != ".safetensors":
        raise ValueError(f"export={cfg.export} should end in .safetensors: that is what it becomes")
    device = device_of(cfg.device)
    autocast = autocast_of(trained.precision, device)
    model = model_of(trained, device)
    if told := other_weights(model, record):
        print(f"beware: {told}")
    peft.load_adapter_state(model, adapter_of(cfg.run))
    grid = records.scored_as(record["config"]) == "grid"
    scored = trained.protocol.tune if grid else trained.protocol.final
    split, off = cfg.split or scored.score_on, 0.0
    loader = loader_of(trained, split, device, train=False)
    table = confusion(model, loader, autocast)
    top1 = accuracy(table)
    print(f"{record['method']} on {record['task']}/{split}: top-1 {top1:.2f} %")
    if cfg.per_class:
        print(per_class(table))
    if cfg.confusion:
        written = write_confusion(Path(cfg.confusion), table)
        print(f"the confusion matrix (rows: labels, columns: answers) is in {written}")
    if split == scored.score_on:
        recorded = record["metrics"].get("top1_val" if grid else "top1_last")
        off = top1 - recorded
        print(
            f"the record says {recorded:.2f} %: {f'differs by {off:+.2f}' if off else 'reproduced'}"
        )
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
            records.write(target, save({k: v.contiguous() for k, v in merged.state_dict().items()}))
            print(
                f"exported {len(merged.state_dict())} tensors to {target}"
                + (f"; gained: {', '.join(gained)}" if gained else "")
            )
    if abs(off) > TOLERANCE:
        raise ArithmeticError(
            f"the number does not hold: {top1:.2f} % where the record, of {record['device']}, says "
            f"{recorded:.2f} %. Code, data or weights are not what they were"
        )
    return top1


def prepare(path: Path) -> None:
    """Makes the folder of a file that is written in the end. Raises OSError where that will fail:
    better now than after the evaluation."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"{path} cannot be written there: {error.strerror}") from error


def derived(cfg: DictConfig, machine: dict) -> float:
    """Evaluates what follows from finished runs without training, or finds it done.

    Raises ValueError for runs that do not go together or a change that does not fit them.
    """
    asked = [k for k in ("split", "merged", "export", "per_class", "confusion") if cfg[k]]
    if asked or (cfg.combine and (cfg.run or cfg.experts)):
        raise ValueError(
            "give either run=DIR experts=... or combine=[DIR,...], and nothing else: what is "
            "derived becomes a run of its own; then python eval.py run=THAT"
            + "".join(f" {key}=.." for key in asked)
        )
    runs = [Path(run) for run in (cfg.combine or [cfg.run])]
    change: dict = {"experts": cfg.experts}
    if cfg.combine:
        weights = derive.shares(configuration.plain(cfg.weights), len(runs))
        change = {"combine": cfg.form, "weights": weights}
        machine = machine | {"weights": cfg.checkpoint}
    found = [restore(run, machine) for run in runs]
    (first, trained), sources = found[0], [record for record, _ in found]
    derive.check_alike(runs, sources)
    states = [adapter_of(run) for run in runs]
    config = records.derived(sources, change)
    if not cfg.combine:
        state = derive.keep_experts(states[0], cfg.experts)
    else:
        state = derive.combine(states, change["weights"], cfg.form)
        if cfg.form == "products":
            config["method"] = derive.widened(config["method"], len(runs))
    folder = runs[0].parent / records.folder_of(config, ".").name
    metric = "top1_val" if records.scored_as(first["config"]) == "grid" else "top1_last"
    if (folder / "record.json").is_file():
        top1 = records.read(folder / "record.json")["metrics"][metric]
        print(f"already done: {top1:.2f} % in {folder}")
        return top1

    device = device_of(cfg.device)
    autocast = autocast_of(trained.precision, device)
    trained.method = config["method"]
    model = model_of(trained, device)
    if told := other_weights(model, first):
        raise ValueError(told)
    peft.load_adapter_state(model, state)
    scored = trained.protocol.tune if metric == "top1_val" else trained.protocol.final
    loader = loader_of(trained, scored.score_on, device, train=False)
    started = time.monotonic()
    top1 = evaluate(model, loader, autocast)
    seconds = time.monotonic() - started
    told = ",".join(f"{key}={value}" for key, value in change.items())
    hashes = first["provenance"]["data_sha256"]
    hashes = {**hashes, loader.manifest.split: loader.manifest.digest}
    record = records.assemble(
        config,
        key=records.key_of(config),
        variant=",".join(filter(None, (first["variant"], told))),
        selected_from=sorted({key for source in sources for key in source["selected_from"]}),
        metrics={metric: top1},
        counts=peft.count(model),
        images=len(loader.manifest.ids),
        seconds=seconds,
        memory=torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else first["peak_memory_bytes"],
        device=device_name(device),
        provenance={**first["provenance"], "data_sha256": hashes},
    )
    record["derived_from"] = config["derived"]["of"]
    folder.mkdir(exist_ok=True)
    records.write(
        folder / "adapter.safetensors", save({k: t.contiguous() for k, t in state.items()})
    )
    records.write(folder / "record.json", records.sealed(record))
    print(f"{told} of {', '.join(run.name for run in runs)}: {top1:.2f} %, in {folder}")
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
