"""Trains one run: a backbone, a dataset, a method and an optimiser under a protocol.

    python train.py method=rlrr dataset=mini/dsprites_location optim.lr=3e-3 seed=42
    python train.py -m method=lora,ssf,rlrr seed=42,44                      # Hydra's own multirun
    python train.py method=rlrr info=true                   # what it would touch and train
    torchrun --nproc-per-node 2 train.py backbone=vit_l16_in21k dataset=vtab/pets   # several GPUs

A finished run leaves record.json, adapter.safetensors and log.csv in a folder of its own under
results/runs; the same command again finds them and stops. A run that was interrupted goes on from
its last checkpoint, to the same bits on the CPU.
"""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import save
from torch import nn

import data
import peft
from data.features import cached_features
from data.mixing import Mix, mixing
from eval import (
    autocast_of,
    changed,
    device_name,
    device_of,
    evaluate,
    label_rows,
    loader_of,
    model_of,
)
from peft import config as configuration
from peft import parallel
from peft import record as records
from peft.checkpoint import History, Stop, resume, save_state
from peft.member import Run, weights_name
from peft.memory import checkpointed, out_of_memory, peak_memory, with_advice
from peft.optimiser import learning_rate, length, make_optimizer, spared
from peft.pack import Pack, Unstackable, entropies, numbers_of, why_not
from peft.speed import compiled, fastest_pack
from peft.watch import Progress, describe, mirror, write_log


def run(cfg: DictConfig) -> float:
    """Trains and scores one run, or finds it done. Returns its headline accuracy in percent."""
    if cfg.info:
        Run(cfg)  # refuses what no run can mean
        print(f"{cfg.method.name} on {cfg.backbone.name}, {cfg.dataset.num_classes} classes")
        bare = {"backbone.pretrained": False, "backbone.head": None, "weights": None}
        model = model_of(changed(cfg, bare), torch.device("cpu"))  # needs no checkpoint
        print(describe(model), flush=True)
        with torch.no_grad():  # what starts at zero is no longer zero in a checkpoint
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        peft.state.check_reached(model, cfg.image_size, cfg.method.get("no_gradient") or ())
        return 0.0
    (outcome,) = run_pack([cfg])
    parallel.leave()
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
    device = parallel.join(device_of(cfgs[0].device))
    found: dict[Path, float | Exception] = {}
    waiting = {}
    for one in runs:
        if (top1 := one.done()) is not None:
            found[one.folder] = top1
        elif one.folder not in waiting:
            problem = one.prepare()
            if any(parallel.agreed([problem is not None])):
                found[one.folder] = problem or OSError("the first process cannot write")
            else:
                waiting[one.folder] = one
    parallel.wait()
    missing = list(waiting.values())
    size = pack_size(missing, device)
    for start in range(0, len(missing), size):
        found |= attempt(missing[start : start + size], device)
    parallel.wait()
    return [found[one.folder] for one in runs]


