"""Operations and kept activations of every method on ViT-B blocks: counted, not measured.

One forward and backward pass on tensors without content, so that the figures are those of any
machine: floating-point operations of matrix products, convolutions and attention (by torch's
counter; the backward pass of attention counts its recomputation), and the bytes that the graph
keeps between the two passes in fp32. `materialised` is the same method with the forward pass that
every weight tuner has by default, through W'; where the method's own costs less, it pays.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import peft
from peft.dora import DoRA
from peft.lora import LoRA
from peft.rlrr import RLRR
from peft.ssf import SSF
from scripts.bench.measure import (
    batch_of,
    chosen,
    configured,
    counted,
    model_of,
    progress_over,
)
from scripts.prepare import number

OPTIONS = {
    "device": "is of no consequence here",
    "backbone": "vit_b16_in21k",
    "blocks": "3; all=12 for ViT-B",
    "batch": "8",
    "methods": "names with commas; every one that applies",
}
LINEARS = ["qkv", "proj", "fc1", "fc2"]


class Factored(RLRR):
    """RLRR without W': W x + r * W (c * x). Two products with W instead of one with W', hence not
    the method's forward pass; counted here to show it."""

    def forward(self, x: Tensor) -> Tensor:
        weight, (col,) = self.base.weight, self.col
        return (
            F.linear(x, weight, self.base.bias + self.shift)
            + F.linear(x * col[0], weight) * self.row[:, 0]
        )


# Four methods on the four linear layers of a block: their tuner, and whether it forms W'.
VARIANTS: dict[str, tuple[Callable | None, bool]] = {
    "LoRA, W'": (partial(LoRA.over, rank=4), True),
    "LoRA, low-rank path": (partial(LoRA.over, rank=4), False),
    "DoRA, W'": (partial(DoRA.over, rank=4), True),
    "DoRA, factored": (partial(DoRA.over, rank=4), False),
    "RLRR, W'": (RLRR.over, False),
    "RLRR, factored": (Factored.over, False),
    "SSF, W'": (SSF.over, True),
    "SSF, on the output": (SSF.over, False),
}


def materialise(model: nn.Module) -> list[str]:
    """Gives every weight tuner its default forward pass back, through W'. The names of the classes
    that had another."""
    own = []
    for tuner in peft.tuners(model).values():
        kind = type(tuner)
        if isinstance(tuner, peft.WeightTuner) and kind.forward is not peft.WeightTuner.forward:
            own.append(kind.__name__)
            tuner.__class__ = type(kind.__name__, (kind,), {"forward": peft.WeightTuner.forward})
    return sorted(set(own))


def hollow(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Puts tensors that pretend to lie on a CPU in place of those of a model on "meta"."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # tensors that sites share stay shared
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, tensor.requires_grad)
                    made[id(tensor)] = tensor, empty
                store[name] = made[id(tensor)][1]
    return model


def count(model: nn.Module, batch: int) -> dict[str, float]:
    """Of one training step of a model on "meta", without the optimiser."""
    parameters = peft.count(model)
    with FakeTensorMode() as mode:
        hollow(model, mode).train()
        images, labels = batch_of(model, batch)
        loss = partial(loss_of, model, images, labels)
        operations, kept = counted(model, loss)
    return {
        "tuned_params": parameters["tuned"],
        "gflop": round(operations / 1e9, 4),
        "saved_mebibytes": round(kept / 2**20, 1),
    }


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels) + peft.penalty(model)


def variants(backbone: str, depth: int, batch: int) -> list[dict]:
    """The two forward passes of four methods, all on the same layers."""
    rows, cfg = [], configured(backbone, "linear", depth)
    for name, (tuner, through) in VARIANTS.items():
        model = model_of(cfg, "meta")
        with torch.device("meta"):
            peft.attach(model, [{"sites": LINEARS, "tuner": tuner}])
        if through:
            materialise(model)
        rows.append({"variant": name, **count(model, batch)})
    return rows


def cost(given: Mapping[str, str]) -> dict:
    backbone = given.get("backbone", "vit_b16_in21k")
    depth, batch = number(given, "blocks", 3), number(given, "batch", 8)
    methods, no = chosen(given, backbone)
    rows = []
    for method in progress_over(methods, "cost"):
        cfg = configured(backbone, method, depth)
        try:
            row = {"method": method, **count(model_of(cfg, "meta"), batch)}
        except DataDependentOutputException:
            no[method] = "what a step computes is drawn anew each time (NOAH's supernet)"
            continue
        other = model_of(cfg, "meta")
        if own := materialise(other):
            through = count(other, batch)
            row["own_forward"] = own
            row["materialised"] = {k: through[k] for k in ("gflop", "saved_mebibytes")}
        rows.append(row)
    found = {row["method"]: row for row in rows}
    for row in rows:
        for to in ("full", "linear"):
            if to in found:
                row[f"gflop_to_{to}"] = round(row["gflop"] / found[to]["gflop"], 4)
    return {
        "counted": "one forward and backward pass, fp32; no time was measured",
        "backbone": backbone,
        "blocks": depth,
        "batch_size": batch,
        "four_linears": variants(backbone, depth, batch),
        "methods": rows,
        "not_applicable": no,
    }
