"""The cells of a sweep: which runs it consists of, and which point of a grid wins.

Plain dictionaries. Composing costs a tenth of a second, replacing a value a tenth of a millisecond:
a cell is composed once, and its points are made by substitution.
"""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from peft import config as configuration
from peft import ledger
from peft import record as records
from peft.rows import Row, recipe, rows_of, task_values, values

KEYS = {
    *("name", "backbone", "dataset", "method", "protocol", "variants", "grid", "seeds"),
    *("overrides", "per_method", "published", "rows", "recipe"),
}
LIGHT = ("optim", "seed", "phase", "selected_from")  # what no interpolation of a run may refer to


@dataclass(eq=False)
class Run:
    """One run of a sweep, and what is known of it: `entry` of its record, `failure` of its last
    attempt."""

    config: dict
    portable: dict
    point: dict
    key: str = field(init=False)
    folder: Path = field(init=False)
    entry: dict | None = None
    failure: dict | None = None

    def __post_init__(self) -> None:
        self.key = records.key_of(self.portable)
        self.folder = records.folder_of(self.portable, self.config["runs_dir"], self.key)

    def look(self, index: ledger.Index) -> "Run":
        """Asks the disk again."""
        self.entry = self.entry or index.done(self.folder)
        self.failure = None if self.entry else ledger.failure(self.folder)
        return self

    @property
    def diverged(self) -> bool:
        return bool(self.failure and self.failure["diverged"])

    @property
    def settled(self) -> bool:
        """Whether there is nothing more to learn: done, or diverged, which is a result as well."""
        return self.entry is not None or self.diverged

    @property
    def record(self) -> dict | None:
        return records.read(self.folder / "record.json") if self.entry else None

    def tell_wider_grid(self) -> None:
        """Where a grid was widened, and its choice stayed: lets the record of a final run that is
        done say so. Nothing else in it changes; a narrower grid leaves it as it is."""
        tried = self.config.get("selected_from") or []
        record = self.record if len(tried) > 1 else None  # and none where it diverged
        if record and set(record["selected_from"]) < set(tried):
            content = records.sealed(record | {"selected_from": tried})
            records.write(self.folder / "record.json", content)


class Cell:
    """One row and column of a table: a backbone, a dataset, a variant of a method; the runs of its
    grid, and the final runs that follow from them."""

    def __init__(self, cfg: DictConfig, points: list[dict], seeds: list[int] | None) -> None:
        self.cfg = cfg
        self.seeds = list(seeds or cfg.protocol.seeds)
        self.resolved: dict[str, tuple[dict, dict]] = {}
        self.grid = [
            self.variant(point | {"phase": "grid", "seed": self.seeds[0]}) for point in points
        ]
        self.ends: tuple[str, list[Run]] | None = None

    @cached_property
    def name(self) -> str:
        cfg = self.cfg
        values = "".join(f", {key}={value}" for key, value in self.varied.items())
        return f"{cfg.method.name} on {cfg.dataset.name}, {cfg.backbone.name}{values}"

    varied: Mapping = {}
    row: Row | None = None

    def variant(self, point: Mapping) -> Run:
        """The cell's run with some values replaced. Raises ValueError for a key that no run has."""
        light = {path: v for path, v in point.items() if path.partition(".")[0] in LIGHT}
        heavy = {path: v for path, v in point.items() if path not in light}
        name = json.dumps(heavy, sort_keys=True)
        if name not in self.resolved:
            cfg = self.cfg
            if heavy:
                cfg = varied_by(cfg, heavy)
            plain = configuration.plain(cfg)
            self.resolved[name] = plain, records.portable(plain)
        plain, portable = self.resolved[name]
        known = {k: v for k, v in point.items() if k not in {"phase", "seed", "selected_from"}}
        shared = {k: v for k, v in light.items() if k not in records.MACHINE}
        return Run(substituted(plain, light), substituted(portable, shared), known)

    def look(self, index: ledger.Index) -> "Cell":
        for run in self.grid:
            run.look(index)
        for run in self.finals():
            run.look(index)
        return self

    @property
    def candidates(self) -> list[Run]:
        """The grid runs between which the choice is made."""
        return self.grid

    @property
    def tuned(self) -> bool:
        """Whether every candidate has been tried."""
        return all(run.settled for run in self.grid)

    def chosen(self) -> Run | None:
        """The best point by its validation accuracy; ties go to the smaller learning rate, then the
        smaller weight decay, then the order of the yaml. None while a point is missing, or where
        all diverged."""
        if not self.tuned:
            return None
        scored = [(i, run) for i, run in enumerate(self.candidates) if run.entry]

        def rank(item: tuple[int, Run]) -> tuple:
            i, run = item
            optim = run.config["optim"]
            return -run.entry["metrics"]["top1_val"], optim["lr"], optim["weight_decay"], i

        return min(scored, key=rank)[1] if scored else None

    def finals(self) -> list[Run]:
        """The final runs, once the grid is done; without a grid, at once."""
        best = self.chosen()
        if self.grid and best is None:
            return []
        name = best.key if best else ""
        if self.ends is None or self.ends[0] != name:
            compared = [run.key for run in self.candidates if run.settled]
            point = best.point if best else {}
            common = point | {"phase": "final", "selected_from": compared}
            self.ends = name, [self.variant(common | {"seed": seed}) for seed in self.seeds]
        return self.ends[1]

    def wanted(self) -> list[Run]:
        """The runs that can be run now."""
        return [*self.grid, *self.finals()]

    @property
    def expected(self) -> int:
        return len(self.grid) + len(self.seeds)


