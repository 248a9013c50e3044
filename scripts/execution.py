"""What a sweep has to do, handed out to an engine and filed when it is answered."""

import os
import time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig
from tqdm import tqdm

from peft import ledger
from peft import record as records
from peft.cells import Cell, Derived, Run


class Job(NamedTuple):
    """Runs of one cell that train together; `begun` where they have already, and share a
    checkpoint."""

    cell: Cell
    runs: list[Run]
    begun: bool = False


class Execution:
    """One `run` or `retry`: jobs out, answers in, until nothing is left to do."""

    def __init__(self, cells: list[Cell], cfg: DictConfig, index: ledger.Index) -> None:
        self.cells, self.cfg, self.index = cells, cfg, index
        self.retry = cfg.action == "retry"
        self.todo: deque[Job] = deque()
        self.held: dict[Run, Cell] = {}
        self.flying: dict[str, Job] = {}
        self.seen: set[str] = set()
        self.reasons: dict[Path, str] = {}
        self.deaths: Counter = Counter()
        self.silent: dict[Run, str] = {}
        self.watch = ledger.Watch(cfg.claim_timeout)
        self.trained = 0
        for cell in cells:
            self.feed(cell)

    def feed(self, cell: Cell, first: bool = False) -> None:
        """Queues the runs of a cell that have become possible."""
        new = [run for run in cell.wanted() if run.key not in self.seen]
        for run in new:
            self.seen.add(run.key)
            run.look(self.index)
        todo = []
        for run in new:
            if run.settled:
                run.tell_wider_grid()
                continue
            if run.failure and not self.retry:
                reason = run.failure["reason"]
                self.reasons[run.folder] = f"{reason} (action=retry runs it again)"
            else:
                todo.append(Job(cell, [run]))
        (self.todo.extendleft if first else self.todo.extend)(todo[::-1] if first else todo)
        if new and not todo:
            self.feed(cell, first)  # all of it was done: what follows from it may be possible
        for other in self.cells:
            if isinstance(other, Derived) and other.base is cell:
                self.feed(other)

    def submit(self, engine) -> None:
        """Hands out what fits: runs of one cell, as many at once as can be packed. Of a pack, as
        many train at a time as memory holds; on a CPU packing was measured not to pay."""
        sizes = {"auto": 32 if engine.gpu else 1, "all": len(self.todo)}
        most = sizes[self.cfg.pack] if self.cfg.pack in sizes else int(self.cfg.pack)
        pack = min(most, -(-len(self.todo) // max(1, engine.capacity // 2)))
        while self.todo and len(self.flying) < engine.capacity:
            job = self.todo.popleft()
            cell, runs = job.cell, job.runs + ([] if job.begun else self.alike(job, pack - 1))
            claims = {run: claim for run in runs if (claim := ledger.claim_of(run.folder))}
            others = [run for run, claim in claims.items() if not self.watch.silent(claim)]
            self.held |= dict.fromkeys(others, cell)
            self.silent |= {run: claims[run].name for run in claims.keys() - set(others)}
            runs = [run for run in runs if run not in others]
            if not runs:
                continue
            self.flying[runs[0].key] = job._replace(runs=runs)
            engine.submit(
                {
                    "root": str(Path(__file__).parent.parent.absolute()),
                    "cell": f"{self.cfg.sweep.name}: {cell.name}",
                    "keys": [r.key for r in runs],
                    "folders": [str(r.folder.absolute()) for r in runs],
                    "configs": [absolute(r.config) | {"pack": self.cfg.pack} for r in runs],
                    "silent": [self.silent[r] for r in runs if r in self.silent],
                    "heartbeat": self.cfg.heartbeat,
                    "grace": 60,
                }
            )

    def alike(self, job: Job, most: int) -> list[Run]:
        """Takes up to so many runs of the same cell out of the queue that stack with a job's."""
        found: list[Job] = []
        for other in self.todo:
            if len(found) == most:
                break
            if other.cell is job.cell and not other.begun:
                one, two = job.runs[0].config, other.runs[0].config
                found += [] if cannot_stack([one, two]) else [other]
        if found:
            taken = set(map(id, found))
            self.todo = deque(other for other in self.todo if id(other) not in taken)
        return [run for other in found for run in other.runs]

    def settle(self, told: dict, answer: dict) -> None:
        """Files an answer. The disk is believed, not the answer."""
        cell, runs, _ = self.flying.pop(told["keys"][0])
        status, reason = answer["status"], answer["reason"]
        again: list[Run] = []
        for run in runs:
            run.look(self.index)
            if run.entry:
                self.trained += 1
            elif answer["full"]:
                raise OSError(
                    f"the disk of {self.cfg.runs_dir} is full; nothing that was done is lost: make "
                    "room and run the same command again"
                )
            elif status == "held":
                self.held[run] = cell
            elif status == "interrupted":
                again.append(run)
            elif status == "died" and self.deaths[run] + 1 < self.cfg.attempts:
                self.deaths[run] += 1
                again.append(run)
            else:
                if run.failure is None:
                    reason = reason or "it left no record"
                    what = {"status": "failed", "reason": reason, "traceback": "", "config": {}}
                    run.folder.mkdir(parents=True, exist_ok=True)
                    records.write(run.folder / "failure.json", what | {"config": run.portable})
                    run.look(self.index)
                if not run.diverged:
                    self.reasons[run.folder] = run.failure["reason"]
        if again:  # the same runs in the same order: they go on from their checkpoint
            self.todo.appendleft(Job(cell, again, begun=True))
        self.feed(cell, first=True)

    def poll(self) -> None:
        """Looks at the runs that others are at."""
        for run, cell in list(self.held.items()):
            run.look(self.index)
            claim = None if run.settled else ledger.claim_of(run.folder)
            if run.settled or claim is None or self.watch.silent(claim):
                del self.held[run]
                if run.settled:
                    self.feed(cell)
                else:
                    self.todo.append(Job(cell, [run]))

    def go(self, engine, bar: tqdm) -> None:
        polled, told, started = 0.0, time.monotonic(), time.monotonic()
        while self.todo or self.flying or self.held:
            if time.monotonic() - polled > 3:
                self.poll()
                self.index.save()
                polled = time.monotonic()
            self.submit(engine)
            for job, answer in engine.answers(0.5 if self.flying or self.held else 0.0):
                self.settle(job, answer)
            bar.n = sum(run.settled for cell in self.cells for run in cell.wanted())
            hours = (time.monotonic() - started) / 3600
            speed = self.trained / hours if self.trained else 0.0
            left = (bar.total - bar.n) / speed * 60 if speed else None
            text = f"{len(self.flying)} handed out, {len(self.reasons)} failed"
            text += f", {len(self.held)} with another sweep" if self.held else ""
            text += f", {speed:.0f} runs/h, {left:.0f} min left" if left is not None else ""
            bar.set_postfix_str(text, refresh=False)
            bar.refresh()
            if bar.disable and time.monotonic() - told > 30:
                print(f"{bar.n} of {bar.total} done, {text}", flush=True)
                told = time.monotonic()


def absolute(config: dict) -> dict:
    """A job's child may start in another folder than ours."""
    return config | {"runs_dir": os.path.abspath(config["runs_dir"])}


def cannot_stack(configs: list[dict]) -> str | None:
    """Why these configurations cannot train in one process; None where they can."""
    from peft.pack import why_not  # here: it needs torch

    return why_not(configs)
