"""The command line of the benchmarks."""

import os
import sys
from collections.abc import Callable, Mapping

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler need not tell when it starts

from eval import device_of
from scripts import bench
from scripts.bench import cost, listing, loader, measure, merge, pack, paths, readme, run, step
from scripts.prepare import options, wants_help

# Each takes its options as text, by name, and returns what goes into the file.
COMMANDS: dict[str, tuple[Callable[[Mapping[str, str]], dict], Mapping[str, str]]] = {
    "cost": (cost.cost, cost.OPTIONS),
    "step": (step.step, step.OPTIONS),
    "paths": (paths.paths, paths.OPTIONS),
    "merge": (merge.merge, merge.OPTIONS),
    "pack": (pack.pack, pack.OPTIONS),
    "run": (run.run, run.OPTIONS),
    "loader": (loader.loader, loader.OPTIONS),
    "listing": (listing.listing, listing.OPTIONS),
}


def main(arguments: list[str]) -> int:
    name, *rest = arguments or [""]
    if name not in {*COMMANDS, "readme"}:
        print(f"{bench.__doc__}\nThere is: {', '.join(COMMANDS)}, readme.")
        return 0 if wants_help([name]) else 2
    try:
        if name == "readme":
            options(rest, set())
            print("written to", *readme.write())
            return 0
        measured, known = COMMANDS[name]
        if rest == ["help"]:
            print(sys.modules[measured.__module__].__doc__)
            print("Options:", *(f"{key}: {text}" for key, text in known.items()), sep="\n  ")
            return 0
        given = options(rest, set(known))
        given["device"] = str(device_of(given.get("device", "cpu")))
        path = measure.write(name, given["device"], measured(given))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path.read_text() + f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
