"""Kills a sweep at random, again and again, and compares what is left with an undisturbed one.

    python -m scripts.campaign [kills=20] [seed=0] [folder=DIR]

42 runs of tiny models on made-up images, twice: once in peace, once with `kill -9` of workers,
children and the sweep itself, which is started again until it is through. Afterwards every record
must be there once, no run trained to its end twice, and metrics and table be the same to the bit.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from peft import record as records
from scripts.prepare import number, options

ROOT = Path(__file__).parent.parent
SWEEP = [
    *("sweep.backbone=[tiny_vit]", "sweep.dataset=[fake]", "sweep.method=[linear,bitfit,lora]"),
    *("sweep.per_method={}", "sweep.seeds=[1,2]", "device=cpu", "workers=0"),
    "sweep.grid={optim.lr:[1e-4,3e-4,1e-3,3e-3,1e-2,3e-2],optim.weight_decay:[0,1e-4]}",
    *("image_size=32", "optim.epochs=60", "optim.batch_size=8", "checkpoint_seconds=0.2"),
]


def start(folder: Path, log: Path) -> psutil.Popen:
    command = [sys.executable, "sweep.py", *SWEEP, f"runs_dir={folder}", "engine.workers=2"]
    with open(log, "a") as output:
        return psutil.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)


def targets(sweep: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The processes of a running sweep, by what they do."""
    found: dict[str, list[psutil.Process]] = {"sweep": [sweep], "worker": [], "child": []}
    for process in sweep.children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "scripts.worker" in command:
            found["child"].append(process)
        elif "spawn_main" in command:
            found["worker"].append(process)
    return {kind: processes for kind, processes in found.items() if processes}


def disturbed(folder: Path, log: Path, kills: int, seed: int) -> Counter:
    """Runs the sweep under fire until it is through; returns what was killed, by kind."""
    draw, killed = random.Random(seed), Counter()
    sweep = start(folder, log)
    while killed.total() < kills:
        until, hot = time.monotonic() + draw.uniform(1, 6), draw.random() < 0.7
        while sweep.poll() is None and (
            time.monotonic() < until or (hot and not any(folder.rglob("claim.*")))
        ):
            time.sleep(0.1)  # most shots fall while a run is being trained, the others anywhere
        if sweep.poll() is not None:
            if sweep.returncode == 0:
                break  # through before all shots were fired
            sweep = start(folder, log)
            continue
        found = targets(sweep)
        kind = draw.choice(sorted(found))
        try:
            draw.choice(found[kind]).kill()
        except psutil.NoSuchProcess:
            continue
        killed[kind] += 1
        print(f"{killed.total()} of {kills}: killed {kind}", flush=True)
    while sweep.wait() != 0:
        if killed.total() < kills or sweep.returncode > 0:
            raise RuntimeError(f"the sweep failed by itself, see {log}")
        sweep = start(folder, log)
    return +killed


def found(folder: Path) -> dict[str, dict]:
    """Metrics by the key of the run. Raises AssertionError for two records of one run."""
    paths = sorted(folder.rglob("record.json"))
    loaded = [records.read(path) for path in paths]
    assert len({record["key"] for record in loaded}) == len(loaded), "a run has two records"
    return {record["key"]: record["metrics"] for record in loaded}


def main(arguments: list[str]) -> dict:
    given = options(arguments, {"kills", "seed", "folder"})
    kills, seed = number(given, "kills", 20), number(given, "seed", 0, 0)
    folder = Path(given.get("folder") or tempfile.mkdtemp(prefix="campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    calm, fire = folder / "calm", folder / "fire"
    begun = time.monotonic()
    if start(calm, folder / "calm.log").wait() != 0:
        raise RuntimeError(f"the undisturbed sweep failed, see {folder / 'calm.log'}")
    took = time.monotonic() - begun
    begun = time.monotonic()
    killed = disturbed(fire, folder / "fire.log", kills, seed)
    expected, left = found(calm), found(fire)
    ends = {
        log.parent.name: log.read_text(errors="replace").count(" on fake: ")
        for log in fire.rglob("output.log")
    }
    report = {
        "runs": len(expected),
        "kills": dict(killed),
        "lost": len(set(expected) - set(left)),
        "foreign": len(set(left) - set(expected)),
        "repeated": sum(count > 1 for count in ends.values()),
        "different": sum(left.get(key) != value for key, value in expected.items()),
        "resumed": sum(
            "going on from step" in log.read_text(errors="replace")
            for log in fire.rglob("output.log")
        ),
        "claims_left": len(list(fire.rglob("claim.*"))),
        "same_table": (calm / "mini/table.md").read_text() == (fire / "mini/table.md").read_text(),
        "seconds": [round(took), round(time.monotonic() - begun)],
    }
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
