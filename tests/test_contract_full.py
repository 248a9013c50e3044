"""The expensive part of the method contract: DDP in the quick suite, the rest marked `full`."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY, applies, jitter, tiny
from torch.func import functional_call, vmap

import peft
from peft.config import catalogue

METHODS = catalogue("method")
CELLS = [(backbone, method) for backbone in TINY for method in METHODS if applies(backbone, method)]
cells = pytest.mark.parametrize(("backbone", "method"), CELLS)


def test_ddp(tmp_path):
    """Two gloo processes, every method: the averaged gradient is that of the whole batch."""
    script = Path(__file__).parent / "ddp_pair.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pair = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900) for process in pair]
    finally:
        for process in pair:
            process.kill()
    for process, (out, err) in zip(pair, outputs):
        assert process.returncode == 0, err
        assert out.strip() == f"{len(METHODS)} methods", out


@pytest.mark.full
@cells
def test_compiles_in_training(backbone, method, images):
    """Forward and backward without a graph break, and the gradients of the eager model."""
    torch._dynamo.reset()
    model = jitter(tiny(backbone, method)).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(call(images).square().sum() + peft.penalty(model), trained)
        for call in (compiled, model)
    )
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6


@pytest.mark.full
@cells
def test_vmap_over_configurations(backbone, method, images):
    """Several adapters over one frozen backbone: stacked states give what each gives alone."""
    model = jitter(tiny(backbone, method)).double().eval()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    stacked = {name: torch.stack([p, 0.5 * p, p + 0.01]) for name, p in trained.items()}

    def run(state: dict) -> torch.Tensor:
        return functional_call(model, state, (images.double(),))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        together = vmap(run, randomness="different")(stacked)
    alone = torch.stack([run({name: p[i] for name, p in stacked.items()}) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=1e-9)
