"""Kills trainings at random moments and compares what comes of them, bit for bit, with what comes
of one that was left alone.

    python -m scripts.kills [kills=50] [seed=0]

Every training is killed once (kill -9), at a moment drawn uniformly between the first sign of it on
the disk and its end, and started again. Single runs and packs of three take turns; both draw
dropout, mixtures and moving averages, and write a checkpoint after every step. Tiny, on the CPU, in
minutes.
"""

import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

from scripts.prepare import number, options, wants_help

RUN = (
    *("backbone=tiny_vit", "dataset=fake", "image_size=32", "method=lora", "method.dropout=0.1"),
    *("optim.epochs=4", "optim.batch_size=16", "optim.mixup=0.8", "optim.cutmix=1"),
    *("optim.ema=0.9", "device=cpu", "workers=0", "checkpoint_seconds=0", "pack=all"),
)
PACKS = (("2e-3",), ("1e-3", "2e-3", "4e-3"))  # learning rates of the members


def train(folder: Path, rates: tuple[str, ...]) -> None:
    """A child's work: the pack, in one process on one thread."""
    import torch

    import train as command
    from peft.config import compose

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would outlive a killed process
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        where = [f"runs_dir={folder}/runs", f"data_root={folder}/data"]
        cfgs = [compose("train", [*RUN, *where, f"optim.lr={rate}"]) for rate in rates]
        outcomes = command.run_pack(cfgs)
    sys.exit(any(isinstance(outcome, Exception) for outcome in outcomes))


def left(folder: Path) -> dict[str, object]:
    """What a pack left behind, without what depends on the clock."""
    found: dict[str, object] = {}
    for file in sorted(path for path in folder.glob("runs/*/*/*/*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.name == "record.json":
            record = json.loads(file.read_text())
            found[name] = [record[key] for key in ("key", "config", "metrics", "tuned_params")]
        else:
            found[name] = file.read_bytes()
    return found


def step_of(folder: Path) -> int | None:
    """The step of the checkpoint that a killed training left; None where there is none."""
    import torch

    states = list(folder.glob("runs/*/*/*/state.pt"))
    return torch.load(states[0], weights_only=True)["history"]["step"] if states else None


def begun(child: multiprocessing.Process, folder: Path) -> float:
    """The moment at which a child's training has a folder, or has ended."""
    while child.exitcode is None and not any(folder.glob("runs/*/*/*")):
        time.sleep(0.001)
    return time.monotonic()


def kill(count: int, seed: int) -> int:
    """Prints what came of it; returns the exit status."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train"])  # so that a child's life is its training
    draw, steps, different = random.Random(seed), [], []
    with tempfile.TemporaryDirectory() as scratch:

        def start(name: str, rates: tuple[str, ...]):
            child = processes.Process(target=train, args=(Path(scratch) / name, rates))
            child.start()
            return child

        references = []
        for number, rates in enumerate(PACKS):
            for name in ("warm", f"alone{number}")[number > 0 :]:  # the first child imports, too
                child = start(name, rates)
                moment = begun(child, Path(scratch) / name)
                child.join()
                if child.exitcode:
                    print(f"error: the undisturbed training left with status {child.exitcode}")
                    return 1
            length = time.monotonic() - moment
            references.append((length, left(Path(scratch) / f"alone{number}")))
        for trial in tqdm(range(count), "kills", disable=not sys.stderr.isatty()):
            rates, (length, expected) = PACKS[trial % 2], references[trial % 2]
            for attempt in range(100):  # until the blow falls before its end
                name = f"{trial}-{attempt}"
                child = start(name, rates)
                begun(child, Path(scratch) / name)
                child.join(draw.uniform(0, length))
                if child.exitcode is None:
                    break
            child.kill()
            child.join()
            steps.append(step_of(Path(scratch) / name))
            child = start(name, rates)
            child.join()
            if child.exitcode or left(Path(scratch) / name) != expected:
                different.append(trial)
                print(f"trial {trial}, killed at step {steps[-1]}: another result")
    known = sorted(step for step in steps if step is not None)
    print(
        f"{count} kills, {count - len(different)} identical results; {count - len(known)} fell "
        "before the first checkpoint or after the last"
        + (f", the others at steps {known[0]} to {known[-1]}" if known else "")
        + (f" (median {statistics.median(known):.0f} of 20)" if known else "")
    )
    return int(bool(different))


def main(arguments: list[str]) -> int:
    if wants_help(arguments):
        print(__doc__)
        return 0
    try:
        given = options(arguments, {"kills", "seed"})
        count, seed = number(given, "kills", 50), number(given, "seed", 0, 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return kill(count, seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
