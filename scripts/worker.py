"""Where a sweep's runs execute: a child process, fed by whatever runs the function of `feeder`.

    python -m scripts.worker            # reads jobs from stdin, one JSON a line; answers on stdout

A child has its own log (output.log in the folder of a run, or of the first of a pack), can be
killed without harm to the process that feeds it, and stops at a checkpoint when that process is
gone. Results are on disk before they are reported. This module must stay cheap to import: torch is
the child's affair.
"""

import contextlib
import errno
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
GRACE = 60.0  # seconds that a child has for its checkpoint when it is told to stop


def feeder() -> Callable[[dict], dict]:
    """The function that Dask's workers run: it hands a job to its thread's child process and waits
    for the answer, {"status", "reason", "full"}.

    status: done, failed, held (somebody else is at it), interrupted, or died (with no last word).
    A local function travels by value and leans on nothing of this module, so that schedulers and
    workers need no checkout to start.
    """

    def execute(job: dict) -> dict:
        import json
        import os
        import subprocess
        import sys
        import threading

        from distributed import get_worker

        worker = get_worker()
        children = vars(worker).setdefault("children_of_sweeps", {})
        child = children.get(threading.get_ident())
        if child is None or child.poll() is not None or child.of != (job["root"], job["cell"]):
            if child is not None:
                child.stdin.close()  # it ends by itself, and frees its device
                child.wait(job["grace"])
                child.stdout.close()
            environment = dict(os.environ, PYTHONPATH=job["root"], PYTHONUNBUFFERED="1")
            environment |= job["environment"]
            environment = {k: str(v) for k, v in environment.items() if v is not None}
            if job["devices"]:
                device = job["devices"][int(worker.name) % len(job["devices"])]
                environment["CUDA_VISIBLE_DEVICES"] = device
            child = subprocess.Popen(
                [sys.executable, "-m", "scripts.worker"],
                cwd=job["root"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the sweep alone
            )
            child.of = (job["root"], job["cell"])
            children[threading.get_ident()] = child
        try:
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:
            answer = ""
        if answer:
            found = json.loads(answer)
            if found["status"] in ("failed", "interrupted"):
                child.of = None  # it is leaving: the next run gets a process of its own
            return found
        code = child.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"left with status {code}"
        return {"status": "died", "reason": f"its process {how}", "full": False}

    return execute


def serve(job: dict) -> dict:
    """Runs one job, a pack of configurations, in this process. Failures are on disk before the
    answer is."""
    from omegaconf import OmegaConf

    import train
    from peft.ledger import Held, hold

    folders = [Path(folder) for folder in job["folders"]]
    configs = [OmegaConf.create(config) for config in job["configs"]]
    answer = {"status": "done", "reason": "", "full": False}
    try:
        with contextlib.ExitStack() as claims:
            for folder in folders:
                claims.enter_context(hold(folder, job["silent"], job["heartbeat"]))
                # of an earlier try: what ends this one, be it ever so early, is told instead
                (folder / "failure.json").unlink(missing_ok=True)
            claims.enter_context(logged(folders[0] / "output.log", job["log"]))
            try:
                if configs[0].phase == "derived":
                    derive(configs[0])
                elif len(configs) == 1:
                    train.run(configs[0])
                else:
                    ended = [e for e in train.run_pack(configs) if isinstance(e, Exception)]
                    full = [e for e in ended if getattr(e, "errno", None) in FULL]
                    answer |= {"status": "failed" if ended else "done", "full": bool(full)}
            except KeyboardInterrupt:
                answer |= {"status": "interrupted"}
            except Exception as error:  # train has written why into failure.json
                if job["log"]:
                    traceback.print_exc()
                full = getattr(error, "errno", None) in FULL
                answer |= {"status": "failed", "reason": str(error), "full": full}
    except Held as held:
        answer |= {"status": "held", "reason": str(held)}
    except OSError as error:
        answer |= {"status": "failed", "reason": str(error), "full": error.errno in FULL}
    return answer


def derive(config) -> None:
    """Evaluates what a finished run becomes by a change, as eval.py does."""
    import eval as evaluation
    from peft import config as configuration

    cfg = configuration.compose("eval", [])
    machine = ("device", "workers", "runs_dir", "data_root", "weights_dir", "weights", "run")
    for key in machine:
        cfg[key] = config[key]
    cfg.experts = config.derived.experts
    evaluation.run(cfg)


@contextlib.contextmanager
def logged(path: Path, wanted: bool):
    """Sends what this process prints, C++ included, to the end of a file."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(file, 1), os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
        os.close(file)


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that is printed may reach the channel
    jobs: queue.Queue = queue.Queue()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # outside of the training loop, which has its own handler

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        jobs.put(None)
        if jobs.unfinished_tasks > 1:  # in the middle of a run: its feeder is gone
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        while (job := jobs.get()) is not None:
            answer = serve(job)
            channel.write(json.dumps(answer) + "\n")
            channel.flush()
            jobs.task_done()
            if answer["status"] in ("failed", "interrupted"):
                break  # the next run gets a clean process
    os._exit(0)  # nothing is left to tidy, and libraries' threads may linger


if __name__ == "__main__":
    main()
