"""Runs an hour when K of them train at once over one frozen backbone, beside one at a time.

Steps are those of train.py: its packs, its optimiser, dropout drawn for each. Every pack is
interleaved with the solo run of the same call. An hour's runs are counted by steps only, of 1,000
images for 100 epochs: evaluation is not in them. `chosen` is the K with the most. The device's own
rate is that of a large square matrix product in the precision of the steps; a pack's share of it
counts K times the operations of a solo step, or the pack's own where these are fewer (what comes
before the first tuner is computed once).
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

import peft
from peft.optimiser import make_optimizer, spared
from peft.pack import Pack
from scripts.bench import measure
from scripts.bench.measure import Shape
from scripts.prepare import number

OPTIONS = {
    "device": "cpu or cuda",
    "backbone": "vit_b16_in21k",
    "blocks": "2 on a CPU, 12 on a GPU",
    "batch": "8 on a CPU, 32 on a GPU",
    "members": "1,2,4 on a CPU, 1,2,4,8,16,32,64 on a GPU",
    "rounds": "3 on a CPU, 10 on a GPU",
    "methods": "lora,rlrr",
    "compile": "false; true or a mode of torch.compile: packs also compiled, never the solo run",
    "graphs": "all of the members; which packs are also compiled",
}
IMAGES, EPOCHS = 1000, 100


def stepping(
    cfg: DictConfig, model: nn.Module, members: int, shape: Shape
) -> tuple[Pack, Callable[[], None]]:
    """A pack of `members` runs of one configuration, and a step of it."""
    state = {name: tensor.clone() for name, tensor in peft.adapter_state(model).items()}
    packed = Pack(model, model, [state] * members, spared(cfg.optim.no_decay))
    optimizer = make_optimizer(packed, [cfg.optim] * members)
    images, labels = measure.batch_of(model, shape.batch)
    model.train()

    def step() -> None:
        with measure.mixed(shape.device):
            logits, penalties = packed(images)
            every = F.cross_entropy(logits.flatten(0, 1), labels.repeat(members))
        optimizer.zero_grad(set_to_none=True)
        (every * members + penalties.sum()).backward()
        optimizer.step()

    return packed, step


def packs(
    method: str, shape: Shape, tries: list[tuple[int, bool | str]], rate: float, bar: tqdm
) -> list[dict]:
    """A row for each try, a K and a way to compile it, until the memory ends."""
    cfg = measure.configured(shape.backbone, method, shape.depth)
    model = measure.model_of(cfg, shape.device)
    _, solo = stepping(cfg, model, 1, shape)
    solo_flops = measure.flops(solo)
    per_run = EPOCHS * math.ceil(IMAGES / shape.batch)
    rows = []
    for k, mode in tries:
        row = {"members": k, "compiled": mode}
        try:
            packed, step = stepping(cfg, model, k, shape)
            executed = measure.flops(step)
            if mode:
                images, _ = measure.batch_of(model, shape.batch)
                begun = time.monotonic()
                failure = packed.compile(mode, images, measure.mixed(shape.device))
                row["compile_seconds"] = round(time.monotonic() - begun, 1)
                row |= {"compiled": False, "compile_failure": failure} if failure else {}
            if shape.on_gpu:
                torch.cuda.reset_peak_memory_stats(shape.device)
            times = measure.interleaved({"solo": solo, "pack": step}, shape.device, shape.rounds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows.append({**row, "fits": False})
            break
        took = median(times["pack"])
        row |= {
            "step_seconds": round(took, 5),
            "runs_per_hour": round(3600 * k / took / per_run, 3),
            "to_one_at_a_time": round(k / measure.ratio(times, "pack", "solo"), 3),
            "gflop": round(executed / 1e9, 1),
            "gflop_to_solo": round(executed / solo_flops / k, 3),
            "share_of_matmul_rate": round(min(executed, k * solo_flops) / took / rate, 3),
        }
        if shape.on_gpu:
            row["peak_mebibytes"] = round(torch.cuda.max_memory_allocated(shape.device) / 2**20)
        rows.append(row)
        bar.write(f"{method}: {row}", file=sys.stderr)
        bar.update()
    return rows


def pack(given: Mapping[str, str]) -> dict:
    shape = measure.shape_of(given, batch=8, rounds=3)
    listed = given.get("members", "1,2,4,8,16,32,64" if shape.on_gpu else "1,2,4").split(",")
    methods, _ = measure.chosen(given, shape.backbone, ("lora", "rlrr"))
    asked = given.get("compile", "false")
    ways = {"false": [], "true": [True]}.get(asked, [asked])
    graphs = set(given.get("graphs", ",".join(listed)).split(","))
    if unknown := graphs - set(listed):
        raise ValueError(f"graphs: {', '.join(unknown)} is not among members={','.join(listed)}")
    tries = [
        (number({"members": k}, "members", 1), way)
        for k in listed
        for way in (False, *(ways if k in graphs else ()))
    ]
    rate, found = measure.matmul_rate(shape.device), []
    with measure.progress(len(methods) * len(tries), "pack") as bar:
        for method in methods:
            rows = packs(method, shape, tries, rate, bar)
            best = max(rows, key=lambda row: row.get("runs_per_hour", 0))
            found.append({"method": method, "chosen": best["members"], "packs": rows})
    return {
        "measured": "a training step; the solo run is not compiled; "
        f"a run is {EPOCHS} epochs of {IMAGES:,} images, without evaluation",
        **shape.facts,
        "matmul_tflops_per_second": round(rate / 1e12, 3),
        "methods": found,
    }
