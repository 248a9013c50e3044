"""What the values of a run or sweep may be: asked before anything is built, by `train.py` of one
run, by `sweep.py` of all of them. Hydra says what a key is called, this what it may hold.

Needs neither torch nor Hydra.
"""

import os
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from peft.config import near

GRAPHS = ("reduce-overhead", "max-autotune")  # the modes of torch.compile with CUDA graphs
Rule = tuple[Callable[[Any], bool], str]  # whether a value fits, and what would


def number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def numbers(means: str, fits: Callable[[float], bool]) -> Rule:
    return lambda v: number(v) and fits(v), f"a number {means}"


def counts(least: int) -> Rule:
    return lambda v: whole(v) and v >= least, f"a whole number from {least}"


def cores() -> int:
    """How many of the machine's cores this process may use."""
    there = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if there else os.cpu_count() or 1


def one_of(*names: str) -> Rule:
    return lambda v: v in names, f"one of {', '.join(names)}"


def nullable(rule: Rule) -> Rule:
    fits, means = rule
    return lambda v: v is None or fits(v), f"null or {means}"


def lists(rule: Rule) -> Rule:
    fits, means = rule

    def all_fit(value: object) -> bool:  # a list, or OmegaConf's
        return isinstance(value, Sequence) and not isinstance(value, str) and all(map(fits, value))

    return all_fit, f"a list, [...], each of it {means}"


switch: Rule = (lambda v: isinstance(v, bool), "true or false")
text: Rule = (lambda v: isinstance(v, str), "a name")
positive, from_zero = numbers("above 0", lambda v: v > 0), numbers("from 0", lambda v: v >= 0)
fraction = numbers("from 0 to below 1", lambda v: 0 <= v < 1)
seeds: Rule = (lambda v: whole(v) and 0 <= v < 2**63, "a whole number from 0, below 2^63")

RULES: dict[str, Rule] = {
    "phase": one_of("final", "grid"),
    "seed": seeds,
    "data_seed": seeds,
    "image_size": counts(1),
    "precision": one_of("bf16", "fp16", "fp32"),
    "workers": (lambda v: v == "auto" or (whole(v) and v >= 0), "auto or a whole number from 0"),
    "pack": (
        lambda v: bool(re.fullmatch("auto|all|[1-9][0-9]*", str(v))),
        "auto, all or a number from 1",
    ),
    "compile": (
        lambda v: isinstance(v, bool) or v in ("auto", *GRAPHS, "max-autotune-no-cudagraphs"),
        "auto, true, false, or a mode of torch.compile: reduce-overhead, max-autotune, "
        "max-autotune-no-cudagraphs",
    ),
    "grad_checkpointing": switch,
    "checkpoint_seconds": from_zero,
    "info": switch,
    "force": switch,
    "dataset.num_classes": counts(1),
    "protocol.selection": one_of("last", "best_on_test"),
    "protocol.peek_every": counts(1),
    "optim.optimizer": one_of("adamw", "sgd"),
    "optim.lr": positive,
    "optim.lr_base_size": nullable(positive),
    "optim.weight_decay": from_zero,
    "optim.betas": nullable(lists(fraction)),
    "optim.momentum": nullable(fraction),
    "optim.epochs": counts(1),
    "optim.steps": nullable(counts(1)),
    "optim.warmup_epochs": from_zero,
    "optim.batch_size": counts(1),
    "optim.drop_last": switch,
    "optim.min_lr": from_zero,
    "optim.schedule": one_of("step", "timm_epoch", "timm_late", "bolts_late"),
    "optim.warmup_lr": from_zero,
    "optim.head_init": one_of("zero", "linear", "normal_002", "kaiming_out"),
    "optim.restart_epochs": nullable(positive),
    "optim.restart_factor": numbers("from 1", lambda v: v >= 1),
    "optim.no_decay": one_of("one_dim", "names", "none"),
    "optim.clip_norm": nullable(positive),
    "optim.accumulate": counts(1),
    "optim.label_smoothing": fraction,
    "optim.mixup": from_zero,
    "optim.cutmix": from_zero,
    "optim.ema": nullable(numbers("between 0 and 1, such as 0.9998", lambda v: 0 < v < 1)),
    "optim.layer_dropout": fraction,
    "optim.drop_path": fraction,
    # of an evaluation
    "per_class": switch,
    "merged": switch,
    "combine": nullable(lists(text)),
    # of a sweep
    "rows": nullable(lists(counts(1))),
    "datasets": nullable(lists(text)),
    "watch": nullable(positive),
    "attempts": counts(1),
    "heartbeat": positive,
    "claim_timeout": positive,
    "engine.workers": nullable(counts(1)),
    "engine.threads": nullable(counts(1)),
    "sweep.seeds": nullable((lambda v: v and lists(seeds)[0](v), f"{lists(seeds)[1]}, not empty")),
    "sampler.trials": counts(1),
    "sampler.halving": nullable(counts(2)),
    "sampler.seed": seeds,
}

