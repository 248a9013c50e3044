"""One of two processes of `test_contract_full.test_ddp`: `python tests/ddp_pair.py RANK FOLDER`.

Both loop over all methods, on a ViT of two blocks where they apply to one. Each computes the
gradients of a batch alone, then those of its half of the batch under DistributedDataParallel,
twice: a parameter that DDP waits for in vain raises at the second step. Prints one line per method
that differs.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import CLASSES, home, jitter, shallow, tiny

import peft
from peft.config import catalogue


def gradients(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict:
    model.zero_grad()
    inner = getattr(model, "module", model)
    (cross_entropy(model(images), labels) + peft.penalty(inner)).backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.requires_grad}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(4) % CLASSES
    mine = slice(2 * rank, 2 * rank + 2)
    methods = catalogue("method")
    for method in methods:
        on = home(method)
        model = jitter(tiny(on, method, **shallow(on))).double().eval()
        alone = gradients(model, images, labels)
        try:
            pair = DistributedDataParallel(model)
            for _ in range(2):
                together = gradients(pair, images[mine], labels[mine])
            size = max(1.0, *(g.abs().max().item() for g in alone.values()))
            gap = max((together[n] - g).abs().max().item() / size for n, g in alone.items())
        except (RuntimeError, AttributeError) as error:
            gap = f"{type(error).__name__}: {str(error)[:200]}"
        if not (isinstance(gap, float) and gap < 1e-9):
            print(f"{method}: {gap}")
    print(f"{len(methods)} methods")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