class Derived(Cell):
    """A row that is evaluated and not trained: the final runs of another cell, with a change."""

    def __init__(self, base: Cell, change: Mapping) -> None:
        self.cfg, self.seeds, self.base, self.change = base.cfg, base.seeds, base, dict(change)
        self.grid: list[Run] = []
        self.made: dict[str, Run] = {}

    @property
    def name(self) -> str:
        return self.base.name + "".join(f", {k}={v}" for k, v in self.change.items())

    def look(self, index: ledger.Index) -> "Derived":
        self.base.look(index)
        return super().look(index)

    def finals(self) -> list[Run]:
        """What can be evaluated: of the final runs that are done."""
        for run in self.base.finals():
            if run.entry and run.key not in self.made:
                of = {"of": [run.key], "phase": run.config["phase"]}
                news = {"phase": "derived", "derived": {**self.change, **of}}
                source = {"run": str(run.folder.absolute())}
                self.made[run.key] = Run(run.config | news | source, run.portable | news, run.point)
        return list(self.made.values())


def substituted(config: dict, values: Mapping) -> dict:
    """A copy with the values at dotted paths replaced; what is not on a path is shared."""
    changed = dict(config)
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = changed
        for part in parents:
            _known(path, part, node)
            node[part] = copy.copy(node[part])
            node = node[part]
        _known(path, leaf, node)
        node[leaf] = value
    return changed


def _known(path: str, key: str, node: object) -> None:
    keys = sorted(map(str, node)) if isinstance(node, Mapping) else []
    if key not in keys:
        near = configuration.near(key, keys) if keys else f"nothing lies above {key!r}"
        raise ValueError(f"the grid varies {path!r}, which is no key of a run; {near}")


def product(axes: Mapping | list | None) -> list[dict]:
    """The points of {path: values} in the order of the yaml, the last axis fastest. Of a list,
    those of each of its parts in turn; what is no list there is the only value of its axis."""
    if not axes:
        return [{}]
    points = []
    for part in [axes] if isinstance(axes, Mapping) else axes:
        values = [each if isinstance(each, list) else [each] for each in part.values()]
        points += [dict(zip(part, point, strict=True)) for point in itertools.product(*values)]
    return points


