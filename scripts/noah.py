"""NOAH's evolutionary search: which sub-network of a trained supernet to train afresh.

    python train.py method=noah_supernet phase=grid backbone=B dataset=S/T optim.epochs=500 \\
        optim.lr=5e-4
    python -m scripts.noah RUN [--limit PARAMETERS] [--generations 15] [--seed 0]

RUN is the folder of the supernet's grid run: trained on the tuning split, so that the validation
split, on which sub-networks are scored, is new to it. As released, a sub-network has at most
640,000 parameters (--limit 640000). Prints the command of the final training, and leaves
subnet.json in RUN.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import eval as evaluation
import peft
from peft import record as records
from peft.config import compose
from peft.noah import KINDS
from peft.supernet import Net, Supernet, evolve


def size_of(net: Net, width: int) -> int:
    """The parameters of a sub-network, its head apart."""
    parts = zip(*(net[kind] for kind in KINDS), strict=True)
    return sum(
        p * width + 4 * r * width + (2 * width + 1) * h + width * (h > 0) for p, r, h in parts
    )


def search(run: Path, device: str, workers: int, data_root: str | None, **settings) -> dict:
    """Searches, or finds the search done. Raises ValueError for a run that is no supernet or saw
    the validation split."""
    told = [f"device={device}", f"workers={workers}"]
    told += [f"data_root={data_root}"] if data_root else []
    record, cfg = evaluation.restore(run, compose("eval", told))
    if record["method"] != "noah_supernet" or record["phase"] != "grid":
        raise ValueError(
            f"{run} is a {record['phase']} run of {record['method']}: the search wants one of "
            "noah_supernet with phase=grid, which has not seen the validation split"
        )
    target = run / "subnet.json"
    asked = {"of": record["key"], "settings": settings}
    if target.is_file() and (found := json.loads(target.read_text())).items() >= asked.items():
        return found
    where = evaluation.device_of(device)
    model = evaluation.model_of(cfg, where)
    peft.load_adapter_state(model, evaluation.adapter_of(run))
    loader = evaluation.loader_of(cfg, cfg.protocol.tune.score_on, where, train=False)
    autocast = evaluation.autocast_of(cfg.precision, where)
    (supernet,) = [m for m in model.modules() if isinstance(m, Supernet)]

    @torch.no_grad()
    def score(net: Net) -> float:
        supernet.choose(net)
        return evaluation.evaluate(model, loader, autocast)

    trace = []

    def report(generation: int, net: Net, top1: float) -> None:
        trace.append(top1)
        print(f"generation {generation}: {top1:.2f} % with {size_of(net, width):,} parameters")

    width = model.embed_dim
    limit = settings["limit"] or float("inf")
    space = supernet.space()
    net, top1 = evolve(
        space, score, lambda net: size_of(net, width), report=report, **settings | {"limit": limit}
    )
    result = asked | {"net": net, "top1_val": top1, "params": size_of(net, width), "trace": trace}
    records.write(target, result)
    return result


def command(record: dict, result: dict) -> str:
    """What trains the found network afresh."""
    sizes = [f"method.{kind}=[{','.join(map(str, result['net'][kind]))}]" for kind in KINDS]
    suite, task = record["suite"], record["task"]
    dataset = task if suite == task else f"{suite}/{task}"
    told = [f"backbone={record['backbone']}", f"dataset={dataset}", "method=noah", *sizes]
    return " ".join(["python train.py", *told, f"selected_from=[{result['of']}]"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.noah", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the supernet's grid run")
    parser.add_argument("--limit", type=int, help="parameters, the head apart (default: none)")
    parser.add_argument("--generations", type=int, default=15)
    parser.add_argument("--population", type=int, default=50, help="in each generation")
    parser.add_argument("--parents", type=int, default=10, help="the best, which breed")
    parser.add_argument("--mutations", type=int, default=25)
    parser.add_argument("--crossovers", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data-root", help="where images lie (default: as train.py)")
    options = vars(parser.parse_args(arguments))
    result = search(**options)
    print(f"best of val: {result['top1_val']:.2f} %, {result['params']:,} parameters. Now:")
    print(command(records.read(options["run"] / "record.json"), result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
