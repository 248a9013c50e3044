"""Why is my number different? What differs between two runs, or between two folders of runs.

    python -m scripts.diff RUN_A RUN_B      records, their folders, or folders of runs

The accuracy gap stands on top; below it everything that differs, in the order in which it usually
explains a gap: what the pixels were, how they were normalised, which checkpoint, what was trained
on and which epoch counts, hyper-parameters, seeds, versions, hardware. Two folders are compared
cell by cell, over the cells that both have.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import record as records
from scripts import runs
from scripts.tables import DASH, text_of

# What usually explains a gap, first things first: a heading, and paths into a record.
ORDER = {
    "data and pixels": [
        *("suite", "task", "config.dataset", "provenance.pixels", "provenance.data_sha256"),
        *("config.image_size", "provenance.kernel", "config.preset"),
    ],
    "input statistics": ["provenance.mean", "provenance.std"],
    "checkpoint": [
        *("backbone", "provenance.weights", "provenance.weights_sha256", "config.weights"),
        "config.backbone",
    ],
    "protocol and selection": [
        *("phase", "protocol", "selection", "trained_on", "config.protocol", "selected_from"),
        "derived_from",
    ],
    "method": ["method", "variant", "config.method", "tuned_params", "head_params"],
    "hyper-parameters": [
        *("config.optim.optimizer", "config.optim.lr", "config.optim.weight_decay"),
        *("config.optim.epochs", "config.optim.steps", "config.optim.batch_size"),
        *("config.optim", "config.precision", "provenance.precision"),
    ],
    "seeds": ["seed", "config.seed", "config.data_seed", "config"],
    "versions": ["provenance.git_commit", "provenance.git_dirty", "provenance.versions"],
    "hardware": ["device", "provenance", "seconds", "images_per_second", "peak_memory_bytes"],
}
SAID_ABOVE = {"key", "metrics", "file"}  # the gap on top, or where the record lies
NEVER_ALIKE = {"seconds", "images_per_second", "peak_memory_bytes"}  # no reason for a gap
TWICE = {
    *("config.seed", "config.phase", "config.method.name", "config.backbone.name"),
    *("config.dataset.name", "config.dataset.suite", "config.dataset.group"),
    *("config.protocol.name", "config.protocol.selection"),
}  # said by a field of the record as well
ABSENT = "(absent)"


def place_of(path: str) -> tuple[int, int, str]:
    """Where a path stands: the longest of the paths in ORDER that leads to it decides."""
    best = (0, len(ORDER), 0)
    for group, paths in enumerate(ORDER.values()):
        for position, prefix in enumerate(paths):
            if path == prefix or path.startswith(prefix + "."):
                best = max(best, (len(prefix), group, position))
    return *best[1:], path


def differences(one: Mapping, other: Mapping) -> list[tuple[str, str, object, object]]:
    """(heading, path, value of one, value of the other), what usually matters first."""
    ours, theirs = _flat_record(one), _flat_record(other)
    headings = [*ORDER, "the rest"]
    found = []
    for path in sorted({*ours, *theirs}, key=place_of):
        a, b = ours.get(path, ABSENT), theirs.get(path, ABSENT)
        hidden = path in TWICE or path.partition(".")[0] in SAID_ABOVE | NEVER_ALIKE
        if a != b and not hidden:
            found.append((headings[place_of(path)[0]], path, a, b))
    return found


def _flat_record(record: Mapping) -> dict[str, object]:
    """A record's leaves; a key that was added to the configuration later has its default."""
    added = {f"config.{path}": value for path, value in records.ADDED_LATER.items()}
    tried = record["selected_from"]
    chosen = f"best of {len(tried)} grid runs" if tried else "nothing was tuned"
    return {**added, **records.flat(record), "selected_from": chosen}


def gap(one: Mapping, other: Mapping) -> list[str]:
    """The accuracy that counts, then every metric of two records and their differences."""
    counts = [runs.metric_of(record) for record in (one, other)]
    lines = []
    if counts[0] != counts[1]:
        a, b = one["metrics"].get(counts[0]), other["metrics"].get(counts[1])
        change = f"   {b - a:+.2f}" if None not in (a, b) else ""
        lines.append(f"  what counts: {counts[0]} of A, {counts[1]} of B{change}")
    named = {*one["metrics"], *other["metrics"]}
    for name in sorted(named, key=lambda name: (not name.startswith("top1"), name)):
        a, b = (record["metrics"].get(name) for record in (one, other))
        change = f"   {b - a:+.2f}" if None not in (a, b) else ""
        lines.append(f"  {name:<12} {_figure(a):>8}   {_figure(b):>8}{change}")
    return lines