def check(sweep: Mapping) -> None:
    """Raises ValueError for an unknown key or an axis without values."""
    if set(sweep) - KEYS:
        raise ValueError(
            f"sweep {sweep.get('name')} has the unknown key "
            f"{', '.join(sorted(set(sweep) - KEYS))}; there is: {', '.join(sorted(KEYS))}"
        )
    needed = ["dataset"] + ([] if sweep.get("rows") else ["backbone", "method", "protocol"])
    if missing := [key for key in needed if key not in sweep]:
        raise ValueError(f"sweep {sweep.get('name')} has no {', '.join(missing)}")
    axes = [("dataset", sweep["dataset"])]
    if not sweep.get("rows"):
        axes += [("backbone", sweep["backbone"]), ("method", sweep["method"])]
    if isinstance(sweep.get("variants"), Mapping):
        axes += sweep["variants"].items()
    grid = sweep.get("grid") or {}
    parts = grid if isinstance(grid, list) else [grid]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(
            f"sweep {sweep['name']}: grid is {grid!r} and should be "
            "{path: [values]}, or a list of such"
        )
    if isinstance(grid, Mapping):
        axes += grid.items()
    else:  # in a part of several, what is no list is the only value of its axis
        axes += [(k, v if isinstance(v, list) else [v]) for part in grid for k, v in part.items()]
    for key, axis in axes:
        if not axis:
            raise ValueError(f"sweep {sweep['name']} has nothing to run: {key} is empty")
        if not isinstance(axis, list):
            raise ValueError(f"sweep {sweep['name']}: {key} is {axis!r} and should be a list")


def over_datasets(names: list[str], datasets: list[str], given: list[str]) -> Iterator[DictConfig]:
    """The configuration of a backbone and a method on each dataset."""
    first = None
    own = values([text for text in given if text.startswith("dataset.")])
    other = any("dataset" in text and not text.startswith("dataset.") for text in given)
    for dataset in datasets:
        path = configuration.CONFIGS / "dataset" / f"{dataset}.yaml"
        node = OmegaConf.load(path) if first is not None and path.is_file() else None
        # A dataset's yaml that stands alone is the only thing in which the cells of a row differ:
        # it need not be composed again. Its usual protocol counts for nothing here.
        parts = node.pop("defaults", []) if node is not None else []
        whole = node is not None and all(
            str(key).startswith("override") for p in parts for key in p
        )
        if other or not whole:
            cfg = configuration.compose("train", [*names, f"dataset={dataset}", *given])
            configuration.check_applies(cfg.method, cfg.backbone.family)
            first = first or cfg
        else:
            cfg = copy.deepcopy(first)
            cfg.dataset = node
            cfg = varied_by(cfg, own)
        yield cfg


def bases(sweep: Mapping, overrides: list[str]) -> Iterator[DictConfig]:
    """The configuration of every backbone x dataset x method."""
    for backbone, method in itertools.product(sweep["backbone"], sweep["method"]):
        special = (sweep.get("per_method") or {}).get(method, [])
        names = [f"backbone={backbone}", f"method={method}", f"protocol={sweep['protocol']}"]
        given = [*(sweep["overrides"] or []), *special, *overrides]
        yield from over_datasets(names, sweep["dataset"], given)


def varied_by(cfg: DictConfig, changes: Mapping) -> DictConfig:
    """A copy with some values replaced. Raises ValueError for a key that no run has."""
    if not changes:
        return cfg
    cfg = copy.deepcopy(cfg)
    for path, value in changes.items():
        node = cfg
        for part in path.split("."):
            _known(path, part, node)
            node = node[part]
        OmegaConf.update(cfg, path, value, merge=False)
    return cfg


def cells_of(
    sweep: Mapping,
    overrides: list[str],
    make=Cell,
    rows: list[int] | None = None,
    datasets: list[str] | None = None,
) -> list[Cell]:
    """Every cell of a sweep, checked before anything runs: of a table only some `rows`, by number,
    and `datasets`, by the names of their tasks. Raises ValueError for an unknown key, an empty
    axis, a row or task that is not there, or a method that does not apply to a backbone."""
    sweep = {"grid": None, "seeds": None, "overrides": [], **sweep}
    check(sweep)
    if datasets:
        known = {name.rpartition("/")[2]: name for name in sweep["dataset"]}
        if absent := [name for name in datasets if name.rpartition("/")[2] not in known]:
            near = configuration.near(absent[0], list(known))
            raise ValueError(f"sweep {sweep['name']} has no dataset {absent[0]!r}; {near}")
        sweep = {**sweep, "dataset": [known[name.rpartition("/")[2]] for name in datasets]}
    if sweep.get("rows"):
        return list(cells_of_rows(sweep, overrides, make, rows))
    if rows:
        raise ValueError(f"rows={rows} asks for rows of a table, and {sweep['name']} is none")
    points = product(sweep["grid"]) if sweep["grid"] else []
    cells = []
    for base, varied in itertools.product(bases(sweep, overrides), product(sweep.get("variants"))):
        cell = make(varied_by(base, varied), points, sweep["seeds"])
        cell.varied = varied
        cells.append(cell)
    return cells


