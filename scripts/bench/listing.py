"""What looking costs: `sweep.py action=plan` and `action=status` over thousands of finished runs.

The records are made up (a 525-point grid, as RLRR's, for each of several cells), the processes that
list them are real, start and imports included: first without the index, then with it, and the
status of the whole sweep last. `start` is the same command over a folder without any run.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from peft import record as records
from peft.cells import Run, cells_of
from scripts.bench import measure

ROOT = Path(__file__).parents[2]
OPTIONS = {"records": "about how many; 10000"}
RATES = [0.2, 0.1, 0.05, 0.01, 0.005, 0.001, 0.0001]
POINTS = len(RATES) * 5 * 5 * 3
METHODS = [
    *("linear", "bitfit", "norm", "lora", "lora_qkv", "dora", "ssf", "rlrr", "alore", "lava"),
    *("vera", "loha", "lokr", "fact_tt", "fact_tk", "adapter", "adaptformer", "convpass"),
    "superlora",
]


def sweep_of(cells: int) -> dict:
    return {
        "name": "listing",
        "backbone": ["tiny_vit"],
        "dataset": ["fake"],
        "method": METHODS[:cells],
        "protocol": "mini",
        "grid": {
            "optim.lr": RATES,
            "optim.weight_decay": [0.05, 0.01, 0.005, 0.001, 0.0],
            "optim.layer_dropout": [0.0, 0.1, 0.3, 0.5, 0.7],
            "optim.batch_size": [256, 128, 32],
        },
        "seeds": [1],
        "overrides": [],
        "per_method": {},
    }


def made_up(run: Run, i: int) -> dict:
    """A record that `records.read` accepts, of nothing that was trained."""
    known = {"key": run.key, "phase": "grid", "config": run.portable, "selected_from": []}
    known |= {"seed": 1}
    metrics = {"top1_val": i * 37 % 200 / 2, "loss_last": 1.0}
    words = dict.fromkeys(records.FIELDS, "made up")
    numbers = dict.fromkeys(("tuned_params", "head_params", "peak_memory_bytes"), 0)
    return words | numbers | known | {"metrics": metrics, "seconds": 1.0, "provenance": {}}


def listing(given: Mapping[str, str]) -> dict:
    count = max(1, min(len(METHODS), round(int(given.get("records", 10_000)) / POINTS)))
    sweep, wanted = sweep_of(count), count * POINTS
    with tempfile.TemporaryDirectory() as folder:
        own = [f"sweep.{k}={json.dumps(v)}".replace('"', "") for k, v in sweep.items()]
        command = [sys.executable, "sweep.py", *own]

        def seconds(action: str, runs_dir: str) -> float:
            start = time.perf_counter()
            line = [*command, f"action={action}", f"runs_dir={runs_dir}"]
            said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
            if said.returncode or (runs_dir == folder and f"{wanted} done" not in said.stdout):
                raise RuntimeError(f"{action} failed: {said.stdout[:300]}{said.stderr[-500:]}")
            return round(time.perf_counter() - start, 2)

        with measure.progress(wanted + 4, "listing") as bar:
            cells = cells_of(sweep, [f"runs_dir={folder}"])
            for i, run in enumerate([run for cell in cells for run in cell.grid]):
                run.folder.mkdir(parents=True)
                (run.folder / "record.json").write_text(json.dumps(made_up(run, i)))
                bar.update()
            times = {"start": seconds("plan", f"{folder}/none")}
            for name, action in (("first", "status"), ("plan", "plan"), ("status", "status")):
                times[name] = seconds(action, folder)
                bar.update()
    return {"measured": "whole processes", "records": wanted, "cells": count, "seconds": times}
