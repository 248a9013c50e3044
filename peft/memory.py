"""What fits: what a run took, and how it can do with less."""

import re
import resource

import torch
from torch import nn

from peft.core import tuners

TOO_LARGE = re.compile(
    r"can't allocate memory|out of memory|_ALLOC(ATION)?_FAILED|when the batch size exceeds"
)


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
