"""What the benchmarks share: a model, a clock, a counter, a file with the hardware's name."""

import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import PIL
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from tqdm import tqdm

import peft
from data.manifest import replacing
from eval import device_name
from peft.checks import cores
from peft.config import (
    build_bare,
    catalogue,
    check_applies,
    compose,
    near,
    placements_of,
    plain,
)
from scripts.prepare import number

RESULTS = Path(__file__).parents[2] / "results" / "bench"
CLASSES = 100
_aten = torch.ops.aten
# torch's counter knows the attention kernels of GPUs only; theirs and the CPU's do the same work.
ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}


def hardware(device: str) -> dict[str, str | int]:
    """Names of what the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [x.partition(":")[2].strip() for x in lines.splitlines() if x.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": device_name(torch.device(device)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
    }


def write(name: str, device: str, result: Mapping) -> Path:
    """results/bench/NAME.json, replaced whole."""
    path = RESULTS / f"{name}{'-cuda' if device.startswith('cuda') else ''}.json"
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"benchmark": name, "when": stamp, "hardware": hardware(device), **result}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


class Shape(NamedTuple):
    """What a benchmark runs on: the first `depth` blocks of a backbone."""

    backbone: str
    depth: int
    device: str
    batch: int
    rounds: int

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def facts(self) -> dict[str, str | int]:
        """As the files say it."""
        return {
            "precision": "bf16 autocast" if self.on_gpu else "fp32",
            "backbone": self.backbone,
            "blocks": self.depth,
            "batch_size": self.batch,
            "rounds": self.rounds,
        }


def shape_of(given: Mapping[str, str], batch: int, rounds: int) -> Shape:
    """The options' shape; by default `batch` images in `rounds` rounds on two blocks on a CPU, and
    32 in 10 on twelve on a GPU."""
    device = given["device"]
    on_gpu = device.startswith("cuda")
    return Shape(
        given.get("backbone", "vit_b16_in21k"),
        number(given, "blocks", 12 if on_gpu else 2),
        device,
        number(given, "batch", 32 if on_gpu else batch),
        number(given, "rounds", 10 if on_gpu else rounds),
    )


def configured(backbone: str, method: str, depth: int | None = None, *others: str) -> DictConfig:
    """The configuration of a run of a method on the first `depth` blocks of a backbone."""
    shallow = [] if depth is None else [f"++backbone.model.depth={depth}"]
    return compose("train", [f"backbone={backbone}", f"method={method}", *shallow, *others])


def model_of(cfg: DictConfig, device: str = "cpu") -> nn.Module:
    """The model of a configuration, with random weights, on which what is measured does not
    depend; `model.pixels` is the size of its images."""
    where = "meta" if device == "meta" else "cpu"
    model = copy.deepcopy(bare(OmegaConf.to_yaml(cfg.backbone, resolve=True), where))
    torch.manual_seed(0)
    with torch.device(where):
        placements = placements_of(cfg.method, cfg.backbone.family)
        model = peft.attach(model, placements, plain(cfg.method.trainable))
    model.pixels = int(cfg.backbone.image_size)
    return model.to(device)


@lru_cache(1)  # every method of a benchmark stands on the same one
def bare(backbone: str, where: str) -> nn.Module:
    """The network of a backbone node, written as YAML, on "cpu" or "meta"."""
    torch.manual_seed(0)
    with torch.device(where):
        return build_bare(OmegaConf.create(backbone), num_classes=CLASSES, pretrained=False)


def chosen(
    given: Mapping[str, str], backbone: str, default: Iterable[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The methods to measure: those of the option, else the default, else every one that applies to
    the backbone; then also the others, with their reasons. Raises ValueError for one that is
    unknown or does not apply."""
    known, asked = catalogue("method"), given["methods"].split(",") if "methods" in given else []
    asked, yes, no = asked or list(default), [], {}
    for method in asked or known:
        if method not in known:
            raise ValueError(f"methods: there is no {method!r}; {near(method, known)}")
        cfg = configured(backbone, method)
        try:
            check_applies(cfg.method, cfg.backbone.family)
            yes.append(method)
        except ValueError as error:
            if asked:
                raise
            no[method] = str(error)
    return yes, no


def batch_of(model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """Noise and labels, where the model is."""
    device, draw = next(model.parameters()).device, torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, model.pixels, model.pixels, generator=draw)
    return images.to(device), (torch.arange(size) % CLASSES).to(device)


def mixed(device: str) -> torch.autocast:
    """bf16 on a GPU, fp32 on a CPU: what train.py does."""
    kind = device.split(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call, to the end of what it started on the device."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def interleaved(
    works: Mapping[str, Callable[[], object]],
    device: str,
    rounds: int,
    warm: Container[str] = (),
) -> dict[str, list[float]]:
    """Seconds of each in every round, after a call to warm up of those that are not `warm`. A round
    calls each once; rounds start at different ones, so that none always follows the same neighbour.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    for name in order:
        if name not in warm:
            works[name]()
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(timed(works[name], device))
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """How much longer one takes than the other: the median over the rounds that they share."""
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


def matmul_rate(device: str) -> float:
    """Operations a second of a large square product, in the precision of the steps."""
    side = 8192 if device.startswith("cuda") else 2048
    kind = torch.bfloat16 if device.startswith("cuda") else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    start = time.perf_counter()
    while time.perf_counter() - start < 0.5:  # a device at rest has slow clocks
        timed(lambda: a @ b, device)
    times = interleaved({"product": lambda: a @ b}, device, 10)
    return 2 * side**3 / median(times["product"])


def progress(total: int, title: str) -> tqdm:
    """A bar on a terminal; elsewhere a line now and then."""
    return tqdm(total=total, desc=title, mininterval=0.5 if sys.stderr.isatty() else 15)


def progress_over(items: list[str], title: str) -> Iterator[str]:
    with progress(len(items), title) as bar:
        for item in items:
            yield item
            bar.update()


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in a call."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def counted(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Operations of a loss and its backward pass, and the bytes that are kept between the two.

    Kept are whole storages, each counted once: what the graph holds beside the model's own tensors.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    def both() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()

    operations = flops(both)
    model.zero_grad(set_to_none=True)
    return operations, sum(storage.nbytes() for storage in kept.values())