# What the yaml of a run's dataset, and of its method, must have.
NEEDED = {
    "dataset": ("name", "suite", "num_classes", "reader"),
    "method": ("name", "placements", "trainable"),
    "backbone": ("name", "family", "model", "sites", "mean", "std", "image_size"),
}

DELETE = "nothing: what has a record is not run again, delete its folder"

# What a sweep decides for its runs, and how to say it to a sweep, and to one that is a table.
OWN = {
    "backbone": ("'sweep.backbone=[{}]'", "rows=[...]: each has its backbone"),
    "method": ("'sweep.method=[{}]'", "rows=[...]: each has its method"),
    "dataset": ("'sweep.dataset=[{}]'", "'datasets=[{}]'"),
    "protocol": ("sweep.protocol={}", "rows=[...]: their recipes have protocols"),
    "seed": ("'sweep.seeds=[{}]'", "'sweep.seeds=[{}]'"),
    "phase": ("action=run, which does both", "action=run, which does both"),
    "selected_from": ("nothing: it is filled in", "nothing: it is filled in"),
    "force": (DELETE, DELETE),
    "info": ("action=plan, or ask train.py", "action=plan, or ask train.py"),
}


def check_values(values: Iterable[tuple[str, object]]) -> None:
    """Raises ValueError for the first of some dotted paths whose value cannot be meant."""
    for path, value in values:
        fits, means = RULES.get(path, (lambda _: True, ""))
        if not fits(value):
            raise ValueError(f"{path}={value} should be {means}")


def check(config: Mapping) -> None:
    """Raises ValueError, naming the key, for a value that no run or sweep can mean."""
    values = []
    for path in RULES:
        node = config
        for part in path.split("."):
            node = node[part] if isinstance(node, Mapping) and part in node else KeyError
        values += [(path, node)] if node is not KeyError else []
    check_values(values)
    for group, needed in NEEDED.items():
        node = config.get(group)
        if isinstance(node, Mapping) and (missing := [k for k in needed if k not in node]):
            raise ValueError(f"the yaml of this {group} has no {', '.join(missing)}")
    optim = config.get("optim")
    if optim:
        there = {path.partition(".")[2] for path in RULES if path.startswith("optim.")}
        if wrong := sorted({*optim} - {"name", *there}):
            raise ValueError(f"there is no key 'optim.{wrong[0]}'; {near(wrong[0], sorted(there))}")
        if lacking := sorted(there - {*optim, "betas", "momentum"}):
            raise ValueError(f"optim has no {', '.join(lacking)}: take optim=adamw_cosine whole")
        needs = {"adamw": "betas", "sgd": "momentum"}[optim["optimizer"]]
        if optim.get(needs) is None:
            kind = optim["optimizer"]
            raise ValueError(
                f"optim.optimizer={kind} needs optim.{needs}: take optim={kind}_cosine"
            )
        if optim["schedule"] != "step" and optim["restart_epochs"]:
            raise ValueError("optim.restart_epochs goes with optim.schedule=step only")
        if config.get("compile") in GRAPHS and optim["accumulate"] > 1:
            raise ValueError(
                f"compile={config['compile']} has gradients in the memory of its CUDA graphs, "
                f"where the next part of a batch overwrites them: with optim.accumulate="
                f"{optim['accumulate']} take compile=true"
            )


def check_words(words: Iterable[str], varied: Container[str], table: bool) -> None:
    """Raises ValueError for an override of every run, `key=value`, of what the sweep itself decides
    or what its grid varies: it would be without effect, or make all cells the same."""
    for word in words:
        path, _, value = word.lstrip("+~").partition("=")
        if path in OWN:
            raise ValueError(
                f"{word}: a sweep decides that for each of its runs; give "
                f"{OWN[path][table].format(value)}"
            )
        if path in varied:
            raise ValueError(
                f"{word} would be without effect: the grid varies {path}; give "
                f"'sweep.grid={{{path}:[{value}]}}' for a grid of your own"
            )
