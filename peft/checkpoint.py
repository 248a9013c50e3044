"""Surviving: what a run needs to go on from where it was, to the same bits on the CPU."""

import io
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peft.pack import Pack
from peft.parallel import first
from peft.record import write
from peft.state import adapter_state, load_adapter_state


@dataclass
class History:
    """What a pack of runs has to remember between steps, and across an interruption."""

    step: int  # optimiser steps done
    seconds: float  # spent in the loop
    # One row an epoch and member: epoch, loss, top1_train, lr, images, and top1 where the protocol
    # peeks.
    logs: list[list[dict]]
    sums: Tensor  # (members, 3) of this epoch: loss * images, right answers, images
    failed: dict[int, str] = field(default_factory=dict)  # members that were dropped, and why


class Stop:
    """Turns SIGINT and SIGTERM into a question that the loop asks after each step; a second signal
    stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "Stop":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are not ours
            signals = (signal.SIGINT, signal.SIGTERM)
            self.before = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def save_state(
    path: Path, keys: list[str], pack: Pack, optimizer, scaler, history: History, device
) -> None:
    """All that a resumed run or pack needs to go on to the same bits, in one step."""
    state = {
        "keys": keys,
        "model": adapter_state(pack.model),
        "leaves": pack.leaves,
        "averages": pack.averages,
        "members": pack.members,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "history": vars(history),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    buffer = io.BytesIO()  # a full disk is then an OSError that says so, not torch's own words
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def resume(
    path: Path, keys: list[str], pack: Pack, optimizer, scaler, history: History, device
) -> None:
    """Goes on from a checkpoint, if there is one of these very members.

    A checkpoint of another pack is passed over. Raises ValueError for one that cannot be read, or
    that is another configuration's."""
    if not path.is_file():
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["keys"]
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it to train this run from its start"
        ) from error
    if keys[0] not in known:
        raise ValueError(
            f"{path} is the checkpoint of another configuration (key {known[0][:8]}, not "
            f"{keys[0][:8]}); delete it to train this run from its start"
        )
    if keys != known:
        print(f"{path} is of a pack with other members: starting afresh")
        return
    load_adapter_state(pack.model, state["model"])
    pack.load(state["leaves"], state.get("averages"))
    for k in set(pack.members) - set(state["members"]):
        pack.drop(k, optimizer)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where it was written on a CPU, which has no loss scale
        scaler.load_state_dict(state["scaler"])
    vars(history).update(state["history"])
    history.sums = history.sums.to(device)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], device)
    if first():
        print(f"going on from step {history.step} of {path.parent.name}")