def pack_size(runs: list[Run], device: torch.device) -> int:
    """How many of these runs are trained at once."""
    if len(runs) < 2 or parallel.world() > 1 or runs[0].cfg.grad_checkpointing:
        return 1
    asked = runs[0].cfg.pack
    if asked != "auto":
        return len(runs) if asked == "all" else int(asked)
    if device.type == "cpu":
        return 1  # measured: stacking saves launches, of which a CPU has none
    cfg = runs[0].cfg
    images = -(-cfg.optim.batch_size // cfg.optim.accumulate)
    batch = torch.Size([images, 3, cfg.image_size, cfg.image_size])
    model, autocast = model_of(cfg, device), autocast_of(cfg.precision, device)
    size = fastest_pack(model, batch, autocast, len(runs))
    torch.cuda.empty_cache()
    print(f"{size} of {len(runs)} runs train at once: more were not faster, or did not fit")
    return size


def attempt(runs: list[Run], device: torch.device) -> dict[Path, float | Exception]:
    """Trains one pack and leaves records and failures."""
    try:
        outcomes = train(runs, device)
    except Exception as error:
        full, said = out_of_memory(error), str(error).partition("\n")[0]
        graphs = runs[0].cfg.compile and device.type == "cuda" and parallel.world() == 1
        if len(runs) > 1 and (full or isinstance(error, Unstackable)):
            size = len(runs) // 2 if full else 1
            how = f"with {size} at a time"
        elif full and graphs:  # these keep memory of their own
            size, how, runs[0].cfg.compile = 1, "without compiling", False
        else:
            failures = {one.folder: one.fail(with_advice(error)) for one in runs}
            parallel.leave()  # the other processes must not wait for this one
            return failures
        print(f"a pack of {len(runs)} does not work ({said}): going on {how}")
    else:
        return {one.folder: one.finish(out) for one, out in zip(runs, outcomes, strict=True)}
    gc.collect()  # the exception held the tensors of the pack that did not fit
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found = {}
    for start in range(0, len(runs), size):
        found |= attempt(runs[start : start + size], device)
    return found


def train(runs: list[Run], device: torch.device) -> list[dict | Exception]:
    """The runs themselves: build, attach, fit, evaluate; returns for each its record, or what ended
    it alone."""
    cfg = runs[0].cfg
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    autocast = autocast_of(cfg.precision, device)
    splits = cfg.protocol.tune if cfg.phase == "grid" else cfg.protocol.final
    loader = loader_of(cfg, splits.train_on, device, train=True)
    scored = loader_of(cfg, splits.score_on, device, train=False)
    model = model_of(cfg, device)
    weights_sha256, counts = peft.state.digest(model), peft.count(model)
    peft.state.check_reached(model, cfg.image_size, cfg.method.get("no_gradient") or ())
    peeks = cfg.phase == "final" and cfg.protocol.selection == "best_on_test"
    starts, numbers = zip(*starts_of(runs, model), strict=True)
    if cfg.grad_checkpointing:
        checkpointed(model)
    optim = cfg.optim
    mix = mixing(
        *(optim.mixup, optim.cutmix, optim.label_smoothing), cfg.dataset.num_classes, cfg.data_seed
    )
    net, batches, judged, scoring = model, loader, model, scored
    if mix is None:
        net, batches, judged, scoring = cached_features(model, loader, scored, autocast)
    net.train()
    same_draws = len({one.cfg.seed for one in runs}) == 1
    pack = Pack(model, net, starts, spared(optim.no_decay), numbers, same_draws, bool(optim.ema))
    if parallel.world() > 1:
        pack.share(device)
    history = fit(pack, batches, (judged, scoring) if peeks else None, runs, autocast, mix)

    provenance = {
        "weights": weights_name(cfg),
        "weights_sha256": weights_sha256,
        **({"head_rows": rows} if (rows := label_rows(cfg, device)) else {}),
        "data_sha256": {s.manifest.split: s.manifest.digest for s in (loader, scored)},
        **loader.provenance,
        "precision": cfg.precision if autocast._enabled else "fp32",
        "pack": len(runs),
        "compiled": pack.mode,
        "processes": parallel.world(),
        "threads": torch.get_num_threads(),
    }
    results: list[dict | Exception] = []
    for k, one in enumerate(runs):
        if k in history.failed:
            results.append(FloatingPointError(history.failed[k]))
            continue
        with pack.shown(k):
            accuracy, log = evaluate(judged, scoring, autocast), history.logs[k]
            state = {
                name: tensor.cpu().contiguous().clone()
                for name, tensor in peft.adapter_state(model).items()
            }
        if parallel.first():
            records.write(one.folder / "adapter.safetensors", save(state))
            write_log(one.folder, log)
        headline = "top1_val" if cfg.phase == "grid" else "top1_last"
        metrics = {headline: accuracy, "loss_last": log[-1]["loss"]}
        if peeks:
            metrics["top1_best"] = max(row["top1"] for row in log if row["top1"] is not None)
        results.append(
            one.record(
                metrics=metrics,
                counts=counts,
                images=sum(row["images"] for row in log),
                seconds=history.seconds / len(runs),  # its share of the pack's
                memory=peak_memory(device),
                device=device_name(device),
                provenance=provenance,
            )
        )
    return results


def starts_of(runs: list[Run], model: nn.Module) -> Iterator[tuple[dict, dict]]:
    """Where each run starts: the tensors that train and the plain numbers of its tuners. model: the
    first run's own."""
    kinds = {}
    for one in runs:
        kind = one.cfg.seed, str(one.config["method"])
        if kind not in kinds:  # the others need no memory of the device
            other = model_of(one.cfg, torch.device("cpu")) if kinds else model
            state = {name: t.clone() for name, t in peft.adapter_state(other).items()}
            kinds[kind] = state, numbers_of(other)
        yield kinds[kind]


def fit(
    pack: Pack,
    batches: data.Loader,
    peek: tuple[nn.Module, data.Loader] | None,
    runs: list[Run],
    autocast: torch.autocast,
    mix: Mix | None = None,
) -> History:
    """The loop, over one run or a pack of them.

    peek: what is judged after every epoch, and on which images. A member whose loss is no number
    is left out from there on, with the reason in `failed`; where all are, this ends. Raises
    KeyboardInterrupt at SIGINT or SIGTERM after writing a checkpoint.
    """
    cfg, device = runs[0].cfg, batches.device
    optim, optims = cfg.optim, [one.cfg.optim for one in runs]
    per_epoch = len(batches)
    total = length(optim, per_epoch)
    smoothing = 0.0 if mix else optim.label_smoothing  # mixed labels are smooth already
    torch.manual_seed(cfg.seed + 1)  # dropout, apart from initialisation
    optimizer = make_optimizer(pack, optims)
    scaler = torch.amp.GradScaler(
        device.type, enabled=autocast._enabled and cfg.precision == "fp16"
    )
    sums = torch.zeros(len(runs), 3, dtype=torch.double, device=device)
    history = History(0, 0.0, [[] for _ in runs], sums)
    state, keys = runs[0].folder / "state.pt", [one.key for one in runs]
    resume(state, keys, pack, optimizer, scaler, history, device)
    quiet = not parallel.first()
    if quiet:  # dropout of its own; what was summed up before an interruption the first one holds
        torch.manual_seed(cfg.seed + 1 + 1_000_003 * parallel.rank() + history.step)
        history.sums.zero_()
    parallel.wait()
    compiled(pack, cfg, batches, autocast, total - history.step)
    stop, mirrored = Stop(), ExitStack()
    started, saved = time.monotonic() - history.seconds, time.monotonic()

    def pause() -> None:
        """Writes a checkpoint when it is time or a signal came; the latter then ends the run."""
        nonlocal saved
        due = time.monotonic() - saved > cfg.checkpoint_seconds
        asked, due = parallel.agreed([stop.asked, due])
        if asked or due:
            history.seconds = time.monotonic() - started
            history.sums = parallel.gathered(history.sums)
            if not quiet:
                save_state(state, keys, pack, optimizer, scaler, history, device)
            saved = time.monotonic()
        if asked:
            raise KeyboardInterrupt

    if optim.warmup_epochs * per_epoch >= total and not quiet:
        print(f"optim.warmup_epochs={optim.warmup_epochs} is all of this run: its rate only grows")
    title = f"{cfg.method.name} {cfg.dataset.name}" + (f" x {len(runs)}" if len(runs) > 1 else "")
    progress = Progress(title, total, history.step, batches.batch_size, quiet)
    with stop, progress, mirrored:
        mirrors = [
            mirrored.enter_context(mirror(cfg.logger, one.config, one.folder))
            for one in runs
            if not quiet
        ]
        while history.step < total and pack.members:
            pack.net.train()
            epoch, start = divmod(history.step, per_epoch)
            for batch, (images, labels) in enumerate(batches.epoch(epoch, start), start):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(history.step, per_epoch, optims[group["member"]])
                images, targets = mix(images, labels, epoch, batch) if mix else (images, labels)
                optimizer.zero_grad(set_to_none=True)
                for piece, weight, last in parallel.pieces(len(labels), optim.accumulate):
                    with autocast, pack.quiet(last):
                        logits, penalties = pack(images[piece])  # (K, B, classes), (K,)
                        losses = weight * (penalties + entropies(logits, targets[piece], smoothing))
                    scaler.scale(losses.sum()).backward()
                    right = (logits.argmax(2) == labels[piece]).sum(1) * bool(weight)
                    seen = torch.full_like(right, len(labels[piece]) * bool(weight))
                    lost = losses.detach() * (len(labels) / parallel.world())
                    history.sums += torch.stack([lost, right, seen], 1).double()
                scaler.unscale_(optimizer)
                for k in pack.members:
                    if optims[k].clip_norm:
                        nn.utils.clip_grad_norm_(pack.trained(k), optims[k].clip_norm)
                scaler.step(optimizer)
                scaler.update()
                if optim.ema:
                    pack.average(optim.ema)
                history.step += 1
                progress.step(history.sums)
                if history.step == total:
                    break
                if history.step % per_epoch:
                    pause()
            for k, (loss_sum, right_sum, seen) in zip(
                list(pack.members), parallel.total(history.sums).tolist(), strict=True
            ):
                if not math.isfinite(loss_sum):
                    history.failed[k] = (
                        f"the loss is {loss_sum / seen} in epoch {epoch + 1} with "
                        f"optim.lr={optims[k].lr:.2g}: try a smaller one, or optim.clip_norm=1"
                    )
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
                    every = cfg.protocol.get("peek_every", 1)
                    due = history.step == total or (epoch + 1) % every == 0
                    with pack.shown(k):
                        row["top1"] = evaluate(*peek, autocast) if due else None
                history.logs[k].append(row)
                if not quiet:
                    write_log(runs[k].folder, history.logs[k])
                    mirrors[k](row)
                progress.epoch(row, math.ceil(total / per_epoch))
            fewer = len(pack.members) < len(history.sums)
            history.sums = torch.zeros_like(history.sums[: len(pack.members)])
            if pack.members:
                if fewer:
                    compiled(pack, cfg, batches, autocast, total - history.step)
                # after the last batch of an epoch only here: a checkpoint must hold the row, too
                pause()
    history.seconds = time.monotonic() - started
    return history


main = configuration.entry("train")(run)

if __name__ == "__main__":
    main()
