"""Runs a grid: tunes every cell on its validation split, retrains the best point with every seed,
and tabulates.

    python sweep.py sweep=mini action=plan           # how many runs, what is done; touches nothing
    python sweep.py sweep=mini                       # runs what is missing; always safe to repeat
    python sweep.py sweep=mini action=status watch=5            # from another shell
    python sweep.py sweep=mini action=retry|table
    python sweep.py sweep=mini engine=local|address|slurm sampler=grid|optuna
    python sweep.py sweep=mini optim.epochs=1        # what is not the sweep's own goes to every run
    python sweep.py experiment=rlrr/table2 action=plan          # a published table, row by row
    python sweep.py experiment=rlrr/table2 'rows=[11]' 'datasets=[dtd]'         # some of its cells

A cell is a backbone x dataset x method. Every grid point trains on the protocol's tuning split and
is scored by its last epoch on the validation split; the best one (ties: smaller lr, then smaller
weight decay, then the order of the yaml) is retrained on the final split with each seed, and only
those final runs see the test set, once. Records are the only memory: a run that has one is never
repeated, and any number of sweeps may share a folder.
"""

import json
import os
import re
import sys
import time
from collections import Counter, deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from peft import checks, ledger
from peft import config as configuration
from peft import record as records
from peft.cells import Cell, Derived, Run, cells_of, seconds_left
from peft.rows import rows_told

ACTIONS = ("plan", "run", "status", "retry", "table")
PASSED = ("device", "workers", "runs_dir", "data_root", "weights_dir")


def cells(cfg: DictConfig) -> list[Cell]:
    """The cells of a sweep, under the sampler that was asked for, their values checked."""
    checks.check(cfg)
    for word in cfg.overrides:
        root = root_of(word)
        if not word.startswith("+") and root not in configuration.taken("train"):
            raise ValueError(configuration.unknown(root, "sweep"))
    make = Cell
    if cfg.sampler.name != "grid":
        from scripts.sampler import Sampled

        options = {k: v for k, v in configuration.plain(cfg.sampler).items() if k != "name"}
        make = partial(Sampled, **options)
    machine = [f"{key}={json.dumps(cfg[key], ensure_ascii=False)}" for key in PASSED]
    chosen = configuration.plain(cfg.rows), configuration.plain(cfg.datasets)
    made = cells_of(configuration.plain(cfg.sweep), [*machine, *cfg.overrides], make, *chosen)
    points = [item for cell in made for run in cell.grid for item in run.point.items()]
    checks.check_words(cfg.overrides, {path for path, _ in points}, bool(cfg.sweep.get("rows")))
    checks.check_values(points)
    for cell in made:
        checks.check(cell.cfg)
    return made


