"""Figures in README.md and tables in results/bench/README.md, from results/bench/*.json alone."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from tabulate import tabulate

from data.manifest import replacing
from scripts.bench import measure, pages

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
Lines = Iterator[tuple[str, str]]  # what, figure


def listed(rows: dict[str, dict], key: str, *methods: str) -> str:
    return ", ".join(f"{m} {rows[m][key]:.2f}" for m in methods if m in rows)


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def cost(result: dict) -> Lines:
    rows = {row["method"]: row for row in result["methods"] if "gflop_to_full" in row}
    if rows:
        shares = listed(rows, "gflop_to_full", "linear", "lora", "ssf", "alore", "rlrr")
        yield "operations of a step, full fine-tuning = 1 (counted)", shares


def step(result: dict) -> Lines:
    rows = {row["method"]: row for row in result["methods"]}
    times = listed(rows, "to_full", "linear", "lora", "ssf", "alore", "rlrr")
    yield "time of a step, full fine-tuning = 1", times
    excess = [row["excess"] for row in result["methods"]]
    over = sum(value > 1.3 for value in excess)
    yield (
        "time of a step over what its operations take at full fine-tuning's rate",
        f"{spread(excess)}; above 1.3 for {over} of {len(excess)} methods",
    )


def merge(result: dict) -> Lines:
    ratios = [row["merged_to_bare"] for row in result["methods"]]
    if ratios:
        yield (
            f"merged forward pass, bare backbone = 1, {len(ratios)} methods",
            f"{spread(ratios)}, median {median(ratios):.2f} (a copy of the bare one: "
            f"{result['control']:.2f})",
        )


def pack(result: dict) -> Lines:
    for row in result["methods"]:
        best = max(row["packs"], key=lambda p: p.get("runs_per_hour", 0))
        yield (
            f"{row['method']}: most runs an hour, one at a time and not compiled = 1",
            f"{best['to_one_at_a_time']:.2f}, with {row['chosen']} at once"
            f"{' and compiled' if best['compiled'] else ''}, at "
            f"{100 * best['share_of_matmul_rate']:.0f} % of the device's matmul rate",
        )


def run(result: dict) -> Lines:
    hours, unit = result["total_hours"], "h"
    if hours["naive"] < 1:
        hours, unit = {name: 60 * value for name, value in hours.items()}, "min"
    yield (
        f"a VTAB-shaped run of {result['method']} against the naive loop (scaled)",
        f"{hours['ours']:.1f} {unit} against {hours['naive']:.1f} {unit}: "
        f"{result['ratio']:.1f} times less",
    )


def loader(result: dict) -> Lines:
    speed = ", ".join(
        f"{row['cached_images_per_second']:.0f} against {row['decoded_images_per_second']:.0f}"
        for row in result["cached"]
    )
    share = 100 * result["input_share_of_a_step"]
    yield "cached input's share of a training step", f"{share:.2f} %"
    yield "images/s, cached against decoded (32, 96, 480 pixels)", speed
    stream = result["stream"]
    marks = [mark[1] for mark in stream["mebibytes_after_images"]]
    yield f"memory while {stream['images']:,} images stream", f"{min(marks)} to {max(marks)} MiB"


FIGURES: dict[str, Callable[[dict], Lines]] = {
    "cost": cost,
    "step": step,
    "merge": merge,
    "pack": pack,
    "run": run,
    "loader": loader,
}


def table(results: dict[str, dict]) -> str:
    """A line for every figure, with what it was measured on."""
    lines = []
    for name, figures in FIGURES.items():
        for stem in (name, f"{name}-cuda"):
            if stem in results:
                result = results[stem]
                on = "any machine" if name == "cost" else pages.machine(result)
                if "blocks" in result:
                    on += f"; {result['blocks']} blocks of {result['backbone']}, batches of "
                    on += f"{result['batch_size']}"
                lines += [(*line, on) for line in figures(result)]
    return tabulate(lines, ("what", "figure", "on"), tablefmt="github", disable_numparse=True)


def replace(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        with replacing(path) as temporary:
            temporary.write_text(text)


def write() -> list[Path]:
    """Puts the figures between the markers and writes the page of tables. Raises ValueError where
    README.md has no marker, or nothing was measured yet."""
    files = sorted(measure.RESULTS.glob("*.json"))
    if not files:
        raise ValueError(f"{measure.RESULTS} holds no results: run a benchmark first")
    results = {path.stem: json.loads(path.read_text()) for path in files}
    before, marker, rest = README.read_text().partition(BEGIN)
    if not marker:
        raise ValueError(f"{README.name} has no line {BEGIN} to put the figures behind")
    after = rest.partition(END)[2] if END in rest else rest
    replace(README, f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
    page = measure.RESULTS / "README.md"
    replace(page, pages.page(results))
    return [README, page]
