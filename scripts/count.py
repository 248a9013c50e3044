"""Numbers of parameters, counted on models, beside the published ones.

    python -m scripts.count [--backbone NAME] [--method NAME]    one table
    python -m scripts.count --check                              exit status 1 on any disagreement
    python -m scripts.count --errata                             the section of errata.md, made anew

The published figures and the way each is counted are data: results/published/params_expected.csv.
There `on`, `run` and `overrides` are a backbone, a method and what `train.py` would be told; `mix`
gives an override several values with their weights (a mean over tasks, each with its own value);
`counted` is `all` or `weights` (no one-dimensional tensors); `head` is the table's convention:
none, vtab or fgvc (the mean head over the benchmark's tasks), fgvc4 (without NABirds), a number of
classes, or +N parameters. Models are built on the meta device: shapes without memory.
"""

import argparse
import csv
import functools
import math
import re
import sys
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate

import peft
from peft.backbone import head_path
from peft.config import build, catalogue, compose, plain
from peft.layers import innermost

PUBLISHED = Path(__file__).parent.parent / "results" / "published"
MEAN_CLASSES = {
    "vtab": Fraction(940, 19),
    "fgvc": Fraction(200 + 555 + 102 + 120 + 196, 5),
    "fgvc4": Fraction(200 + 102 + 120 + 196, 4),
}
PROBE = 7919  # classes of the counted head: a prime, so that its tensors are told by their size


class Count(NamedTuple):
    tuned: int  # trainable outside the head
    weights: int  # of these, in tensors of two dimensions or more
    head: tuple[int, int]  # parameters of the head: those of every head, and those per class
    backbone: int
    formula: str
    predicted: int | None  # what the formula of the method's yaml gives, on a plain ViT


