"""Time, memory and throughput of every method, in training and inference.

A step is a forward and a backward pass, without optimiser. Methods are timed in groups, interleaved
with three references, and every ratio is the median over rounds of times within one round:

linear_forward   a forward pass of linear probing
full             a step of full fine-tuning
floor            a step in which one bias of the first block trains: what is frozen has to be
                 passed forwards, and backwards without a gradient of any weight

`excess` is a method's time over what its counted operations take at the rate that `full` reaches;
above 1.3 the row says in which operators the time goes. `share_of_matmul_rate` is against a large
square product. `inference` and `merged` are forward passes beside that of the bare backbone.
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
from scripts.bench.measure import Shape

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


def model_in(shape: Shape, method: str) -> nn.Module:
    return measure.model_of(measure.configured(shape.backbone, method, shape.depth), shape.device)


def training(model: nn.Module, shape: Shape) -> Callable[[], None]:
    """A step's forward and backward pass."""
    images, labels = measure.batch_of(model, shape.batch)
    model.train()

    def step() -> None:
        with measure.mixed(shape.device):
            loss = loss_of(model, images, labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def inference(model: nn.Module, shape: Shape) -> Callable[[], None]:
    images, _ = measure.batch_of(model, shape.batch)
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        with measure.mixed(shape.device):
            model(images)

    return forward


def references(shape: Shape) -> tuple[dict[str, Callable[[], None]], nn.Module]:
    """What the others are measured against, and the model of full fine-tuning."""
    linear, full, floor = (model_in(shape, method) for method in ("linear", "full", "linear"))
    first = next(iter(resolve(floor, ["qkv"]).values()))
    first.bias.requires_grad_(True)
    works = {
        "linear_forward": inference(linear, shape),
        "full": training(full, shape),
        "floor": training(floor, shape),
    }
    return works, full


def memory(model: nn.Module, step: Callable[[], None], shape: Shape) -> dict[str, float]:
    """Operations of a step, and what it holds at its peak: measured on a GPU, counted on a CPU."""
    images, labels = measure.batch_of(model, shape.batch)

    def loss() -> torch.Tensor:
        with measure.mixed(shape.device):
            return loss_of(model, images, labels)

    operations, kept = measure.counted(model, loss)
    found = {"gflop": round(operations / 1e9, 4), "saved_mebibytes": round(kept / 2**20, 1)}
    if shape.on_gpu:
        found["peak_mebibytes"] = peak(step, shape.device)
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
    """The share in a step's time of each kind of operator, and of the five slowest ones. On a GPU
    in the device's time, with `busy`, its share in the step's."""
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as trace:
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
    busy = {"busy": round(total / 1e6 / measure.timed(step, device), 3)} if on_gpu else {}
    return {
        **busy,
        "kinds": {kind: round(took / total, 3) for kind, took in kinds.items()},
        "slowest": {name: round(took / total, 3) for name, took in slowest},
    }


def group(
    methods: list[str], shape: Shape, rate: float, references: tuple[dict, nn.Module]
) -> list[dict]:
    """Rows of some methods, measured together. rate: the device's own, for matrix products."""
    works, full = dict(references[0]), references[1]
    reference_flops = memory(full, works["full"], shape)["gflop"]
    rows = {}
    for method in methods:
        model = model_in(shape, method)
        works[method] = training(model, shape)
        works[f"{method} inference"] = inference(copy.deepcopy(model), shape)
        if peft.tuners(model):
            with contextlib.suppress(TypeError):  # some cannot be merged
                works[f"{method} merged"] = inference(peft.merge(model), shape)
        rows[method] = {
            "method": method,
            "tuned_params": peft.count(model)["tuned"],
            **memory(model, works[method], shape),
        }
    counted = {*rows, "full"}  # and thereby warm
    times = measure.interleaved(works, shape.device, shape.rounds, counted)
    for method, row in rows.items():
        took = median(times[method])
        row["seconds"] = round(took, 5)
        for name in ("linear_forward", "full", "floor"):
            row[f"to_{name}"] = round(measure.ratio(times, method, name), 3)
        excess = measure.ratio(times, method, "full") / (row["gflop"] / reference_flops)
        row["excess"] = round(excess, 3)
        row["share_of_matmul_rate"] = round(row["gflop"] * 1e9 / took / rate, 3)
        row["images_per_second"] = round(shape.batch / took, 2)
        for kind in ("inference", "merged"):
            name = f"{method} {kind}"
            if name in works:
                slower = measure.ratio(times, name, "linear_forward")
                row[f"{kind}_to_bare"] = round(slower, 3)
                row[f"{kind}_images_per_second"] = round(shape.batch / median(times[name]), 2)
                if shape.on_gpu:
                    row[f"{kind}_peak_mebibytes"] = peak(works[name], shape.device)
        if excess > SLOW:
            row["time_goes_to"] = where(works[method], shape.device)
    return list(rows.values())


def step(given: Mapping[str, str]) -> dict:
    shape = measure.shape_of(given, batch=4, rounds=3)
    methods, no = measure.chosen(given, shape.backbone)
    rows, rate, beside = [], measure.matmul_rate(shape.device), references(shape)
    with measure.progress(len(methods), "step (methods)") as bar:
        for i in range(0, len(methods), GROUP):
            rows += group(methods[i : i + GROUP], shape, rate, beside)
            bar.update(len(methods[i : i + GROUP]))
    return {
        "measured": "a forward and a backward pass, without optimiser",
        "memory": "peak_mebibytes: allocated at the peak of a step, beyond the model itself"
        if shape.on_gpu
        else "saved_mebibytes: counted, what the graph keeps between the two passes",
        **shape.facts,
        "matmul_tflops_per_second": round(rate / 1e12, 3),
        "methods": rows,
        "not_applicable": no,
    }
