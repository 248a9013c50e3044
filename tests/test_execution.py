"""Who runs what of a sweep: packs, claims of others, engines and their processes."""

import sys
import types

import dask
import distributed
import pytest
from test_sweep import config

import sweep
from peft import ledger
from scripts import dispatch, worker
from scripts.dispatch import Here
from scripts.execution import Execution


class Recording:
    """An engine that only notes what it is given."""

    capacity, gpu = 2, True

    def __init__(self):
        self.jobs = []

    def submit(self, job):
        self.jobs.append(job)


def packed(tmp_path, grid: str, pack="all") -> tuple[Execution, Recording]:
    grids = ["++sweep.grid=null", f"++sweep.grid={grid}"]
    cfg = config(tmp_path, "sweep.method=[lora]", *grids, f"pack={pack}")
    index = ledger.Index(cfg.runs_dir)
    return Execution(sweep.cells(cfg), cfg, index), Recording()


def test_an_interrupted_pack_goes_on_as_it_was(tmp_path):
    """Other members, or another order, would not find its checkpoint."""
    execution, engine = packed(tmp_path, "{optim.lr:[1e-4,3e-4,1e-3,1e-2]}")
    execution.submit(engine)
    (job,) = engine.jobs
    assert len(job["keys"]) == 4
    for status in ("interrupted", "died"):
        execution.settle(engine.jobs[-1], {"status": status, "reason": "", "full": False})
        engine.capacity = 8  # of many workers each would have a smaller pack now
        execution.submit(engine)
        assert engine.jobs[-1]["keys"] == job["keys"]
    assert len(engine.jobs) == 3
    execution.settle(engine.jobs[-1], {"status": "failed", "reason": "why", "full": False})
    execution.submit(engine)
    assert len(engine.jobs) == 3 and len(execution.reasons) == 4, "nothing is left to pack"


def test_a_pack_is_gathered_from_the_whole_grid(tmp_path):
    """What stacks need not stand side by side in it."""
    execution, engine = packed(tmp_path, "{optim.lr:[1e-4,1e-3,1e-2],optim.batch_size:[8,16]}")
    execution.submit(engine)
    sizes = [{c["optim"]["batch_size"] for c in job["configs"]} for job in engine.jobs]
    assert sizes == [{8}, {16}] and [len(job["keys"]) for job in engine.jobs] == [3, 3]


def test_a_pack_takes_over_what_a_dead_machine_held(tmp_path):
    """All of it, not its first run alone; what is still being run elsewhere stays there."""
    execution, engine = packed(tmp_path, "{optim.lr:[1e-4,1e-3,1e-2]}")
    runs = [run for job in execution.todo for run in job.runs]
    for run in runs[1:]:
        run.folder.mkdir(parents=True)
        (run.folder / "claim.0").write_text(f"elsewhere:1@2.0 {run.key}\n")
    execution.submit(engine)
    assert engine.jobs[0]["keys"] == [runs[0].key] and [*execution.held] == runs[1:]
    execution.watch.timeout = -1.0  # it has given no sign of life for long enough
    execution.poll()
    execution.submit(engine)
    assert engine.jobs[1]["keys"] == engine.jobs[1]["silent"] == [run.key for run in runs[1:]]


def test_an_engine_in_this_process_can_be_interrupted(monkeypatch):
    answer = {"status": "interrupted", "reason": "", "full": False}
    monkeypatch.setattr(worker, "serve", lambda job: answer)
    with pytest.raises(KeyboardInterrupt):
        Here().submit({})


def test_slurm_that_is_not_there_or_refuses_is_said_at_once(tmp_path, monkeypatch):
    from scripts import dispatch

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="there is no sbatch here"):
        dispatch.ask_slurm("#!/bin/sh\n")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: gpu' >&2; exit 1\n")
    sbatch.chmod(0o755)
    with pytest.raises(OSError, match=r"takes no such job: .*invalid partition: gpu"):
        dispatch.ask_slurm("#!/bin/sh\n")
    sbatch.write_text("#!/bin/sh\nexec /bin/sleep 5\n")
    with pytest.raises(OSError, match="no answer"):
        dispatch.ask_slurm("#!/bin/sh\n", timeout=0.1)


@pytest.fixture
def dasks(tmp_path, monkeypatch):
    """A worker of Dask's, whose children do nothing but answer with their environment, and leave
    when they have told of a failure."""
    told = tmp_path / "python"
    told.write_text(
        f"""#!{sys.executable}
import json, os, sys, time
for line in sys.stdin:
    status = json.loads(line).get("status", "done")
    print(json.dumps({{"status": status, "pid": os.getpid(), **os.environ}}), flush=True)
    if status == "failed":
        time.sleep(0.5)
        break
"""
    )
    told.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(told))
    made = types.SimpleNamespace(name="0", job={"root": str(tmp_path), "devices": [], "grace": 5})
    monkeypatch.setattr(distributed, "get_worker", lambda: made)
    yield made
    for child in made.children_of_sweeps.values():
        child.communicate()


def test_no_run_is_handed_to_a_process_that_leaves(dasks):
    execute, told = worker.feeder(), dasks.job | {"cell": "a", "environment": {}}
    answers = [execute(told | {"status": s}) for s in ("done", "done", "failed", "failed", "done")]
    pids = [answer["pid"] for answer in answers]
    assert pids[0] == pids[1] == pids[2] and len(set(pids)) == 3


def test_a_runs_process_does_not_inherit_what_dask_sets_for_its_workers(dasks, monkeypatch):
    for name, value in dask.config.get("distributed.nanny.pre-spawn-environ").items():
        monkeypatch.setenv(name, str(value))

    job = dasks.job
    seen = worker.feeder()(job | {"cell": "a", "environment": dispatch.child_environment(3)})
    assert seen["OMP_NUM_THREADS"] == seen["MKL_NUM_THREADS"] == "3"
    assert "MALLOC_TRIM_THRESHOLD_" not in seen
    seen = worker.feeder()(job | {"cell": "b", "environment": dispatch.child_environment(None)})
    assert seen["OMP_NUM_THREADS"] == "1" and "MALLOC_TRIM_THRESHOLD_" not in seen
