"""A merged model's forward pass beside the bare backbone's: 1.00, since both run the same layers.

One method at a time, merged and not, interleaved with the bare backbone. `control` is the bare
backbone beside a copy of itself: how far from 1 this machine's clock alone goes. On a GPU few
images would measure how fast the host launches kernels, which varies by 5 %: hence the batch.
`operations_to_bare` is counted.
"""

import copy
from collections.abc import Mapping

import torch

import peft
from scripts.bench import measure
from scripts.bench.step import inference, model_in

OPTIONS = {
    "device": "cpu or cuda",
    "backbone": "vit_b16_in21k",
    "blocks": "2 on a CPU, 12 on a GPU",
    "batch": "1 on a CPU, 256 on a GPU",
    "rounds": "30",
    "methods": "names with commas; every one that merges",
}


def merge(given: Mapping[str, str]) -> dict:
    large = {"batch": "256"} if given["device"].startswith("cuda") else {}
    shape = measure.shape_of({"rounds": "30", **large, **given}, batch=1, rounds=30)
    methods, _ = measure.chosen(given, shape.backbone)
    bare = model_in(shape, "linear")
    operations = measure.flops(inference(bare, shape))

    def beside(**others: torch.nn.Module) -> dict[str, float]:
        works = {name: inference(other, shape) for name, other in {"bare": bare, **others}.items()}
        times = measure.interleaved(works, shape.device, shape.rounds)
        return {f"{name}_to_bare": round(measure.ratio(times, name, "bare"), 4) for name in others}

    rows, refused = [], {}
    with measure.progress(len(methods), "merge (methods)") as bar:
        control = beside(copy=copy.deepcopy(bare))["copy_to_bare"]
        for method in methods:
            bar.update()
            model = model_in(shape, method)
            if not peft.tuners(model):
                refused[method] = "has no tuners: it is the plain backbone as it stands"
                continue
            try:
                merged = peft.merge(model)
            except TypeError as error:
                refused[method] = str(error)
                continue
            counted = measure.flops(inference(merged, shape))
            gained = set(merged.state_dict()) - set(bare.state_dict())
            rows.append(
                {
                    "method": method,
                    **beside(merged=merged, unmerged=model),
                    "operations_to_bare": counted / operations,
                    "tensors_gained": sorted(gained),
                }
            )
    ratios = [row["merged_to_bare"] for row in rows]
    return {
        "measured": "a forward pass",
        **shape.facts,
        "control": control,
        "smallest": min(ratios, default=None),
        "largest": max(ratios, default=None),
        "methods": rows,
        "not_merged": refused,
    }
