"""Forward passes that exist twice: a method's own beside the default one through W'.

A step of each, interleaved, for one method of every set of tuners: the cheaper one is to be
measured faster, not only counted so. `lava_table16` has the columns of that table of LAVA's: LoRA,
LAVA and DoRA on the same layers, matrices and convolutions, LoRA being 1. The paper names neither
network nor rank nor batch nor hardware for it: those are ours.
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
from scripts.bench.measure import Shape
from scripts.bench.step import model_in, training
from scripts.count import PUBLISHED

OPTIONS = {
    "device": "cpu or cuda",
    "backbone": "vit_b16_in21k",
    "blocks": "2 on a CPU, 12 on a GPU",
    "batch": "8 on a CPU, 32 on a GPU",
    "rounds": "3 on a CPU, 10 on a GPU",
    "methods": "names with commas; every one that applies",
    "cnn": "resnet18_in1k, whose convolutions the columns of LAVA's Table 16 are measured on",
}


def own_forwards(methods: list[str], shape: Shape) -> list[dict]:
    """One row for each set of tuners that have a forward pass of their own."""
    rows, seen = [], set()
    for method in measure.progress_over(methods, "paths (methods)"):
        hollow = measure.model_of(measure.configured(shape.backbone, method, shape.depth), "meta")
        own = tuple(materialise(hollow))
        if not own or own in seen:
            continue
        seen.add(own)
        model, through = model_in(shape, method), model_in(shape, method)
        materialise(through)
        works = {"own": training(model, shape), "W'": training(through, shape)}
        times = measure.interleaved(works, shape.device, shape.rounds)
        took = round(measure.ratio(times, "W'", "own"), 3)
        rows.append({"method": method, "tuners": own, "through_weights_to_own": took})
    return rows


def lava_table16(shape: Shape, cnn: str) -> dict[str, dict]:
    """Steps of LoRA, LAVA and DoRA on the same layers, LoRA being 1: at rank 8 on matrices, 3 on
    convolutions, the ranks of its other comparisons."""
    placed = {
        "matrix": (measure.configured(shape.backbone, "linear", shape.depth), ["qkv"], 8),
        "conv": (measure.configured(cnn, "linear"), ["conv"], 3),
    }
    tuners = {"lora": LoRA.over, "lava": LAVA.over, "dora": DoRA.over}
    with (PUBLISHED / "lava.csv").open() as file:
        printed = [row for row in csv.DictReader(file) if row["table"] == "T16"]
    found = {}
    for kind, (cfg, sites, rank) in placed.items():
        works = {}
        for method, tuner in tuners.items():
            model = measure.model_of(cfg)
            peft.attach(model, [{"sites": sites, "tuner": partial(tuner, rank=rank)}])
            works[method] = training(model.to(shape.device), shape)
        times = measure.interleaved(works, shape.device, shape.rounds)
        found[kind] = {
            "backbone": cfg.backbone.name,
            "ours": {m: round(measure.ratio(times, m, "lora"), 3) for m in tuners},
            "published": {r["method"]: float(r["value"]) for r in printed if r["dataset"] == kind},
        }
    return found


def paths(given: Mapping[str, str]) -> dict:
    shape = measure.shape_of(given, batch=8, rounds=3)
    methods, _ = measure.chosen(given, shape.backbone)
    return {
        "measured": "a forward and a backward pass, without optimiser",
        **shape.facts,
        "methods": own_forwards(methods, shape),
        "lava_table16": lava_table16(shape, given.get("cnn", "resnet18_in1k")),
    }
