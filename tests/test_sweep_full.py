"""Sweeps as they are run: processes, sockets, Slurm, Hydra. All are `full`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import loopback_slurm
import psutil
import pytest

from peft import record as records
from scripts import campaign

pytestmark = pytest.mark.full
ROOT = Path(__file__).parent.parent
RUNS = [
    *("image_size=32", "optim.epochs=2", "optim.batch_size=16"),
    *("device=cpu", "workers=0", "backbone=tiny_vit", "dataset=fake", "protocol=mini"),
]
SWEEP = [
    *("sweep.backbone=[tiny_vit]", "sweep.dataset=[fake]"),
    "sweep.method=[bitfit,lora]",
    *("sweep.per_method={}", "sweep.seeds=[1,2]", *RUNS[:5]),
    "sweep.grid={optim.lr:[1e-4,3e-4,1e-3,1e-2],optim.weight_decay:[1e-4]}",
]
ALL = 2 * (4 + 2)


def command(folder: Path, *arguments: str, script: str = "sweep.py", **options) -> subprocess.Popen:
    environment = options.pop("env", os.environ) | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, script, *arguments, f"runs_dir={folder}/runs"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen, timeout: float = 600) -> str:
    said = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, said
    return said


def completions(folder: Path) -> Counter:
    """How often each run was trained to its end, by what it printed."""
    logs = folder.glob("runs/fake/fake/*/output.log")
    return Counter({log.parent.name: log.read_text().count(" on fake: ") for log in logs})


def test_a_scheduler_may_end_a_sweep(tmp_path):
    """SIGTERM is Ctrl-C, and what was begun goes on from its checkpoint."""
    choice = [*SWEEP, "optim.epochs=300", "checkpoint_seconds=0.2", "engine.workers=1"]
    process = command(tmp_path, *choice)
    while not list(tmp_path.rglob("state.pt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "goes on from the last checkpoint" in said, said
    assert list(tmp_path.rglob("state.pt")) and not list(tmp_path.rglob("failure.json"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict[str, dict]:
    """Metrics of the undisturbed sweep, by key."""
    folder = tmp_path_factory.mktemp("calm")
    ended(command(folder, *SWEEP))
    found = campaign.found(folder / "runs")
    assert len(found) == ALL
    return found


def test_nothing_is_lost_repeated_or_changed_by_kills(tmp_path):
    report = campaign.main([f"folder={tmp_path}", "kills=5"])
    wrong = {"lost", "foreign", "repeated", "different", "claims_left"}
    assert sum(report["kills"].values()) > 0 and not any(report[key] for key in wrong)
    assert report["same_table"]


def test_points_that_diverge_take_no_other_with_them(tmp_path):
    """A process that has failed leaves: the next run must not be handed to it."""
    rates = "sweep.grid={optim.lr:[1e30,1e31,1e32,1e33,1e-3],optim.weight_decay:[0]}"
    told = [word for word in SWEEP if not word.startswith(("sweep.method", "sweep.grid"))]
    told += ["sweep.method=[lora]", rates]
    said = ended(command(tmp_path, *told, "engine.workers=1"))
    assert "3 of 7 runs done" in said and "died" not in said
    failures = [json.loads(p.read_text()) for p in tmp_path.glob("runs/fake/fake/*/failure.json")]
    assert len(failures) == 4 and all("the loss is" in each["reason"] for each in failures)


def test_a_local_sweep_listens_on_the_loopback_alone(tmp_path, calm):
    sweep, seen = command(tmp_path, *SWEEP, "engine.workers=2"), set()
    while sweep.poll() is None and len(list(tmp_path.rglob("record.json"))) < 4:
        with contextlib.suppress(psutil.Error):
            for process in [sweep, *psutil.Process(sweep.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    for connection in psutil.Process(process.pid).net_connections("inet"):
                        if connection.status == psutil.CONN_LISTEN:
                            seen.add(connection.laddr.ip)
        time.sleep(0.2)
    ended(sweep)
    assert seen == {"127.0.0.1"}
    assert campaign.found(tmp_path / "runs") == calm


def test_two_sweeps_at_once_share_the_work(tmp_path, calm):
    pair = [command(tmp_path, *SWEEP, "engine.workers=1") for _ in range(2)]
    for sweep in pair:
        assert f"{ALL} of {ALL} runs done" in ended(sweep)
    assert campaign.found(tmp_path / "runs") == calm
    assert set(completions(tmp_path).values()) == {1}


@pytest.mark.parametrize(
    "launcher",
    ["basic", "joblib", "submitit_local"],
)
def test_hydras_own_multirun_leaves_the_same_records(tmp_path, calm, launcher):
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    grid = ["phase=grid", "method=bitfit,lora", "seed=1", "optim.weight_decay=1e-4"]
    line = ["-m", f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=2"]
    line = line[: 3 if launcher == "joblib" else 2]
    rates = "optim.lr=1e-4,3e-4,1e-3,1e-2"
    more = [f"hydra.sweep.dir={tmp_path}/multirun"]
    ended(command(tmp_path, *line, *RUNS, *grid, rates, *more, script="train.py"))
    found = campaign.found(tmp_path / "runs")
    assert len(found) == 8 and all(calm[key] == metrics for key, metrics in found.items())
    said = ended(command(tmp_path, *SWEEP, "action=status"))
    assert f"{ALL} runs: 8 done" in said and "chosen: lr=" in said


def test_a_running_scheduler_by_its_file_and_none(tmp_path, calm):
    def dask(*arguments: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]]
        return subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.DEVNULL)

    at = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    where = ["--scheduler-file", str(tmp_path / "scheduler.json")]
    started = [dask("dask_scheduler", "--port", "0", *at, *where)]
    try:
        while not (tmp_path / "scheduler.json").exists():
            time.sleep(0.2)
        for _ in range(2):
            started.append(dask("dask_worker", "--nthreads", "1", *at, *where))
        line = [*SWEEP, "engine=address", f"engine.scheduler_file={tmp_path}/scheduler.json"]
        ended(command(tmp_path, *line))
    finally:
        for process in started:
            process.terminate()
            process.wait(30)
    assert campaign.found(tmp_path / "runs") == calm
    alone = command(
        tmp_path / "other", *SWEEP, "engine=address", "engine.address=tcp://127.0.0.1:9"
    )
    said = alone.communicate(timeout=120)[0]
    assert alone.returncode == 1 and "no Dask scheduler answers at tcp://127.0.0.1:9" in said


@pytest.mark.skipif(
    loopback_slurm.root() is None,
    reason="Slurm is not here: python tests/loopback_slurm.py DIR, then SLURM_ROOT=DIR",
)
def test_slurm_with_an_allocation_cancelled_midway(tmp_path, calm):
    engine = ["engine=slurm", "engine.max_jobs=2", "engine.cores=1", "engine.memory=400MB"]
    engine += ["engine.walltime='00:20:00'", f"engine.log_directory={tmp_path}/logs"]
    with loopback_slurm.slurm(tmp_path / "slurm") as environment:
        sweep = command(tmp_path, *SWEEP, *engine, env=environment)
        cancelled = None
        while sweep.poll() is None and cancelled is None:
            time.sleep(0.5)
            if len(list(tmp_path.rglob("record.json"))) >= 2:
                squeue = ["squeue", "-h", "-t", "R", "-o", "%i"]
                jobs = subprocess.check_output(squeue, env=environment, text=True).split()
                cancelled = jobs[0]
                subprocess.run(["scancel", cancelled], env=environment, check=True)
        said = ended(sweep)
    assert cancelled and f"{ALL} of {ALL} runs done" in said
    assert campaign.found(tmp_path / "runs") == calm
    assert set(completions(tmp_path).values()) == {1}
    assert all(records.read(path) for path in tmp_path.rglob("record.json"))
