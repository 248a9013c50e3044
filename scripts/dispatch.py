"""The engines of a sweep: where jobs go, and how their answers come back. Plain arguments only.

`Here` runs them in this process. `Dask` hands them to a cluster of Dask workers: one that it starts
on this machine (`local`), one that is running (`address`), or one that grows and shrinks as a batch
system gives it allocations (`slurm`). Nothing listens beyond the loopback unless `host` or
`interface` says so.
"""

import contextlib
import logging
import os
import queue
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from peft.checks import cores
from scripts import worker

ROOT = Path(__file__).parent.parent


class Here:
    """This process, one run after another: for debuggers and tests."""

    capacity = 1
    gpu = False

    def __init__(self) -> None:
        self.answered: list[tuple[dict, dict]] = []

    def submit(self, job: dict) -> None:
        answer = worker.serve(job | {"log": False})
        if answer["status"] == "interrupted":
            raise KeyboardInterrupt  # it was this process that was told to stop
        self.answered.append((job, answer))

    def answers(self, seconds: float) -> list[tuple[dict, dict]]:
        found, self.answered = self.answered, []
        return found

    def close(self) -> None:
        pass


class Dask:
    """A Dask cluster. Workers may die at any time: Dask gives their job to another, and a job that
    has a record already is answered by that."""

    def __init__(
        self, client, cluster=None, *, environment: Mapping, devices: list[str], resources: Mapping
    ) -> None:
        self.execute = worker.feeder()
        self.client, self.cluster = client, cluster
        self.shared = {"environment": dict(environment), "devices": devices, "log": True}
        self.resources = dict(resources) or None
        self.done: queue.Queue = queue.Queue()
        self.flying: dict[str, tuple[dict, object]] = {}
        self.submitted = 0

    @property
    def capacity(self) -> int:
        """How many jobs to keep in flight: two for every worker, so that none waits for us."""
        threads = sum(w["nthreads"] for w in self.client.scheduler_info(-1)["workers"].values())
        return 2 * max(1, threads, self.minimum)

    minimum = 1
    gpu = False

    def submit(self, job: dict) -> None:
        self.submitted += 1
        key = f"run-{job['keys'][0][:8]}-{os.getpid()}-{self.submitted}"
        future = self.client.submit(
            self.execute, job | self.shared, key=key, pure=False, resources=self.resources
        )
        self.flying[key] = job, future
        future.add_done_callback(lambda future: self.done.put(future.key))

    def answers(self, seconds: float) -> list[tuple[dict, dict]]:
        """What was answered since the last call, or comes within so many seconds."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                key = self.done.get(timeout=0 if found else seconds)
                job, future = self.flying.pop(key)
                try:
                    answer = future.result(timeout=30)
                except Exception as error:  # the scheduler gave up on it, or lost it
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    answer = {"status": "died", "reason": reason, "full": False}
                found.append((job, answer))
        if not found and self.client.status in ("closed", "closing"):
            raise OSError("the connection to the scheduler is lost; run the same command again")
        return found

    def close(self) -> None:
        """Ends the workers that are ours; their children stop at a checkpoint."""
        with contextlib.suppress(Exception):
            self.client.cancel([future for _, future in self.flying.values()], force=True)
        with contextlib.suppress(Exception):
            self.client.close(timeout=10)
        if self.cluster is not None:
            with contextlib.suppress(Exception):
                self.cluster.close(timeout=30)


def configure() -> None:
    """Dask's settings for few long jobs on workers that come and go."""
    import dask

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    dask.config.set(
        {
            "distributed.scheduler.allowed-failures": 100,  # our own count of attempts decides
            "distributed.scheduler.work-stealing": False,
            "distributed.scheduler.worker-ttl": "10 minutes",
            "distributed.worker.memory.target": False,
            "distributed.worker.memory.spill": False,
            "distributed.worker.memory.pause": False,
            "distributed.worker.memory.terminate": False,
            "distributed.comm.timeouts.connect": "30s",
            "distributed.worker.daemon": True,
        }
    )


def gpus(device: str) -> list[str]:
    """The visible GPUs, one for each worker; none where runs go to the CPU."""
    if device not in ("auto", "cuda"):
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return names if torch.cuda.is_available() else []