@functools.cache
def count(backbone: str, method: str, overrides: str = "") -> Count:
    """Builds and counts one model. Raises ValueError for unknown names, keys or combinations."""
    cfg = compose("train", [f"backbone={backbone}", f"method={method}", *overrides.split()])
    with torch.device("meta"):
        model = build(cfg.backbone, cfg.method, num_classes=PROBE, pretrained=False)
    counts = peft.count(model)
    head = {id(p) for p in model.get_submodule(head_path(model)).parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    slope = sum(p.numel() for p in trained if id(p) in head and PROBE in p.shape) // PROBE
    weights = sum(p.numel() for p in trained if id(p) not in head and p.dim() > 1)
    predicted, formula = None, str(cfg.method.formula)
    plain_numbers = all(re.fullmatch(r"method\.(?!layers)\w+=[\d.]+", o) for o in overrides.split())
    if cfg.backbone.family == "vit" and plain_numbers:  # a formula is for the yaml's own placements
        names = {k: v for k, v in plain(cfg.method).items() if isinstance(v, (int, float))}
        size = {"d": model.embed_dim, "L": len(innermost(model.blocks))}
        names |= size | {"backbone": counts["backbone"]}
        predicted = eval(formula, {"max": max, "min": min}, names)
    fixed = counts["head"] - slope * PROBE
    return Count(counts["tuned"], weights, (fixed, slope), counts["backbone"], formula, predicted)


def rows() -> list[dict[str, str]]:
    """The published figures."""
    with open(PUBLISHED / "params_expected.csv", newline="") as file:
        return list(csv.DictReader(file))


def half_up(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


def head_of(row: dict[str, str], counted: Count) -> int:
    """The head that a row's convention adds to the tuned parameters."""
    convention, (fixed, slope) = row["head"], counted.head
    if convention == "none":
        return 0
    if convention.startswith("+"):
        return int(convention)
    classes = MEAN_CLASSES[convention] if convention in MEAN_CLASSES else int(convention)
    return fixed + half_up(slope * classes)


def reproduce(row: dict[str, str]) -> tuple[int, int, Count]:
    """The tuned parameters and the head of a row, in its convention, and one of its counts."""
    settings = [(row["overrides"], 1)]
    if row["mix"]:
        pairs = [entry.rsplit("*", 1) for entry in row["mix"].split()]
        settings = [(f"{row['overrides']} {value}".strip(), int(n)) for value, n in pairs]
    counts = [(count(row["on"], row["run"], overrides), n) for overrides, n in settings]
    numbers = [(c.weights if row["counted"] == "weights" else c.tuned, n) for c, n in counts]
    tuned = Fraction(sum(value * n for value, n in numbers), sum(n for _, n in numbers))
    return half_up(tuned), head_of(row, counts[0][0]), counts[0][0]


def as_published(row: dict[str, str], total: int, counted: Count) -> str:
    """A count in the unit and with the decimals of the published figure."""
    figure, _, unit = row["published"].partition(" ")
    whole = counted.backbone + head_of(row, counted)
    number = total / {"M": Decimal(10**6), "%": Decimal(whole) / 100, "": Decimal(1)}[unit]
    exponent = Decimal(1).scaleb(-len(figure.partition(".")[2]))
    return f"{number.quantize(exponent, ROUND_HALF_UP)} {unit}".strip()


def problems(row: dict[str, str]) -> Iterator[str]:
    """What is wrong with one row: nothing, where the model agrees with what the row says of it."""
    if not row["run"]:
        if not row["reason"]:
            yield "is not counted and gives no reason"
        return
    try:
        tuned, head, counted = reproduce(row)
    except ValueError as error:
        yield str(error)
        return
    if tuned + head != int(row["expected"]):
        yield f"counts {tuned:,} + {head:,} = {tuned + head:,}, expected {int(row['expected']):,}"
    if counted.predicted not in (None, counted.tuned):
        yield f"counts {counted.tuned:,}, but {counted.formula} = {counted.predicted:,}"
    shown = as_published(row, tuned + head, counted)
    if (shown == row["published"]) != (row["agrees"] == "yes"):
        yield f"is {shown} against {row['published']}, yet agrees={row['agrees']}"
    if row["agrees"] == "no" and not row["reason"]:
        yield f"is {shown} against {row['published']} and gives no reason"


def name_of(row: dict[str, str]) -> str:
    return f"{row['paper']}, {row['table']}, {row['backbone']}, {row['method']}"


def check() -> int:
    """Prints every disagreement; the number of them."""
    found = [f"{name_of(row)}: {text}" for row in rows() for text in problems(row)]
    page = PUBLISHED / "errata.md"
    if not page.is_file() or errata() not in page.read_text():
        found.append(f"results/published/{page.name} lacks the rows printed by --errata")
    counted = sum(bool(row["run"]) for row in rows())
    print(*found, sep="\n", end="\n" * bool(found))
    print(f"{len(rows())} published counts, {counted} counted on models, {len(found)} problems")
    return len(found)


def errata() -> str:
    """The rows whose published figure is not what the models count, as Markdown."""
    lines = []
    for row in rows():
        if not row["run"] or row["agrees"] == "no":
            ours = f"{int(row['expected']):,}" if row["expected"] else ""
            where = f"{row['paper']}, {row['table']}"
            cells = (where, row["backbone"], row["method"], row["published"], ours, row["reason"])
            lines.append(f"| {' | '.join(cells)} |")
    header = ["| table | backbone | method | published | counted | why |", f"|{'---|' * 6}"]
    return "\n".join(header + lines)


def table(backbone: str | None, method: str | None) -> str:
    """Every published figure that is counted, and every method on a plain ViT that no table has."""
    lines: dict[tuple[str, ...], None] = {}
    seen = set()

    def line(label: str, on: str, tuned: int, counted: Count, *rest: str) -> None:
        share = f"{100 * tuned / counted.backbone:.3f} %"
        formula = "" if counted.predicted is None else counted.formula
        lines[(label, on, f"{tuned:,}", rest[0], share, formula, *rest[1:])] = None

    for row in rows():
        seen.add((row["on"], row["run"]))
        if not row["run"] or backbone not in (None, row["on"]) or method not in (None, row["run"]):
            continue
        try:
            tuned, head, counted = reproduce(row)
        except ValueError:  # `--check` says why
            continue
        told = re.sub(r"\b(method|backbone)\.", "", f"{row['overrides']} {row['mix']}").strip()
        shown = as_published(row, tuned + head, counted)
        verdict = "agrees" if shown == row["published"] else f"is {shown}"
        heads = "" if row["head"] == "none" else f"{head:,} ({row['head']})"
        line(f"{row['run']} {told}", row["on"], tuned, counted, heads, row["published"], verdict)
    on = backbone or "vit_b16_in21k"
    for name in [method] if method else catalogue("method"):
        if (on, name) not in seen:
            try:
                counted = count(on, name)
            except ValueError:  # it does not apply to this family
                if method:
                    raise
                continue
            line(name, on, counted.tuned, counted, "", "", "")
    head = ("method", "backbone", "tuned", "head", "share", "formula", "published", "verdict")
    sides = ("left", "left", "right", "right", "right", "left", "right", "left")
    widths = [36, None, None, None, None, 40, None, None]
    ordered = sorted(lines, key=lambda cells: (cells[1], cells[0]))
    return tabulate(ordered, head, colalign=sides, maxcolwidths=widths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 on any disagreement")
    parser.add_argument("--errata", action="store_true", help="print the section of errata.md")
    parser.add_argument("--backbone", choices=catalogue("backbone"), metavar="NAME")
    parser.add_argument("--method", choices=catalogue("method"), metavar="NAME")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(1 if check() else 0)
    try:
        print(errata() if arguments.errata else table(arguments.backbone, arguments.method))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
