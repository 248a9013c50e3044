"""The rows of a published table, as data: which runs each of them stands for.

An experiment's yaml lists `rows` where another sweep has backbones and methods. A row names its
backbone and method as the folders of `configs/` do, what it changes of them, and its recipe: how
its runs are tuned and trained, `configs/recipe/NAME.yaml`. Needs neither torch nor Hydra, so that
a table can say which command fills it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

CONFIGS = Path(__file__).parent.parent / "configs"
KEYS = {
    *("backbone", "method", "variant", "overrides", "variants", "recipe", "printed", "derive"),
    "absent",
}
RECIPE = {"protocol", "overrides", "grid", "seeds", "tasks"}


@dataclass(frozen=True)
class Row:
    """One row of a table, `number` counting from 1 in the paper's order."""

    number: int
    backbone: str  # as in configs/backbone
    method: str  # as in configs/method
    recipe: str
    variant: str = ""  # as in the files of results/published
    overrides: list[str] = field(default_factory=list)
    variants: dict[str, list] = field(default_factory=dict)  # one cell for each of their points
    printed: dict[str, str] = field(default_factory=dict)  # names by which the paper differs
    derive: dict = field(default_factory=dict)  # what is evaluated differently: no training
    absent: str = ""  # why no run stands for it; empty where one does

    @property
    def published(self) -> tuple[str, str, str, str]:
        """backbone, pretraining, method, variant: its key in a file of results/published."""
        backbone = self.printed.get("backbone", self.backbone)
        for name in ("augreg_in21k", "mae_in1k", "mocov3_in1k"):
            if backbone.endswith("_" + name):
                return backbone.removesuffix("_" + name), name, self._method, self.variant
        return *backbone.rpartition("_")[::2], self._method, self.variant

    @property
    def _method(self) -> str:
        return self.printed.get("method", self.method)

    @property
    def label(self) -> str:
        return f"{self._method}{f' {self.variant}' if self.variant else ''}, {self.backbone}"


def rows_of(sweep: Mapping) -> list[Row]:
    """The rows of a sweep. Raises ValueError for a key that no row has, naming the row."""
    found = []
    for number, given in enumerate(sweep.get("rows") or [], start=1):
        where = f"row {number} of {sweep['name']}"
        if unknown := set(given) - KEYS:
            raise ValueError(
                f"{where} has the unknown key {', '.join(sorted(unknown))}; there is: "
                f"{', '.join(sorted(KEYS))}"
            )
        if not (given.get("backbone") and given.get("method")):
            raise ValueError(f"{where} names no backbone and method: {dict(given)}")
        known = {"recipe": sweep.get("recipe") or "", **given}
        if not (known["recipe"] or known.get("absent")):
            raise ValueError(f"{where} has neither a recipe nor a reason to be absent")
        both = [*(sweep.get("overrides") or []), *(known.pop("overrides", None) or [])]
        found.append(Row(number, overrides=both, **known))
    return found


@cache
def recipe(name: str) -> dict:
    """A recipe: `protocol`, `overrides` of every run, the `grid` that is searched (none: {}),
    `seeds` (none: the protocol's), and the values that a task has of its own, `tasks`: {task:
    {path: value}}. Raises ValueError for one that is not there or has another key."""
    path = CONFIGS / "recipe" / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"there is no recipe {name!r}; there is: {there}")
    found = OmegaConf.to_container(OmegaConf.load(path))
    if set(found) - RECIPE or "protocol" not in found:
        raise ValueError(
            f"{path} has the keys {', '.join(sorted(found))}; a recipe has protocol and may have "
            f"{', '.join(sorted(RECIPE - {'protocol'}))}"
        )
    return {"overrides": [], "grid": {}, "seeds": None, "tasks": {}, **found}


def axes(grid: Mapping | list) -> set[str]:
    """The paths that a grid varies, of all its parts where it has several."""
    return {path for part in (grid if isinstance(grid, list) else [grid]) for path in part}


def values(overrides: list[str]) -> dict[str, object]:
    """Overrides of the command line as {path: value}, without those that choose from a group."""
    pairs = [text.lstrip("+").partition("=") for text in overrides]
    return {path: meant(text) for path, _, text in pairs if "." in path}


def meant(text: str) -> object:
    """A value as the command line writes it: 1e-3 is a number, [1,2] a list."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]


def task_values(row: Row, task: str) -> dict[str, object]:
    """What a recipe fixes for one task, less what the row itself decides. Raises ValueError for a
    task that a recipe with per-task values does not know."""
    tasks = recipe(row.recipe)["tasks"]
    if tasks and task not in tasks:
        raise ValueError(
            f"the recipe {row.recipe} of row {row.number} has no values for {task}; it has: "
            f"{', '.join(tasks)}"
        )
    own = values(row.overrides)
    return {path: value for path, value in tasks.get(task, {}).items() if path not in own}


def matches(record: Mapping, row: Row) -> bool:
    """Whether a record is a run of this row: its backbone, its method, and every hyper-parameter of
    the method where the row has it. Those that the recipe's grid varies may have any value."""
    if row.absent or (record["backbone"], record["method"]) != (row.backbone, row.method):
        return False
    change = record["config"].get("derived") or {}
    if {key: value for key, value in change.items() if key not in ("of", "phase")} != row.derive:
        return False
    said = recipe(row.recipe)
    expected = values(said["overrides"]) | said["tasks"].get(record["task"], {})
    expected |= values(row.overrides)
    own = {path.partition(".")[2]: v for path, v in expected.items() if path.startswith("method.")}
    free = {path.partition(".")[2] for path in {*axes(said["grid"]), *row.variants}} | set(own)
    free |= set(row.derive)  # what is derived says so in its variant
    changed = set(re.findall(r"(?:^|,)(\w+)=", record["variant"]))
    method = record["config"]["method"]
    return changed <= free and all(method.get(key) == value for key, value in own.items())


def rows_told(sweep: Mapping, cells: Sequence) -> Iterator[str]:
    """A line for each row of a published table: its runs and its recipe, or why it has none."""
    for row in rows_of(sweep):
        own = [cell for cell in cells if cell.row == row]
        if row.absent:
            yield f"  {row.number:2} {row.label}: not planned: {row.absent}"
        elif own:
            done = sum(run.entry is not None for cell in own for run in cell.wanted())
            points = f", {len(own[0].grid)} points a cell" if own[0].grid else ""
            yield (
                f"  {row.number:2} {row.label}: {sum(cell.expected for cell in own)} "
                f"{'evaluations' if row.derive else 'runs'}, {done} done ({row.recipe}; "
                f"{own[0].cfg.protocol.name}{points})"
            )
