"""What is fast, by measurement: how many runs train at once, and whether their step is compiled."""

import math
import time
from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from data import Loader
from peft import parallel
from peft.core import tuners
from peft.memory import out_of_memory
from peft.pack import Pack
from peft.state import adapter_state

# Seconds of plain steps from which on compiling pays: on a GPU it takes about half a minute, and
# saves a third of every step of a pack, two thirds of a run's alone (results/bench/README.md).
LONG = 60


def step_seconds(pack: Pack, images: Tensor, autocast: torch.autocast) -> float:
    """Of the fastest of four steps forth and back, which leave no trace."""
    times = []
    with pack.trial(images, autocast) as step:
        for _ in range(4):
            begun = time.monotonic()
            step()
            if images.device.type == "cuda":
                torch.cuda.synchronize(images.device)
            times.append(time.monotonic() - begun)
    return min(times)


def fastest_pack(model: nn.Module, image: torch.Size, autocast: torch.autocast, most: int) -> int:
    """How many runs of a method to train at once, by trying steps of packs on blank images.

    image: the size (B, 3, H, W) of a batch.
    """
    model.train()
    device = next(model.parameters()).device
    images = torch.zeros(image, device=device)
    start = {name: t.clone() for name, t in adapter_state(model).items()}

    def seconds(size: int) -> float:
        pack = Pack(model, model, [start] * size, lambda name, p: False)
        return step_seconds(pack, images, autocast) / size

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


def compiled(
    pack: Pack, cfg: DictConfig, batches: Loader, autocast: torch.autocast, steps: int
) -> None:
    """Compiles a pack as `cfg.compile` says.

    batches: of the run. steps: what is left of it. "auto" compiles on a GPU, where plain steps
    would take LONG, and keeps what is faster.
    """
    auto, parts, speak = cfg.compile == "auto", cfg.optim.accumulate, parallel.first()
    # a method that draws a network for every step would need a graph for each
    draws = any(tuner.alone for tuner in tuners(pack.model).values())
    if not cfg.compile or not steps or (auto and (batches.device.type != "cuda" or draws)):
        return
    pack.net.train()
    images, labels = next(batches.epoch())
    piece, *_ = next(parallel.pieces(len(labels), parts))
    images, mode = images[piece], cfg.compile
    if auto:
        before = step_seconds(pack, images, autocast)
        if not any(parallel.agreed([steps * parts * before > LONG])):
            return
        # launches limit a run alone; a pack needs the memory that CUDA graphs would keep
        alone = pack.solo and parts == 1 and parallel.world() == 1
        mode = "reduce-overhead" if alone else True
    if speak:
        print("compiling the step, which takes half a minute or more", flush=True)
    failure = pack.compile(mode, images, autocast)
    if any(parallel.agreed([failure is not None])):
        pack.uncompile()
        if speak:
            print(f"compile={mode} does not work here ({failure}): going on without it")
    elif auto:
        now = step_seconds(pack, images, autocast)
        if any(parallel.agreed([now > 0.95 * before])):
            pack.uncompile()
        elif speak:
            print(f"compiled: {1000 * now:.0f} ms a step instead of {1000 * before:.0f}")
