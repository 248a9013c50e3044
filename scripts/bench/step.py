"""Time, memory and throughput of every method, in training and inference.

A step is a forward and a backward pass, without optimiser. Methods are timed in groups, interleaved
with three references, and every ratio is the median over rounds of times within one round:

linear_forward   a forward pass of linear probing
full             a step of full fine-tuning
floor            a step in which one bias of the first block trains: what is frozen has to be
                 passed forwards, and backwards without a gradient of any weight

`excess` is a method's time over what its counted operations take at the rate that `full` reaches;
above 1.3 the row says in which operators the time goes. `inference` and `merged` are forward passes
beside that of the bare backbone.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import peft
from peft.backbone import resolve
from scripts.bench import measure
from scripts.bench.cost import loss_of

OPTIONS = {
    "device": "cpu or cuda",
    "backbone": "vit_b16_in21k",
    "blocks": "2 on a CPU, 12 on a GPU",
    "batch": "4 on a CPU, 32 on a GPU",
    "rounds": "3 on a CPU, 10 on a GPU",
    "methods": "names with commas; every one that applies",
}
GROUP = 8  # methods that are in memory at once
SLOW = 1.3
KINDS = {
    "matmul": ("mm", "bmm", "conv", "linear", "attention"),
    "elementwise": ("mul", "add", "sub", "div", "gelu", "sum", "dropout", "bernoulli", "relu"),
    "norm": ("norm",),
    "copy": ("copy", "cat", "stack", "clone", "contiguous", "index", "gather", "fill", "zero"),
}


def training(model: nn.Module, device: str, batch: int) -> Callable[[], None]:
    """A step's forward and backward pass."""
    images, labels = measure.batch_of(model, batch)
    model.train()

    def step() -> None:
        with measure.mixed(device):
            loss = loss_of(model, images, labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def inference(model: nn.Module, device: str, batch: int) -> Callable[[], None]:
    images, _ = measure.batch_of(model, batch)
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        with measure.mixed(device):
            model(images)

    return forward


def references(backbone: str, depth: int | None, device: str, batch: int) -> tuple[dict, nn.Module]:
    """What the others are measured against, and a model of linear probing."""
    linear, full, floor = (
        measure.model_of(measure.configured(backbone, method, depth), device)
        for method in ("linear", "full", "linear")
    )
    first = next(iter(resolve(floor, ["qkv"]).values()))
    first.bias.requires_grad_(True)
    works = {
        "linear_forward": inference(linear, device, batch),
        "full": training(full, device, batch),
        "floor": training(floor, device, batch),
    }
    return works, full


def memory(model: nn.Module, step: Callable[[], None], device: str, batch: int) -> dict:
    """Operations of a step, and what it holds at its peak: measured on a GPU, counted on a CPU."""
    images, labels = measure.batch_of(model, batch)

    def loss() -> torch.Tensor:
        with measure.mixed(device):
            return loss_of(model, images, labels)

    operations, kept = measure.counted(model, loss)
    found = {"gflop": round(operations / 1e9, 4), "saved_mebibytes": round(kept / 2**20, 1)}
    if device.startswith("cuda"):
        found["peak_mebibytes"] = peak(step, device)
    return found


def peak(work: Callable[[], None], device: str) -> float:
    """MiB that are allocated at the peak of a call beyond those before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def where(step: Callable[[], None], device: str) -> dict[str, dict[str, float]]:
    """The share in a step's time of each kind of operator, and of the five slowest ones (in the
    device's time, on a GPU)."""
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        step()
    spent = {}
    for event in trace.key_averages():
        # What is no operator is a kernel, whose time is its operator's, or autograd's own work.
        name = event.key.removeprefix("aten::") if event.key.startswith("aten::") else "other"
        if not (on_gpu and name == "other"):
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[name] = spent.get(name, 0.0) + took
    total, kinds = sum(spent.values()) or 1.0, dict.fromkeys([*KINDS, "other"], 0.0)
    for name, took in spent.items():
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "other")
        kinds[kind] += took
    slowest = sorted(spent.items(), key=lambda item: -item[1])[:5]
    return {
        "kinds": {kind: round(took / total, 3) for kind, took in kinds.items()},
        "slowest": {name: round(took / total, 3) for name, took in slowest},
    }


def group(
    methods: list[str], backbone: str, depth: int | None, device: str, batch: int, rounds: int
) -> list[dict]:
    """Rows of some methods, measured together."""
    works, full = references(backbone, depth, device, batch)
    reference_flops = memory(full, works["full"], device, batch)["gflop"]
    rows = {}
    for method in methods:
        model = measure.model_of(measure.configured(backbone, method, depth), device)
        step = training(model, device, batch)
        rows[method] = {
            "method": method,
            "tuned_params": peft.count(model)["tuned"],
            **memory(model, step, device, batch),
        }
        works[method] = step
        works[f"{method} inference"] = inference(copy.deepcopy(model), device, batch)
        if peft.tuners(model):
            with contextlib.suppress(TypeError):  # some cannot be merged
                works[f"{method} merged"] = inference(peft.merge(model), device, batch)
    times = measure.interleaved(works, device, rounds)
    for method, row in rows.items():
        row["seconds"] = round(median(times[method]), 5)
        for name in ("linear_forward", "full", "floor"):
            row[f"to_{name}"] = round(measure.ratio(times, method, name), 3)
        excess = measure.ratio(times, method, "full") / (row["gflop"] / reference_flops)
        row["excess"] = round(excess, 3)
        row["images_per_second"] = round(batch / row["seconds"], 2)
        for kind in ("inference", "merged"):
            if f"{method} {kind}" in works:
                took = measure.ratio(times, f"{method} {kind}", "linear_forward")
                row[f"{kind}_to_bare"] = round(took, 3)
                seconds = median(times[f"{method} {kind}"])
                row[f"{kind}_images_per_second"] = round(batch / seconds, 2)
                if device.startswith("cuda"):
                    row[f"{kind}_peak_mebibytes"] = peak(works[f"{method} {kind}"], device)
        if excess > SLOW:
            row["time_goes_to"] = where(works[method], device)
    return list(rows.values())


def step(given: Mapping[str, str]) -> dict:
    device, backbone = given["device"], given.get("backbone", "vit_b16_in21k")
    on_gpu = device.startswith("cuda")
    depth = measure.number(given, "blocks", 12 if on_gpu else 2)
    batch = measure.number(given, "batch", 32 if on_gpu else 4)
    rounds = measure.number(given, "rounds", 10 if on_gpu else 3)
    methods, no = measure.chosen(given, backbone)
    shape = {"backbone": backbone, "depth": depth, "device": device, "batch": batch}
    rows = []
    with measure.progress(len(methods), "step (methods)") as bar:
        for i in range(0, len(methods), GROUP):
            rows += group(methods[i : i + GROUP], **shape, rounds=rounds)
            bar.update(len(methods[i : i + GROUP]))
    return {
        "measured": "a forward and a backward pass, without optimiser, "
        + ("bf16 autocast" if on_gpu else "fp32"),
        "memory": "peak_mebibytes: allocated at the peak of a step, beyond the model itself"
        if on_gpu
        else "saved_mebibytes: counted, what the graph keeps between the two passes",
        "backbone": backbone,
        "blocks": depth,
        "batch_size": batch,
        "rounds": rounds,
        "methods": rows,
        "not_applicable": no,
    }
