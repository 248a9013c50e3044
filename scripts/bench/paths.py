"""Forward passes that exist twice: a method's own beside the default one through W'.

A step of each, interleaved, for one method of every set of tuners: the cheaper one is to be
measured faster, not only counted so. `lava_table16` is the setting of that table of LAVA's: LoRA,
LAVA and DoRA on the same layers, matrices and convolutions, LoRA being 1.
"""

import csv
from collections.abc import Mapping
from functools import partial

import peft
from peft.dora import DoRA
from peft.lava import LAVA
from peft.lora import LoRA
from scripts.bench import measure
from scripts.bench.cost import materialise
from scripts.bench.step import training
from scripts.count import PUBLISHED

OPTIONS = {
    "device": "cpu or cuda",
    "backbone": "vit_b16_in21k",
    "blocks": "2 on a CPU, 12 on a GPU",
    "batch": "8 on a CPU, 32 on a GPU",
    "rounds": "3 on a CPU, 10 on a GPU",
    "methods": "names with commas; every one that applies",
    "cnn": "resnet18_in1k, the convolutional net of LAVA's Table 16",
}


def own_forwards(
    methods: list[str], backbone: str, depth: int | None, device: str, batch: int, rounds: int
) -> list[dict]:
    """One row for each set of tuners that have a forward pass of their own."""
    rows, seen = [], set()
    for method in measure.progress_over(methods, "paths (methods)"):
        cfg = measure.configured(backbone, method, depth)
        model = measure.model_of(cfg, "meta")
        own = tuple(materialise(model))
        if not own or own in seen:
            continue
        seen.add(own)
        model, through = measure.model_of(cfg, device), measure.model_of(cfg, device)
        materialise(through)
        works = {"own": training(model, device, batch), "W'": training(through, device, batch)}
        times = measure.interleaved(works, device, rounds)
        took = round(measure.ratio(times, "W'", "own"), 3)
        rows.append({"method": method, "tuners": own, "through_weights_to_own": took})
    return rows


def lava_table16(
    backbone: str, cnn: str, depth: int | None, device: str, batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Steps of LoRA, LAVA and DoRA of rank 8 on the same layers, LoRA being 1."""
    placed = {"matrix": (backbone, depth, ["qkv"]), "conv": (cnn, None, ["conv"])}
    tuners = {"lora": LoRA.over, "lava": LAVA.over, "dora": DoRA.over}
    with (PUBLISHED / "lava.csv").open() as file:
        printed = [row for row in csv.DictReader(file) if row["table"] == "T16"]
    found = {}
    for kind, (name, blocks, sites) in placed.items():
        works = {}
        for method, tuner in tuners.items():
            model = measure.model_of(measure.configured(name, "linear", blocks))
            rank = 8 if kind == "matrix" else 3  # of the paper's comparisons
            peft.attach(model, [{"sites": sites, "tuner": partial(tuner, rank=rank)}])
            works[method] = training(model.to(device), device, batch)
        times = measure.interleaved(works, device, rounds)
        found[kind] = {
            "backbone": name,
            "ours": {m: round(measure.ratio(times, m, "lora"), 3) for m in tuners},
            "published": {r["method"]: float(r["value"]) for r in printed if r["dataset"] == kind},
        }
    return found


def paths(given: Mapping[str, str]) -> dict:
    device, backbone = given["device"], given.get("backbone", "vit_b16_in21k")
    on_gpu = device.startswith("cuda")
    depth = measure.number(given, "blocks", 12 if on_gpu else 2)
    batch = measure.number(given, "batch", 32 if on_gpu else 8)
    rounds = measure.number(given, "rounds", 10 if on_gpu else 3)
    methods, _ = measure.chosen(given, backbone)
    shape = {"backbone": backbone, "depth": depth, "device": device, "batch": batch}
    return {
        "measured": "a forward and a backward pass, without optimiser, "
        + ("bf16 autocast" if on_gpu else "fp32"),
        "backbone": backbone,
        "blocks": depth,
        "batch_size": batch,
        "rounds": rounds,
        "methods": own_forwards(methods, **shape, rounds=rounds),
        "lava_table16": lava_table16(cnn=given.get("cnn", "resnet18_in1k"), **shape, rounds=rounds),
    }
