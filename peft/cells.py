"""The cells of a sweep: which runs it consists of, and which point of a grid wins.

Plain dictionaries. Composing costs a tenth of a second, replacing a value a tenth of a millisecond:
a cell is composed once, and its points are made by substitution.
"""

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

KEYS = {
    *("name", "backbone", "dataset", "method", "protocol", "variants", "grid", "seeds"),
    *("overrides", "per_method"),
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
        self.folder = records.folder_of(self.portable, self.config["runs_dir"])

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

    def variant(self, point: Mapping) -> Run:
        """The cell's run with some values replaced. Raises ValueError for a key that no run has."""
        light = {path: v for path, v in point.items() if path.partition(".")[0] in LIGHT}
        heavy = {path: v for path, v in point.items() if path not in light}
        name = json.dumps(heavy, sort_keys=True)
        if name not in self.resolved:
            cfg = self.cfg
            if heavy:
                cfg = OmegaConf.create(OmegaConf.to_container(cfg))
                for path, value in heavy.items():
                    _known(OmegaConf.select(cfg, path, default=KeyError) is not KeyError, path)
                    OmegaConf.update(cfg, path, value, merge=False)
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


def substituted(config: dict, values: Mapping) -> dict:
    """A copy with the values at dotted paths replaced; what is not on a path is shared."""
    copy = dict(config)
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = copy
        for part in parents:
            _known(isinstance(node.get(part), dict), path)
            node[part] = dict(node[part])
            node = node[part]
        _known(leaf in node, path)
        node[leaf] = value
    return copy


def _known(there: bool, path: str) -> None:
    if not there:
        raise ValueError(f"the grid varies {path!r}, which is no key of a run")


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
    axes = {"backbone": sweep["backbone"], "dataset": sweep["dataset"], "method": sweep["method"]}
    for part in ("grid", "variants"):
        if isinstance(sweep.get(part), Mapping):
            axes |= sweep[part]
    for key, values in axes.items():
        if not values:
            raise ValueError(f"sweep {sweep['name']} has nothing to run: {key} is empty")
        if not isinstance(values, list):
            raise ValueError(f"sweep {sweep['name']}: {key} is {values!r} and should be a list")


def bases(sweep: Mapping, overrides: list[str]) -> Iterator[DictConfig]:
    """The configuration of every backbone x dataset x method."""
    for backbone, method in itertools.product(sweep["backbone"], sweep["method"]):
        special = (sweep.get("per_method") or {}).get(method, [])
        given = [*(sweep["overrides"] or []), *special, *overrides]
        first = None
        for dataset in sweep["dataset"]:
            path = configuration.CONFIGS / "dataset" / f"{dataset}.yaml"
            node = OmegaConf.load(path) if first is not None and path.is_file() else None
            # A dataset's yaml that stands alone is the only thing in which the cells of a row
            # differ: it need not be composed again.
            if node is None or "defaults" in node or any("dataset" in text for text in given):
                names = [f"backbone={backbone}", f"dataset={dataset}", f"method={method}"]
                cfg = configuration.compose(
                    "train", [*names, f"protocol={sweep['protocol']}", *given]
                )
                configuration.check_applies(cfg.method, cfg.backbone.family)
                first = first or cfg
            else:
                cfg = OmegaConf.create(OmegaConf.to_container(first))
                cfg.dataset = node
            yield cfg


def cells_of(sweep: Mapping, overrides: list[str], make=Cell) -> list[Cell]:
    """Every cell of a sweep, checked before anything runs. Raises ValueError for an unknown key, an
    empty axis, or a method that does not apply to a backbone."""
    check(sweep)
    points = product(sweep["grid"]) if sweep["grid"] else []
    cells = []
    for base, varied in itertools.product(bases(sweep, overrides), product(sweep.get("variants"))):
        cfg = base
        if varied:
            cfg = OmegaConf.create(OmegaConf.to_container(base))
            for path, value in varied.items():
                _known(OmegaConf.select(cfg, path, default=KeyError) is not KeyError, path)
                OmegaConf.update(cfg, path, value, merge=False)
        cell = make(cfg, points, sweep["seeds"])
        cell.varied = varied
        cells.append(cell)
    return cells
