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
import re
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from peft import checks, ledger
from peft import config as configuration
from peft import record as records
from peft.cells import Cell, cells_of, seconds_left
from peft.rows import rows_told
from scripts.execution import Execution

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
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's Ctrl-C
    engine = open_engine(**options)
    total = sum(cell.expected for cell in cells)
    try:
        with tqdm(total=total, desc="sweep", unit="run", disable=not sys.stderr.isatty()) as bar:
            execution.go(engine, bar)
    finally:
        engine.close()
        index.save()
        signal.signal(signal.SIGTERM, before)
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
    tried = [run.record for cell in cells for run in cell.candidates if run.entry]
    text = markdown(table(found + tried)) + how_chosen(cells, cfg)
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