def root_of(word: str) -> str:
    """The first part of the key of an override: `optim` of optim.lr=1e-3."""
    return re.split(r"[=./@]", word.lstrip("+~"))[0]


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
            cell, runs = job.cell, job.runs
            claims = [(run, claim) for run in runs if (claim := ledger.claim_of(run.folder))]
            if any(not self.watch.silent(claim) for _, claim in claims):
                self.held |= dict.fromkeys(runs, cell)
                continue
            self.silent |= {run: claim.name for run, claim in claims}
            if not job.begun:
                runs += self.alike(job, pack - 1)
            self.flying[runs[0].key] = job
            engine.submit(
                {
                    "root": str(Path(__file__).parent.absolute()),
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


def execute(cells: list[Cell], cfg: DictConfig, index: ledger.Index) -> dict[Path, str]:
    """Runs what is missing; returns the reasons of what failed. A failed run stops its cell, not
    the sweep."""
    execution = Execution(cells, cfg, index)
    if not (execution.todo or execution.held):
        return execution.reasons
    from scripts import inputs
    from scripts.dispatch import open_engine

    inputs.check(cell.cfg for cell in dict.fromkeys(job.cell for job in execution.todo))
    options = configuration.plain(cfg.engine) | {"device": cfg.device}
    engine = open_engine(**options)
    total = sum(cell.expected for cell in cells)
    try:
        with tqdm(total=total, desc="sweep", unit="run", disable=not sys.stderr.isatty()) as bar:
            execution.go(engine, bar)
    finally:
        engine.close()
        index.save()
    return execution.reasons


def state(cells: list[Cell]) -> dict[str, int]:
    """How many runs are done, diverged, failed and missing."""
    tally = Counter(runs=sum(cell.expected for cell in cells))
    for run in (run for cell in cells for run in cell.wanted()):
        kind = "done" if run.entry else "diverged" if run.diverged else "failed"
        tally[kind] += run.settled or run.failure is not None
    tally["missing"] = tally["runs"] - tally["done"] - tally["diverged"] - tally["failed"]
    return tally


def summary(cells: list[Cell], cfg: DictConfig) -> str:
    tally, left = state(cells), seconds_left(cells)
    diverged = f"{tally['diverged']} diverged, " if tally["diverged"] else ""
    return (
        f"sweep {cfg.sweep.name}: {len(cells)} cells, {tally['runs']} runs: {tally['done']} done, "
        f"{diverged}{tally['failed']} failed, {tally['missing']} missing"
        + (f", about {left / 60:.0f} minutes left one at a time" if left else "")
    )


def show(cells: list[Cell]) -> None:
    """A line for each cell, and below it what failed and what is being run, by whom."""
    for cell in cells:
        runs = cell.wanted()
        best = cell.chosen() if cell.grid else None
        point = {k.rpartition(".")[2]: v for k, v in best.point.items()} if best else {}
        chosen = ", chosen: " + ", ".join(f"{k}={v}" for k, v in point.items()) if best else ""
        print(f"  {cell.name}: {sum(run.settled for run in runs)} of {cell.expected}{chosen}")
        for run in (run for run in runs if not run.settled):
            claim = ledger.claim_of(run.folder)
            if claim and not claim.dead:
                print(f"    running: {run.folder.name} on {claim.holder.partition(':')[0]}")
            elif run.failure:
                print(f"    failed: {run.folder.name}: {run.failure['reason'].splitlines()[0]}")


def tabulate(cells: list[Cell], cfg: DictConfig) -> None:
    """Prints the table of the sweep's final runs and writes it as Markdown and PNG into
    results/runs/<sweep>/, with a heat map for every method that was tuned."""
    from scripts.plot import accuracy_plot
    from scripts.tabulate import markdown, table

    found = [run.record for cell in cells for run in cell.finals() if run.entry]
    if not found:
        print("no final run is done yet: nothing to tabulate")
        return
    folder = Path(cfg.runs_dir) / cfg.sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(table(found)) + how_chosen(cells, cfg)
    records.write(folder / "table.md", text)
    accuracy_plot(found, folder / "table.png")
    maps = draw_choices(cells, folder)
    more = f"; how points were chosen: {', '.join(map(str, maps))}" if maps else ""
    print(f"{text}\nwritten to {folder / 'table.md'} and {folder / 'table.png'}{more}")


def draw_choices(cells: list[Cell], folder: Path) -> list[Path]:
    """A heat map of learning rate and weight decay for every method that was tuned, a panel for
    each of its tasks, with the chosen points marked; returns the files."""
    from scripts.plot import heat_map

    tuned: dict[str, list[dict]] = {}
    for cell in cells:
        if len(cell.candidates) > 1 and cell.chosen():
            runs = [*cell.candidates, *cell.finals()]
            tuned.setdefault(cell.cfg.method.name, []).extend(r.record for r in runs if r.entry)
    paths = {folder / f"heat_{method}.png": found for method, found in tuned.items()}
    for path, found in paths.items():
        heat_map(found, path)
    return list(paths)


def how_chosen(cells: list[Cell], cfg: DictConfig) -> str:
    """A note below the table: how each cell's point was chosen, where that was not by its whole
    grid."""
    if cfg.sampler.name == "grid" or not any(cell.grid for cell in cells):
        return ""
    searched = [cell for cell in cells if cell.grid]
    tried = [sum(run.settled for run in cell.candidates) for cell in searched]
    text = f"{min(tried)}" if len(set(tried)) == 1 else f"{min(tried)} to {max(tried)}"
    return (
        f"\n\nChosen by Optuna ({cfg.sampler.sampler}) among {text} of the {len(searched[0].grid)} "
        "points of each cell's grid, on validation.\n"
    )


def run(cfg: DictConfig) -> None:
    if cfg.action not in ACTIONS:
        raise ValueError(f"there is no action {cfg.action!r}; there is: {', '.join(ACTIONS)}")
    started = time.monotonic()
    index = ledger.Index(cfg.runs_dir)
    found = [cell.look(index) for cell in cells(cfg)]
    if not any(cell.grid for cell in found):
        print("no grid: learning rate and weight decay are fixed, nothing is tuned")
    print(summary(found, cfg), flush=True)
    if cfg.action == "plan":
        for line in rows_told(configuration.plain(cfg.sweep), found):
            print(line)
    if cfg.action == "status":
        show(found)
        index.save()
        while cfg.watch and state(found)["missing"]:
            time.sleep(cfg.watch)
            found = [cell.look(index) for cell in found]
            print("\x1b[2J\x1b[H" if sys.stdout.isatty() else "", end="")
            print(summary(found, cfg))
            show(found)
    if cfg.action == "retry":
        failing = [r for cell in found for r in cell.wanted() if r.failure and not r.diverged]
        for failed in failing:
            print(f"  again: {failed.folder.name}: {failed.failure['reason'].splitlines()[0]}")
    if cfg.action in {"run", "retry"}:
        reasons = execute(found, cfg, index)
        done = state(found)
        minutes = (time.monotonic() - started) / 60
        print(f"{done['done']} of {done['runs']} runs done, {minutes:.1f} minutes")
        if done["done"]:
            tabulate(found, cfg)
        if reasons:
            lines = [f"{folder}: {reason}" for folder, reason in reasons.items()]
            raise RuntimeError(f"{len(lines)} runs failed:\n  " + "\n  ".join(lines))
        for cell in found:
            if cell.grid and cell.tuned and cell.chosen() is None:
                raise RuntimeError(f"every point of {cell.name} diverged: nothing to choose")
    if cfg.action == "table":
        tabulate(found, cfg)


main = configuration.entry("sweep")(run)


def command() -> None:
    """Hydra's command line, where what is not the sweep's own (`optim.epochs=1`) goes to every
    run."""
    own = {"hydra", "sweep", "engine", "sampler", "experiment"}
    own |= set(OmegaConf.load(configuration.CONFIGS / "sweep.yaml"))
    mine, theirs = [], []
    for argument in sys.argv[1:]:
        theirs_too = "=" in argument and root_of(argument) not in own
        (theirs if theirs_too else mine).append(argument)
    # These hold keys of runs: what is given replaces what the yaml has, where Hydra would merge.
    free = re.compile(r"sweep\.(grid|variants|per_method)=")
    for argument in filter(free.match, list(mine)):
        at, key = mine.index(argument), argument.partition("=")[0]
        mine[at : at + 1] = [f"++{key}=null", f"++{argument}"]
    passed = json.dumps(theirs, ensure_ascii=False)
    sys.argv[1:] = [*mine, f"overrides={passed}"] if theirs else mine
    main()


if __name__ == "__main__":
    command()
