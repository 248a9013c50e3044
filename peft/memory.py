"""What fits: how many runs train at once, what a run took, and how it can do with less."""

import math
import re
import resource
import time
from collections.abc import Callable

import torch
from torch import nn

from peft.core import tuners
from peft.pack import Pack
from peft.state import adapter_state

TOO_LARGE = re.compile(
    r"can't allocate memory|out of memory|_ALLOC(ATION)?_FAILED|when the batch size exceeds"
)


def fastest_pack(model: nn.Module, image: torch.Size, autocast: torch.autocast, most: int) -> int:
    """How many runs of a method to train at once, by trying steps of packs on blank images.

    image: the size (B, 3, H, W) of a batch.
    """
    model.train()
    device = next(model.parameters()).device
    images = torch.zeros(image, device=device)
    start = {name: t.clone() for name, t in adapter_state(model).items()}

    def seconds(size: int) -> float:
        """Of a step forth and back, for each member."""
        pack, times = Pack(model, model, [start] * size, lambda name, p: False), []
        for _ in range(4):
            begun = time.monotonic()
            with autocast:
                logits, penalties = pack(images)
            (logits.float().sum() + penalties.sum()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.monotonic() - begun)
        return min(times) / size

    return largest(seconds, most)


def largest(seconds: Callable[[int], float], most: int) -> int:
    """The size of a pack: the one with the fastest step of a member, `seconds(size)`, doubled until
    two in a row are not 5 % faster or the memory ends, and evened out over packs for `most`
    members. Two, since the first pair pays for vmap, and where launches limit, only four earn it.
    """
    chosen, best, slower, size = 1, math.inf, 0, 1  # where not even one fits, training says so
    while slower < 2:
        try:
            now = seconds(size)
        except Exception as error:
            if not out_of_memory(error):  # what does not stack, trains alone
                print(f"a pack of {size} does not work ({str(error).partition(chr(10))[0]})")
            break
        if now <= 0.95 * best:
            chosen, best, slower = size, now, 0
        else:
            slower += 1
        if size == most:
            break
        size = min(2 * size, most)
    return -(-most // -(-most // chosen))


def checkpointed(model: nn.Module) -> nn.Module:
    """Lets a backbone compute the activations of its blocks again instead of keeping them. Raises
    ValueError for one that cannot, or whose chain of blocks a tuner runs as one."""
    other = "leave grad_checkpointing=false; optim.accumulate=2 saves memory, too"
    for path, tuner in tuners(model).items():
        if isinstance(tuner.base, nn.Sequential):
            kind = type(tuner).__name__
            raise ValueError(f"{kind} runs {path} as one, where checkpoints lie between: {other}")
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"{type(model).__name__} knows no gradient checkpointing: {other}"
        ) from error
    return model


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_memory(error: Exception) -> bool:
    """Whether the memory did not suffice, or a kernel takes no batch as large: other than torch's
    own allocator on a GPU, libraries and the CPU say so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or bool(TOO_LARGE.search(str(error)))


def with_advice(error: Exception) -> Exception:
    """An error that says what to do where the memory did not suffice; others as they are."""
    if not out_of_memory(error):
        return error
    advised = torch.OutOfMemoryError(
        f"{str(error).splitlines()[0].rstrip('.')}. optim.accumulate=2 takes a batch in two parts, "
        "grad_checkpointing=true keeps fewer activations"
    )
    advised.__cause__ = error
    return advised
