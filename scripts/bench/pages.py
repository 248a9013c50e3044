"""Every benchmark's result as Markdown tables."""

from collections.abc import Callable, Iterable, Sequence

from tabulate import tabulate

HEAD = """# Benchmarks

Made by `python -m scripts.bench readme` from the files beside this page. A file names the hardware,
the blocks and the batch it was measured on. Ratios are within one call: medians over interleaved
rounds. What `cost` says is counted, and the same on every machine.
"""


def machine(result: dict) -> str:
    """What something was measured on, shortly."""
    on = result["hardware"]
    return on["device"] if on["device"] != "cpu" else f"{on['threads']} of {on['cores']} CPU cores"


def shown(cell: object) -> str:
    """Numbers with three digits at least, and no more than two decimals past 1."""
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 10 else f"{cell:.1f}"
    return "" if cell is None else str(cell)


def grid(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    cells = [[shown(cell) for cell in row] for row in rows]
    sides = ["left"] + ["right"] * (len(head) - 1)
    return tabulate(cells, head, tablefmt="github", disable_numparse=True, colalign=sides)


def columns(rows: Iterable[dict], named: dict[str, str]) -> str:
    """A table of some keys of rows, under other names."""
    return grid(list(named.values()), [[row.get(key) for key in named] for row in rows])


def cost(result: dict) -> list[str]:
    rows = [
        row
        | {
            "w_gflop": row.get("materialised", {}).get("gflop"),
            "w_saved": row.get("materialised", {}).get("saved_mebibytes"),
        }
        for row in result["methods"]
    ]
    named = {"method": "method", "tuned_params": "tuned", "gflop": "GFLOP"}
    named |= {"gflop_to_full": "/ full", "saved_mebibytes": "kept MiB"}
    named |= {"w_gflop": "W': GFLOP", "w_saved": "W': kept MiB"}
    variants = {"variant": "all four linear layers of a block", "gflop": "GFLOP"}
    return [
        "Operations of a forward and a backward pass and what the graph keeps between them. `W'`: "
        "the same method through a new weight matrix, where its own forward pass avoids that.",
        columns(rows, named),
        columns(result["four_linears"], variants | {"saved_mebibytes": "kept MiB"}),
    ]


def step(result: dict) -> list[str]:
    named = {"method": "method", "to_linear_forward": "/ linear forward", "to_full": "/ full"}
    named |= {"to_floor": "/ floor", "excess": "time / operations", "saved_mebibytes": "kept MiB"}
    named |= {"share_of_matmul_rate": "share of matmul rate"}
    named |= {"peak_mebibytes": "peak MiB"} if "peak_mebibytes" in result["methods"][0] else {}
    named |= {"images_per_second": "images/s", "inference_to_bare": "inference / bare"}
    named |= {"merged_to_bare": "merged / bare", "goes": "where the time goes"}
    rows = []
    for row in result["methods"]:
        spent = row.get("time_goes_to", {})
        slowest = spent.get("slowest", {}).items()
        goes = ", ".join(f"{name} {100 * share:.0f} %" for name, share in slowest)
        if "busy" in spent:  # the rest is launches
            goes = f"{100 * spent['busy']:.0f} % on the GPU, there {goes}"
        rows.append(row | {"goes": goes})
    return [
        "A forward and a backward pass. `linear forward`: the forward pass of linear probing; "
        "`full`: full fine-tuning; `floor`: one bias of the first block trains. `time / "
        "operations`: over what the counted operations take at the rate of `full`; above 1.3 the "
        "slowest operators are named. `bare`: the backbone's own forward pass.",
        columns(rows, named),
    ]


def paths(result: dict) -> list[str]:
    rows = [row | {"tuners": ", ".join(row["tuners"])} for row in result["methods"]]
    named = {"method": "method", "tuners": "own forward pass of"}
    found = result["lava_table16"]
    return [
        "A step through W' over a step by the method's own forward pass: above 1 where it pays.",
        columns(rows, named | {"through_weights_to_own": "W' / own"}),
        "The cost of a step beside LAVA's Table 16, LoRA being 1. The paper names neither network "
        "nor rank nor batch nor hardware for it: those are ours.",
        grid(
            ["layers", "method", "ours", "published"],
            [
                [f"{kind} ({part['backbone']})", method, value, part["published"].get(method)]
                for kind, part in found.items()
                for method, value in part["ours"].items()
            ],
        ),
    ]


def merge(result: dict) -> list[str]:
    named = {"method": "method", "merged_to_bare": "merged / bare"}
    named |= {"operations_to_bare": "operations / bare", "unmerged_to_bare": "unmerged / bare"}
    return [
        f"A copy of the bare backbone beside itself: {result['control']}.",
        columns(result["methods"], named),
        "Not merged: " + "; ".join(f"{k} ({v})" for k, v in result["not_merged"].items()) + ".",
    ]


def pack(result: dict) -> list[str]:
    named = {"method": "method", "members": "at once", "compiled": "compiled"}
    named |= {"step_seconds": "step s"}
    named |= {"runs_per_hour": "runs/h", "to_one_at_a_time": "/ one at a time"}
    named |= {"gflop_to_solo": "operations / solo", "share_of_matmul_rate": "share of matmul rate"}
    rows = [p | {"method": row["method"]} for row in result["methods"] for p in row["packs"]]
    chosen = ", ".join(f"{row['method']} {row['chosen']}" for row in result["methods"])
    return [f"Most runs an hour at: {chosen}.", columns(rows, named)]


def run(result: dict) -> list[str]:
    hours, seconds = result["hours"], result["measured_seconds"]
    parts = {"decoding": ("fill", "input", "test_input"), "step": ("step",)}
    parts |= {"compiling": ("compiling",), "evaluation": ("evaluation",)}
    rows = []
    for part, timed in parts.items():
        row = [part]
        for name in ("naive", "ours"):
            measured = sum(seconds[name].get(t, 0) for t in timed)
            row += [f"{measured:.2f}", f"{hours[name].get(part, 0.0)}"]
        rows.append(row)
    head = ["part", "naive, measured s", "naive, scaled h", "ours, measured s", "ours, scaled h"]
    to = result["scaled_to"]
    return [
        f"{result['method']}; {result['timed_train_images']} training and "
        f"{result['timed_test_images']} test images timed, scaled to {to['epochs']} epochs of "
        f"{to['train_images']:,} and {to['test_images']:,}. Naive over ours: {result['ratio']}.",
        grid(head, rows),
    ]


def loader(result: dict) -> list[str]:
    named = {"native_pixels": "pixels", "cached_images_per_second": "cached images/s"}
    named |= {"decoded_images_per_second": "decoded images/s", "ratio": "ratio"}
    share, stream = 100 * result["input_share_of_a_step"], result["stream"]
    marks = [(f"{seen:,}", mebibytes) for seen, mebibytes in stream["mebibytes_after_images"]]
    return [
        f"Input takes {share:.2f} % of a training step of ViT-B/16.",
        columns(result["cached"], named | {"fill_seconds": "decoded once, s"}),
        f"Streamed with two workers: {stream['images_per_second']:,} images/s; "
        f"{stream['mebibytes_before']} MiB before.",
        grid(["images so far", "MiB"], marks),
    ]


def listing(result: dict) -> list[str]:
    named = {"start": "over an empty folder", "first": "status, without an index"}
    named |= {"plan": "plan", "status": "status"}
    rows = [(text, f"{result['seconds'][key]:.1f}") for key, text in named.items()]
    said = f"{result['records']:,} finished runs in {result['cells']} cells; whole processes."
    return [said, grid(["command", "seconds"], rows)]


PARTS: dict[str, Callable[[dict], list[str]]] = {
    "cost": cost,
    "step": step,
    "paths": paths,
    "merge": merge,
    "pack": pack,
    "run": run,
    "loader": loader,
    "listing": listing,
}


def page(results: dict[str, dict]) -> str:
    """All of them, in the order of PARTS."""
    text = [HEAD]
    for name, tables in PARTS.items():
        for stem in (name, f"{name}-cuda"):
            if stem not in results:
                continue
            result = results[stem]
            shape = [f"{result[k]} {k.replace('_', ' ')}" for k in ("blocks",) if k in result]
            shape += [f"batch {result['batch_size']}"] if "batch_size" in result else []
            said = result.get("measured") or result.get("counted")
            on = "" if name == "cost" else f"{result['hardware']['cpu']}, {machine(result)}"
            facts = [
                result.get("backbone"),
                *shape,
                result.get("precision"),
                said,
                on,
                result["when"][:10],
                result.get("note"),
            ]
            text.append(f"## {stem}\n\n{'; '.join(fact for fact in facts if fact)}.\n")
            text += [f"{part}\n" for part in tables(result)]
    return "\n".join(text)
