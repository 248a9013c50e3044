"""One run over several processes, as `torchrun` starts them: each takes its share of every batch.

Without torchrun all of this is one process that does everything. The first process alone writes
and speaks; all of them evaluate, so that none has to wait for another.
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


def world() -> int:
    """How many processes train this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def join(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started, if it did; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"torchrun started process {local} here, where there are {there} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # flags and sums go between CPUs, without waiting for a GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        total(torch.zeros(1))


def total(sums: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, then on the CPU."""
    if world() > 1:
        sums = sums.cpu().clone()
        dist.all_reduce(sums)
    return sums


def gathered(sums: torch.Tensor) -> torch.Tensor:
    """The sum over all processes on the first one, zeros elsewhere: the same in total."""
    return total(sums).to(sums.device) * first() if world() > 1 else sums


def agreed(flags: list[bool]) -> list[bool]:
    """For each flag whether any process raised it, the same answer everywhere."""
    return total(torch.tensor(flags, dtype=torch.int32)).bool().tolist() if world() > 1 else flags


def pieces(count: int, parts: int) -> Iterator[tuple[slice, float, bool]]:
    """This process's share of a batch of `count` images, in `parts` of equal size: (which images,
    their weight in the mean, whether it is the last part).

    The weights are such that the mean over the processes of weighted means is the batch's mean. A
    process for which nothing is left takes the first image with weight 0, since all must step.
    """
    size = world()
    start, end = count * rank() // size, count * (rank() + 1) // size
    if start == end:
        yield slice(0, 1), 0.0, True
        return
    parts = min(parts, end - start)
    for part in range(parts):
        piece = slice(*(start + (end - start) * (part + i) // parts for i in (0, 1)))
        yield piece, (piece.stop - piece.start) / count * size, part == parts - 1