def child_environment(threads: int | str | None) -> dict[str, int | str | None]:
    """What a run's process must not inherit from Dask, whose workers are told to use one thread and
    to give every freed 64 KiB back to the system: together three times slower on two cores."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {"MALLOC_TRIM_THRESHOLD_": None} | (dict.fromkeys(names, threads) if threads else {})


def local(*, device: str, workers: int | None, threads: int, host: str, **_: object) -> Dask:
    """A worker for each GPU, else for each group of `threads` cores, on this machine."""
    from distributed import Client, LocalCluster

    configure()
    devices = gpus(device)
    one = device.startswith("cuda:")  # that GPU, and no other
    count = workers or len(devices) or (1 if one else max(1, cores() // threads))
    if devices:
        threads = max(1, cores() // count)
    # Asked before the cluster starts: Dask writes its own value into this process, too.
    environment = child_environment(os.environ.get("OMP_NUM_THREADS", threads))
    for left in (2, 1, 0):
        try:
            cluster = LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                host=host,
                dashboard_address=f"{host}:0",  # not 8787, which others may have
                worker_dashboard_address=f"{host}:0",
                memory_limit=0,
                silence_logs=logging.CRITICAL,
                local_directory=None,
            )
            break
        except RuntimeError:  # a worker was killed while it started
            if not left:
                raise
    engine = Dask(Client(cluster), cluster, environment=environment, devices=devices, resources={})
    engine.minimum, engine.gpu = count, bool(devices) or one
    return engine


def address(
    *,
    address: str | None,
    scheduler_file: str | None,
    threads: int | None,
    resources: Mapping,
    **_: object,
) -> Dask:
    """A scheduler that somebody started, with workers of one thread each. Raises OSError where none
    answers."""
    from distributed import Client

    configure()
    address = address or os.environ.get("DASK_SCHEDULER_ADDRESS")
    if not (address or scheduler_file):
        raise ValueError(
            "engine=address needs engine.address=tcp://HOST:PORT or engine.scheduler_file=FILE, "
            "of a scheduler started by `dask scheduler`, and workers by `dask worker --nthreads 1`"
        )
    if scheduler_file and not Path(scheduler_file).is_file():
        raise OSError(f"there is no {scheduler_file}: is the scheduler running?")
    try:
        client = Client(address, scheduler_file=scheduler_file, timeout=15)
    except (OSError, TimeoutError) as error:
        raise OSError(
            f"no Dask scheduler answers at {address or scheduler_file}: start one with `dask "
            "scheduler --host 127.0.0.1 --dashboard-address 127.0.0.1:0`, or run with engine=local"
        ) from error
    environment = child_environment(threads)
    engine = Dask(client, environment=environment, devices=[], resources=resources)
    engine.gpu = any("gpu" in name.lower() for name in resources)
    return engine


def slurm(
    *,
    queue: str | None,
    account: str | None,
    walltime: str,
    cores: int,
    memory: str,
    min_jobs: int,
    max_jobs: int,
    host: str | None,
    interface: str | None,
    directives: list[str],
    prologue: list[str],
    log_directory: str,
    spare: int,
    **_: object,
) -> Dask:
    """Allocations of one worker each, as many as there is work for. A worker leaves `spare` seconds
    before its walltime, so that runs stop at a checkpoint and go on in the next allocation."""
    from dask_jobqueue import SLURMCluster
    from distributed import Client

    configure()
    lifetime = max(60, seconds_of(walltime) - spare)
    Path(log_directory).mkdir(parents=True, exist_ok=True)
    where = {"interface": interface} if interface else {"host": host}
    cluster = SLURMCluster(
        queue=queue,
        account=account,
        walltime=walltime,
        cores=1,  # one job at a time; what it may use is `job_cpu`
        job_cpu=cores,
        processes=1,
        memory=memory,
        python=sys.executable,
        interface=interface,
        scheduler_options={"dashboard_address": f"{host or '127.0.0.1'}:0"} | where,
        worker_extra_args=[
            *("--lifetime", f"{lifetime}s", "--lifetime-stagger", "15s"),
            *("--no-dashboard", "--dashboard-address", f"{host or '127.0.0.1'}:0"),
            *([] if interface else ["--host", host or "127.0.0.1"]),
        ],
        job_extra_directives=list(directives),
        job_script_prologue=list(prologue),
        log_directory=log_directory,
    )
    try:
        ask_slurm(cluster.job_script())
    except OSError:
        cluster.close(timeout=10)
        raise
    client = Client(cluster)
    cluster.adapt(minimum_jobs=min_jobs, maximum_jobs=max_jobs)
    environment = child_environment(cores)
    engine = Dask(client, cluster, environment=environment, devices=[], resources={})
    engine.minimum, engine.gpu = max_jobs, any("gpu" in line for line in directives)
    return engine


def ask_slurm(script: str, timeout: float = 60) -> None:
    """Whether Slurm would take such a job: a controller that does not answer, or a queue that is
    not there, would otherwise be waited for in vain. Raises OSError with what sbatch says."""
    try:
        told = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=timeout
        )
    except FileNotFoundError as error:
        raise OSError(
            "there is no sbatch here: start engine=slurm where Slurm's commands are, on a login "
            "node for example, or run with engine=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"Slurm's controller gave no answer for {timeout:.0f} seconds") from error
    if told.returncode:
        said = " ".join(told.stderr.split())
        raise OSError(
            f"Slurm takes no such job: {said}. See engine.queue, account, walltime, cores, memory "
            "and directives, and whether sinfo answers"
        )


def seconds_of(walltime: str) -> int:
    """Seconds of Slurm's [days-]hours:minutes:seconds."""
    days, _, clock = walltime.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def open_engine(name: str, **options: object) -> Here | Dask:
    """The engine of that name: here, local, address or slurm."""
    if name == "here":
        return Here()
    return {"local": local, "address": address, "slurm": slurm}[name](**options)
