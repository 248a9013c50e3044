"""Trains one run: a backbone, a dataset, a method and an optimiser under a protocol.

    python train.py method=rlrr dataset=mini/dsprites_location optim.lr=3e-3 seed=42
    python train.py -m method=lora,ssf,rlrr seed=42,44                      # Hydra's own multirun
    python train.py method=rlrr info=true                                   # what it would touch
    and train

A finished run leaves record.json, adapter.safetensors and log.csv in a folder of its own under
results/runs; the same command again finds them and stops. A run that was interrupted goes on from
its last checkpoint, to the same bits on the CPU.
"""

import gc
import math
import resource
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from safetensors.torch import save
from torch import nn

import data
import peft
from data.features import cached_features
from eval import autocast_of, device_of, evaluate, loader_of, model_of
from peft import config as configuration
from peft import record as records
from peft.checkpoint import History, Stop, resume, save_state
from peft.pack import Pack, Unstackable, why_not
from peft.watch import Progress, describe, mirror, write_log


def run(cfg: DictConfig) -> float:
    """Trains and scores one run, or finds it done. Returns its headline accuracy in percent."""
    if cfg.info:
        print(f"{cfg.method.name} on {cfg.backbone.name}, {cfg.dataset.num_classes} classes")
        print(describe(model_of(cfg, torch.device("cpu"))))
        return 0.0
    (outcome,) = run_pack([cfg])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_pack(cfgs: list[DictConfig]) -> list[float | Exception]:
    """Trains and scores runs over one frozen backbone, several at once, or finds them done.

    Returns for each its headline accuracy in percent, or the exception that ended it; each leaves
    a record of its own, or failure.json. `pack` of the first configuration says how many are
    trained at once; a pack for which the memory does not suffice is trained in halves. Raises
    ValueError for runs that cannot be stacked, naming the key that differs.
    """
    runs = [Run(cfg) for cfg in cfgs]
    reason = why_not([run.config for run in runs])
    if reason:
        raise ValueError(
            f"these {len(runs)} runs cannot be stacked: {reason}; train them one at a time"
        )
    found: dict[Path, float | Exception] = {}
    missing = {run.folder: run for run in runs if not found_done(run, found)}
    waiting = [run for run in missing.values() if prepared(run, found)]
    size = pack_size(waiting)
    for start in range(0, len(waiting), size):
        found |= attempt(waiting[start : start + size])
    return [found[run.folder] for run in runs]


@dataclass
class Run:
    """One member: its configuration, what of it makes its identity, and its folder."""

    cfg: DictConfig

    def __post_init__(self) -> None:
        self.config = records.portable(configuration.plain(self.cfg))
        self.key = records.key_of(self.config)
        self.folder = records.folder_of(self.config, self.cfg.runs_dir)


def found_done(run: Run, found: dict) -> bool:
    path = run.folder / "record.json"
    if run.cfg.force or not path.is_file():
        return False
    found[run.folder] = headline(records.read(path))
    print(
        f"already done: {found[run.folder]:.2f} % in {run.folder} (force=true trains it again)"
    )
    return True