def _figure(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def shown(*values: object) -> tuple[str, ...]:
    """Values as text; of long ones the part where they begin to differ."""
    texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    if max(map(len, texts)) <= 80:
        return tuple(texts)
    differ = (i for i, signs in enumerate(zip(*texts)) if len({*signs}) > 1)
    start = max(next(differ, min(map(len, texts))) - 16, 0)
    return tuple(
        "… " * bool(start) + text[start : start + 72] + " …" * (len(text) > start + 72)
        for text in texts
    )


def compare(one: Mapping, other: Mapping) -> str:
    """Two records."""
    lines = [f"A  {runs.named(one)}", f"B  {runs.named(other)}", "", *gap(one, other)]
    found = differences(one, other)
    if not found:
        return "\n".join([*lines, "", "Nothing else differs but the clock."])
    heading = ""
    for name, path, a, b in found:
        if name != heading:
            lines += ["", name]
            heading = name
        a, b = shown(a, b)
        lines += [f"  {path}", f"    A {a}", f"    B {b}"]
    if one["key"] == other["key"]:
        lines += ["", "Both have the same key: the same run, done twice."]
    return "\n".join(lines)


def compare_folders(ours: Sequence[dict], theirs: Sequence[dict]) -> str:
    """Two folders: the cells that both have, by their gap, and what differs across all of them."""
    grids = [_grid(found) for found in (ours, theirs)]
    both = [cell for cell in grids[0] if cell in grids[1]]
    if not both:
        raise ValueError(
            "The two folders have no cell in common (method, variant, backbone and task): A has "
            f"{_some(grids[0])}; B has {_some(grids[1])}."
        )
    lines, common = [], {}
    ordered = sorted(both, key=lambda cell: -abs(grids[1][cell].mean - grids[0][cell].mean))
    width = max(len(_name(cell)) for cell in both)
    lines.append(f"{len(both)} cells in both, top-1 of A, of B, and B − A; the largest gap first")
    for cell in ordered:
        a, b = (grid[cell] for grid in grids)
        change = f"{b.mean - a.mean:+.2f}"
        texts = text_of(a.mean, a.std, 2), text_of(b.mean, b.std, 2)
        lines.append(f"  {_name(cell):<{width}}  {texts[0]:>13}  {texts[1]:>13}  {change:>7}")
        for name, path, *values in differences(a.record, b.record):
            entry = common.setdefault((name, path), {})
            entry.setdefault(shown(*values), []).append(cell)
    mean = sum(grids[1][cell].mean - grids[0][cell].mean for cell in both) / len(both)
    lines.append(f"  {'mean gap':<{width}}  {'':>13}  {'':>13}  {mean:>+7.2f}")
    for label, grid, others in (("A", *grids), ("B", *grids[::-1])):
        alone = [cell for cell in grid if cell not in others]
        if alone:
            lines.append(f"only in {label}: {_some(alone)}")
    lines += _across(common, len(both)) or ["", "Nothing else differs but the clock."]
    return "\n".join(lines)


def _across(common: Mapping, cells: int) -> list[str]:
    """What differs, once for all the cells in which it does."""
    lines, heading = [], ""
    for (name, path), values in sorted(common.items(), key=lambda item: place_of(item[0][1])):
        if name != heading:
            lines += ["", name]
            heading = name
        count = sum(map(len, values.values()))
        lines.append(f"  {path}, in {count} of {cells} cells")
        for a, b in list(values)[:3]:
            lines += [f"    A {a}", f"    B {b}"]
        if len(values) > 3:
            lines.append(f"    … and {len(values) - 3} other pairs")
    return lines


def _grid(found: Sequence[dict]) -> dict[tuple, runs.Cell]:
    grid = runs.cells(found)
    return {(*row, *column): cell for row in grid for column, cell in grid[row].items()}


def _name(cell: tuple) -> str:
    method, variant, backbone, _, _, task = cell
    return f"{method}{f' ({variant})' if variant else ''}, {backbone}, {task}"


def _some(cells: Sequence[tuple]) -> str:
    names = [_name(cell) for cell in cells]
    return "; ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4) or "nothing"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.diff", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name in ("A", "B"):
        parser.add_argument(name, metavar=f"RUN_{name}", type=Path)
    options = parser.parse_args(arguments)
    ours, theirs = runs.collect(options.A), runs.collect(options.B)
    single = len(ours) == len(theirs) == 1
    print(compare(ours[0], theirs[0]) if single else compare_folders(ours, theirs))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
