"""What an experiment costs before anything of it has run: runs and floating-point operations.

    python -m scripts.effort rlrr/table2           # a line for each experiment; without a name, all
    python -m scripts.effort rlrr/table2 --write   # the same into the comment of its yaml

Counted, not measured: forward passes of the plain backbone by torch's counter, two for an image
that is trained on (no gradient of frozen weights), three where all weights train, one for an image
that is tested; in linear probing without augmentation one for each image and no more. Hours are
those of one H100 at a third of the bf16 peak of its data sheet, which compiled packs reach: 33 %
with LoRA, 38 % with RLRR, on an H200 (results/bench/pack-cuda.json).
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from omegaconf import DictConfig

import data
from peft.cells import Cell, Derived, cells_of
from peft.config import build, compose, plain
from peft.record import write
from peft.rows import CONFIGS
from scripts import experiments
from scripts.bench.measure import flops

RATE = 989e12 / 3  # operations a second
SAID = re.compile(r"(?<=^# Cost: ).*? runs( that are Table \d+'s)?, .*? (?:hours|minutes)", re.M)


class Effort(NamedTuple):
    runs: int  # trainings, of which a published row needs its grid and its final seeds
    evaluations: int  # of rows that are derived from the final runs of another
    operations: float

    def __str__(self) -> str:
        hours = self.operations / RATE / 3600
        time = f"{60 * hours:.0f} minutes" if hours < 1 else f"{hours:.{int(hours < 10)}f} hours"
        runs = f"{self.runs:,} runs"
        if self.evaluations:
            runs = f"{self.evaluations:,} evaluations beside {runs}"
        return f"{runs}, {self.operations:.1e} FLOPs, which is {time}".replace("e+", "e")


@cache
def forward(backbone: str, pixels: int, classes: int) -> int:
    """Operations of one image's forward pass through the plain backbone and a head."""
    cfg = compose("train", [f"backbone={backbone}", "method=linear"])
    size = {"num_classes": classes, "image_size": pixels, "pretrained": False}
    with torch.device("meta"):
        model = build(cfg.backbone, cfg.method, **size).eval()
        image = torch.empty(1, 3, pixels, pixels)
    with torch.no_grad():
        return flops(lambda: model(image))


def of_cell(cell: Cell) -> Effort:
    """What one cell takes: its grid on the tuning split and its final runs."""
    cfg, seeds = cell.cfg, len(cell.seeds)
    splits, protocol = cfg.dataset.splits, cfg.protocol
    image = forward(cfg.backbone.name, cfg.image_size, cfg.dataset.num_classes)
    tested = splits[protocol.final.score_on]
    if isinstance(cell, Derived):
        return Effort(0, seeds, seeds * tested * image)
    peeks = protocol.selection == "best_on_test"
    grid, _ = trained(cfg, splits[protocol.tune.train_on])
    final, epochs = trained(cfg, splits[protocol.final.train_on])
    grid += splits[protocol.tune.score_on]
    final += tested * (math.ceil(epochs / protocol.peek_every) if peeks else 1)
    points = len(cell.grid)
    return Effort(points + seeds, 0, image * (points * grid + seeds * final))


def trained(cfg: DictConfig, images: int) -> tuple[float, float]:
    """Forward passes that training on a split is worth, and the epochs in which it sees them."""
    preset = data.Preset(**plain(cfg.preset))
    varies = preset.train.random or preset.flips(cfg.dataset.name) or preset.erase
    if cfg.method.name == "linear" and not varies:
        return images, 1  # from features, computed once and judged by (data/features.py)
    epochs = cfg.optim.epochs
    if cfg.optim.steps:
        epochs = cfg.optim.steps / math.ceil(images / cfg.optim.batch_size)
    return (3 if cfg.method.name == "full" else 2) * epochs * images, epochs


def effort(cells: Iterable[Cell]) -> Effort:
    return Effort(*map(sum, zip(*map(of_cell, cells), strict=True)))


def of_experiment(name: str) -> Effort:
    return effort(cells_of(experiments.sweep(name), []))


def comment(name: str) -> tuple[str, str]:
    """The yaml of an experiment, as it is and with what its comment says of the cost counted anew.
    Raises ValueError for one that says nothing."""
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    said = SAID.search(text)
    if said is None:
        raise ValueError(f"the comment of {name} has no line that begins with '# Cost: N runs, '")
    counted = str(of_experiment(name)).replace(" runs,", f" runs{said[1] or ''},")
    return text, text[: said.start()] + counted + text[said.end() :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="e.g. rlrr/table2; default: all")
    parser.add_argument("--write", action="store_true", help="into the comments of the yamls")
    args = parser.parse_args()
    for name in args.names or experiments.names():
        try:
            before, after = comment(name)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(f"{name}: {SAID.search(after)[0]}", flush=True)
        if args.write and after != before:
            write(CONFIGS / "experiment" / f"{name}.yaml", after)


if __name__ == "__main__":
    main()