def prepared(run: Run, found: dict) -> bool:
    """Whether there is a folder to write to; otherwise the reason is in `found`."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        records.write(run.folder / ".writable", "")
        (run.folder / ".writable").unlink()
    except OSError as error:
        found[run.folder] = OSError(
            f"cannot write to {run.folder}: {error.strerror}. Make it writable, or give "
            "runs_dir=FOLDER"
        )
        found[run.folder].__cause__ = error
        return False
    if run.cfg.force:
        shutil.rmtree(run.folder)
        run.folder.mkdir()
    return True


def pack_size(runs: list[Run]) -> int:
    """How many of these runs are trained at once."""
    asked = runs[0].cfg.pack if runs else 1
    return max(1, len(runs)) if asked == "all" else int(asked)


def attempt(runs: list[Run]) -> dict[Path, float | Exception]:
    """Trains one pack and leaves records and failures."""
    try:
        outcomes = train(runs)
    except Exception as error:
        small = isinstance(error, (torch.OutOfMemoryError, Unstackable)) and len(runs) > 1
        if not small:
            return {run.folder: failed(run, error) for run in runs}
        said, half = str(error).splitlines()[0], len(runs) // 2
        half = half if isinstance(error, torch.OutOfMemoryError) else 1
        print(f"a pack of {len(runs)} does not work ({said}): going on with {half} at a time")
    else:
        return {run.folder: finished(run, out) for run, out in zip(runs, outcomes, strict=True)}
    gc.collect()  # the exception held the tensors of the pack that did not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found = {}
    for start in range(0, len(runs), half):
        found |= attempt(runs[start : start + half])
    return found


def failed(run: Run, error: Exception) -> Exception:
    reason = {
        "status": "failed",
        "reason": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "config": run.config,
    }
    try:
        records.write(run.folder / "failure.json", reason)
    except OSError as other:
        print(f"and {run.folder / 'failure.json'} could not be written: {other}")
    return error


def finished(run: Run, outcome: dict | Exception) -> float | Exception:
    if isinstance(outcome, Exception):
        return failed(run, outcome)
    try:
        records.write(run.folder / "record.json", outcome)
    except OSError as error:
        return failed(run, error)
    for leftover in ("state.pt", "failure.json"):
        (run.folder / leftover).unlink(missing_ok=True)
    print(
        f"{outcome['method']} on {outcome['task']}: {headline(outcome):.2f} % "
        f"({outcome['selection']}), in {run.folder}"
    )
    return headline(outcome)


def headline(record: dict) -> float:
    metrics = record["metrics"]
    return metrics.get("top1_best", metrics.get("top1_last", metrics.get("top1_val")))


def train(runs: list[Run]) -> list[dict | Exception]:
    """The runs themselves: build, attach, fit, evaluate; returns for each its record, or what ended
    it alone."""
    cfg = runs[0].cfg
    device = device_of(cfg.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    autocast = autocast_of(cfg.precision, device)
    splits = cfg.protocol.tune if cfg.phase == "grid" else cfg.protocol.final
    loader = loader_of(cfg, splits.train_on, device, train=True)
    scored = loader_of(cfg, splits.score_on, device, train=False)
    model = model_of(cfg, device)
    weights_sha256, counts = peft.core.digest(model), peft.count(model)
    peeks = cfg.phase == "final" and cfg.protocol.selection == "best_on_test"
    starts = {}
    for seed in dict.fromkeys(run.cfg.seed for run in runs):
        other = model if seed == cfg.seed else model_of(configured(cfg, seed), device)
        starts[seed] = {name: t.clone() for name, t in peft.adapter_state(other).items()}

    net, batches, scoring = cached_features(model, loader, scored, autocast)
    net.train()
    pack = Pack(
        model,
        net,
        [starts[run.cfg.seed] for run in runs],
        spared(cfg.optim.no_decay),
        same_draws=len(starts) == 1,
    )
    history = fit(pack, batches, scoring if peeks else None, runs, autocast)

    results: list[dict | Exception] = []
    for k, run in enumerate(runs):
        if k in history.failed:
            results.append(FloatingPointError(history.failed[k]))
            continue
        pack.show(k)
        accuracy, log = evaluate(net, scoring, autocast), history.logs[k]
        state = {
            name: tensor.cpu().contiguous().clone()
            for name, tensor in peft.adapter_state(model).items()
        }
        records.write(run.folder / "adapter.safetensors", save(state))
        write_log(run.folder, log)
        metrics = {
            "top1_val" if cfg.phase == "grid" else "top1_last": accuracy,
            "loss_last": log[-1]["loss"],
        }
        if peeks:
            metrics["top1_best"] = max(row["top1"] for row in log)
        used = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        default = configuration.plain(
            configuration.compose("train", [f"method={cfg.method.name}"]).method
        )
        seconds = history.seconds / len(runs)  # its share of the pack's
        results.append(
            {
                "key": run.key,
                "phase": cfg.phase,
                "config": run.config,
                "suite": cfg.dataset.suite,
                "task": cfg.dataset.name,
                "group": cfg.dataset.group,
                "backbone": cfg.backbone.name,
                "method": cfg.method.name,
                "variant": records.variant_of(run.config["method"], default),
                "seed": run.cfg.seed,
                "protocol": cfg.protocol.name,
                "selection": cfg.protocol.selection,
                "trained_on": splits.train_on,
                "selected_from": configuration.plain(run.cfg.selected_from),
                "metrics": metrics,
                "tuned_params": counts["tuned"],
                "head_params": counts["head"],
                "seconds": round(seconds, 3),
                "images_per_second": round(
                    sum(row["images"] for row in log) / max(seconds, 1e-9), 2
                ),
                "peak_memory_bytes": used,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "provenance": records.environment()
                | {
                    "weights": weights_name(cfg),
                    "weights_sha256": weights_sha256,
                    "data_sha256": {
                        split.manifest.split: split.manifest.digest for split in (loader, scored)
                    },
                    "source": loader.manifest.source,
                    "pixels": loader.manifest.pixels,
                    "kernel": loader.view.kernel,
                    "mean": list(loader.mean),
                    "std": list(loader.std),
                    "precision": cfg.precision if autocast._enabled else "fp32",
                    "pack": len(runs),
                },
            }
        )
    return results


def configured(cfg: DictConfig, seed: int) -> DictConfig:
    other = cfg.copy()
    other.seed = seed
    return other


def weights_name(cfg: DictConfig) -> str:
    if cfg.weights:
        return Path(cfg.weights).name
    return (
        cfg.backbone.model.get("model_name", cfg.backbone.name)
        if cfg.backbone.get("pretrained", True)
        else "random"
    )


def fit(
    pack: Pack,
    batches: data.Loader,
    peek: data.Loader | None,
    runs: list[Run],
    autocast: torch.autocast,
) -> History:
    """The loop, over one run or a pack of them.

    Raises FloatingPointError when the loss of all members is not a number, KeyboardInterrupt at
    SIGINT or SIGTERM after writing a checkpoint.
    """
    cfg, device = runs[0].cfg, batches.device
    optim, optims = cfg.optim, [run.cfg.optim for run in runs]
    per_epoch = len(batches)
    total = length(optim, per_epoch)
    torch.manual_seed(cfg.seed + 1)  # dropout, apart from initialisation
    optimizer = make_optimizer(pack, optims)
    scaler = torch.amp.GradScaler(
        device.type, enabled=autocast._enabled and cfg.precision == "fp16"
    )
    sums = torch.zeros(len(runs), 3, dtype=torch.double, device=device)
    history = History(0, 0.0, [[] for _ in runs], sums)
    state, keys = runs[0].folder / "state.pt", [run.key for run in runs]
    resume(state, keys, pack, optimizer, scaler, history, device)
    mirrors = [mirror(cfg.logger, run.config, run.folder) for run in runs]
    stop = Stop()
    started, saved = time.monotonic() - history.seconds, time.monotonic()

    def pause() -> None:
        """Writes a checkpoint when it is time or a signal came; the latter then ends the run."""
        nonlocal saved
        if stop.asked or time.monotonic() - saved > cfg.checkpoint_seconds:
            history.seconds = time.monotonic() - started
            save_state(state, keys, pack, optimizer, scaler, history, device)
            saved = time.monotonic()
        if stop.asked:
            raise KeyboardInterrupt

    title = f"{cfg.method.name} {cfg.dataset.name}" + (f" x {len(runs)}" if len(runs) > 1 else "")
    progress = Progress(title, total, history.step, batches.batch_size)
    with stop, progress:
        while history.step < total:
            pack.net.train()
            epoch, start = divmod(history.step, per_epoch)
            for images, labels in batches.epoch(epoch, start):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(history.step, per_epoch, optims[group["member"]])
                with autocast:
                    logits, penalties = pack(images)  # (K, B, classes), (K,)
                    losses = penalties + F.cross_entropy(
                        logits.flatten(0, 1),
                        labels.repeat(len(logits)),
                        label_smoothing=optim.label_smoothing,
                        reduction="none",
                    ).view(len(logits), -1).mean(1)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(losses.sum()).backward()
                scaler.unscale_(optimizer)
                for k in pack.members:
                    if optims[k].clip_norm:
                        nn.utils.clip_grad_norm_(pack.trained(k), optims[k].clip_norm)
                scaler.step(optimizer)
                scaler.update()
                right = (logits.argmax(2) == labels).sum(1)
                seen = torch.full_like(right, len(labels))
                news = torch.stack([losses.detach() * len(labels), right, seen], 1)
                history.sums += news.double()
                history.step += 1
                progress.step(history.sums)
                if history.step == total:
                    break
                if history.step % per_epoch:
                    pause()
            for k, (loss_sum, right_sum, seen) in zip(
                list(pack.members), history.sums.tolist(), strict=True
            ):
                if not math.isfinite(loss_sum):
                    history.failed[k] = (
                        f"the loss is {loss_sum / seen} in epoch {epoch + 1} with "
                        f"optim.lr={optims[k].lr:.2g}: try a smaller one, or optim.clip_norm=1"
                    )
                    if len(pack.members) == 1:
                        raise FloatingPointError(history.failed[k])
                    pack.drop(k, optimizer)  # its neighbours go on
                    continue
                row = {
                    "epoch": epoch + 1,
                    "loss": loss_sum / seen,
                    "top1_train": 100 * right_sum / seen,
                    "lr": learning_rate(history.step - 1, per_epoch, optims[k]),
                    "images": int(seen),
                }
                if peek is not None:
                    pack.show(k)
                    row["top1"] = evaluate(pack.net, peek, autocast)
                history.logs[k].append(row)
                write_log(runs[k].folder, history.logs[k])
                mirrors[k](row)
                progress.epoch(row, math.ceil(total / per_epoch))
            history.sums = torch.zeros_like(history.sums[: len(pack.members)])
            # after the last batch of an epoch only here: a checkpoint must hold the row, too
            pause()
    history.seconds = time.monotonic() - started
    return history


def length(optim: DictConfig, per_epoch: int) -> int:
    """Optimiser steps of a run: `optim.steps`, or else those of its epochs."""
    return int(optim.steps or int(optim.epochs) * per_epoch)


def learning_rate(step: int, per_epoch: int, optim: DictConfig) -> float:
    """Linear warm-up from 0, then a cosine to `min_lr` at the last step; a pure function of the
    step."""
    total, warmup = length(optim, per_epoch), optim.warmup_epochs * per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def spared(rule: str) -> Callable[[str, torch.Tensor], bool]:
    """What is spared weight decay, as a question about a parameter and its name."""
    rules = {
        "one_dim": lambda name, p: p.dim() < 2,
        "names": lambda name, p: "bias" in name or "norm" in name,
        "none": lambda name, p: False,
    }
    if rule not in rules:
        raise ValueError(f"optim.no_decay={rule} is none of {', '.join(rules)}")
    return rules[rule]


def make_optimizer(pack: Pack, optims: list[DictConfig]) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups a member, with and without weight decay."""
    optim = optims[0]
    groups = [
        {"params": leaves, "member": k, "lr": optims[k].lr, "weight_decay": decay}
        for k in pack.members
        for leaves, decay in zip(pack.leaves[k], (optims[k].weight_decay, 0.0), strict=True)
        if leaves
    ]
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=tuple(optim.betas), fused=True)
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=optim.momentum, fused=True)
    raise ValueError(f"optim.optimizer={optim.optimizer} is neither adamw nor sgd")


main = configuration.entry("train")(run)

if __name__ == "__main__":
    main()