def cells_of_rows(
    sweep: Mapping,
    overrides: list[str],
    make=Cell,
    chosen: list[int] | None = None,
    trained: dict[tuple, Cell] | None = None,
) -> Iterator[Cell]:
    """The cells of a published table, row by row; absent rows have none. What comes later wins:
    the recipe, its values of a task, the row, the sweep, the command line. A sweep's own grid or
    seeds replace those of the recipes."""
    rows = rows_of(sweep)
    if bad := set(chosen or []) - {row.number for row in rows}:
        listed = "; ".join(f"{row.number} {row.label}" for row in rows)
        raise ValueError(f"{sweep['name']} has no row {min(bad)}; there is: {listed}")
    trained = {} if trained is None else trained  # what others derive from, by row and task
    for row in sorted(rows, key=lambda row: bool(row.derive)):
        if row.absent or (chosen and row.number not in chosen):
            continue
        if row.derive:
            yield from derived_cells(sweep, overrides, make, row, rows, trained)
            continue
        said = recipe(row.recipe)
        late = [*row.overrides, *(sweep["overrides"] or []), *overrides]
        names = [f"backbone={row.backbone}", f"method={row.method}", f"protocol={said['protocol']}"]
        grid = said["grid"] if sweep["grid"] is None else sweep["grid"]
        points, seeds = product(grid) if grid else [], sweep["seeds"] or said["seeds"]
        fixed = values(late)
        for base in over_datasets(names, sweep["dataset"], [*said["overrides"], *late]):
            own = task_values(row, base.dataset.name)
            base = varied_by(base, {path: v for path, v in own.items() if path not in fixed})
            for varied in product(row.variants):
                kind = make if points else Cell  # without a grid there is nothing to sample
                cell = kind(varied_by(base, varied), points, seeds)
                cell.varied, cell.row = varied, row
                trained[row.number, base.dataset.name] = cell
                yield cell


def derived_cells(
    sweep: Mapping, overrides: list[str], make, row: Row, rows: list[Row], trained: dict
) -> Iterator[Derived]:
    """The cells of a row that is derived from the row beside it that has all but `derive`, after
    that row's own where nobody asked for them. Raises ValueError where there is no such row."""
    same = ("backbone", "method", "recipe", "overrides")
    fits = (r for r in rows if not r.derive and all(getattr(r, k) == getattr(row, k) for k in same))
    base = next(fits, None)
    if base is None:
        raise ValueError(f"row {row.number} of {sweep['name']} derives from no row beside it")
    tasks = [name.rpartition("/")[2] for name in sweep["dataset"]]
    if missing := [task for task in tasks if (base.number, task) not in trained]:
        names = [name for name in sweep["dataset"] if name.rpartition("/")[2] in missing]
        yield from cells_of_rows(
            {**sweep, "dataset": names}, overrides, make, [base.number], trained
        )
    for task in tasks:
        cell = Derived(trained[base.number, task], row.derive)
        cell.row = row
        yield cell


def seconds_left(cells: list[Cell]) -> float | None:
    """Estimated from the records of the same cell, else of the same sweep; None where there is
    none."""
    known = {cell: [run.entry["seconds"] for run in cell.wanted() if run.entry] for cell in cells}
    every = [seconds for own in known.values() for seconds in own]
    if not every:
        return None
    mean = sum(every) / len(every)
    left = 0.0
    for cell, own in known.items():
        settled = sum(run.settled for run in cell.wanted())
        left += (cell.expected - settled) * (sum(own) / len(own) if own else mean)
    return left
