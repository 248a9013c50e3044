"""What follows from trained adapters without training: functions of adapter states, for `eval.py`.

An adapter state is what `core.adapter_state` returns: tensors by site path and own name.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from peft import record as records


def combine(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], form: str = "vectors"
) -> dict[str, Tensor]:
    """N trained RLRRs as one (RLRR, section H); `states` are of one method and backbone.

    "vectors": row = sum w_i row_i and col = sum w_i col_i, then their product. "products": the
    sum of the products w_i row_i col_i, which is an RLRR of N times the rank: load it into one.
    The paper prints that sum without w_i, yet weights the shift. Shifts and heads are weighted
    sums in both; SSF's scales combine what they add to 1. Raises ValueError for unlike states.
    """
    if form not in {"vectors", "products"}:
        raise ValueError(f"form={form!r}: there is vectors, products")
    if len(states) != len(weights) or not states:
        raise ValueError(f"{len(states)} states, {len(weights)} weights: give each state a weight")
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in states]
    odd = sorted({name for other in shapes for name, _ in other.items() ^ shapes[0].items()})
    if odd:
        raise ValueError(
            "only adapters of one method, backbone and number of classes combine; these differ "
            f"in {len(odd)} tensors, among them {', '.join(odd[:5])}"
        )
    if not any(name.endswith((".row", ".col")) for name in states[0]):
        raise ValueError("there is no RLRR among these tensors, and its vectors are what combines")
    combined = {}
    for name in states[0]:
        tensors, (site, _, leaf) = [state[name] for state in states], name.rpartition(".")
        paired = f"{site}.row" in states[0] and f"{site}.col" in states[0]  # not one-sided
        if form == "products" and paired and leaf == "row":
            combined[name] = torch.cat([w * t for w, t in zip(weights, tensors)], dim=1)
        elif form == "products" and paired and leaf == "col":
            combined[name] = torch.cat(tensors, dim=1)
        else:
            rest = 1.0 if leaf == "gamma" else 0.0
            combined[name] = rest + sum(w * (t - rest) for w, t in zip(weights, tensors))
    return combined


def widened(method: Mapping, times: int) -> dict:
    """The resolved configuration of an RLRR with so many times its rank, which the sum of as many
    products is loaded into. One-sided ones stay: their sum is one vector again."""
    method = copy.deepcopy(dict(method))
    if method["sides"] == "both":
        method["rank"] *= times
        for placement in method["placements"]:
            if "rank" in placement["tuner"]:
                placement["tuner"]["rank"] *= times
    return method


def keep_experts(state: Mapping[str, Tensor], kept: str) -> dict[str, Tensor]:
    """An ALoRE with some of its experts only, as in the paper's Table 22; experts count from 1.

    `kept`: "increment_i" experts 1 to i, "single_i" only i, "sliced_i" all but i. ALoRE is linear
    in its experts, so one whose up-projection is zero is gone. Raises ValueError for a state
    without experts or an i beyond them.
    """
    rules = [state[name].shape for name in state if name.endswith(".scale")]  # n x n x n, shared
    ups = [
        name
        for name in state
        if name.endswith(".up")
        and (*state[name].shape[:1],) * 3 in rules
        and name.removesuffix("up") + "down" in state
    ]
    form, _, number = kept.partition("_")
    counts = {len(state[name]) for name in ups}
    if len(counts) != 1 or not re.fullmatch(r"(increment|single|sliced)_[1-9]\d*", kept):
        raise ValueError(
            f"kept={kept!r} on an adapter with {sorted(counts) or 'no'} experts: give increment_i, "
            "single_i or sliced_i and the adapter of an ALoRE"
        )
    experts, i = counts.pop(), int(number)
    if i > experts:
        raise ValueError(f"kept={kept!r}, but there are {experts} experts")
    position = torch.arange(1, experts + 1)
    mask = {"increment": position <= i, "single": position == i, "sliced": position != i}[form]
    thinned = {name: state[name] * mask.to(state[name]).view(-1, 1, 1) for name in ups}
    return {**state, **thinned}


def shares(weights: object, runs: int) -> list[float]:
    """The weights of a combination: as given, or equal. Raises ValueError for anything else."""
    given = [1 / runs] * runs if weights is None else weights
    numbers = isinstance(given, list) and all(
        isinstance(w, int | float) and math.isfinite(w) for w in given
    )
    if not numbers or len(given) != runs:
        raise ValueError(
            f"weights={given} must be {runs} numbers, one a run, as weights=[0.5,0.5]; a "
            "checkpoint file that the runs started from is checkpoint=FILE here"
        )
    return [float(w) for w in given]


def check_alike(runs: Sequence[Path], sources: Sequence[Mapping]) -> None:
    """Raises ValueError, with the difference, for runs that are not of one kind."""
    parts = ("backbone", "method", "weights", "dataset", "image_size", "protocol", "preset")
    for run, source in zip(runs[1:], sources[1:]):
        ours = {f"config.{part}": sources[0]["config"].get(part) for part in parts}
        theirs = {f"config.{part}": source["config"].get(part) for part in parts}
        for path, record in ((ours, sources[0]), (theirs, source)):
            path["phase"] = records.scored_as(record["config"])
            path["weights_sha256"] = record["provenance"]["weights_sha256"]
        odd = [path for path in ours if ours[path] != theirs[path]]
        if odd:
            raise ValueError(
                f"{run} and {runs[0]} do not combine: they differ in {', '.join(odd)}. Only runs "
                "of one method on one task and backbone, from the same pre-trained weights, do"
            )
